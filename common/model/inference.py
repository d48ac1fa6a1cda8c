"""Load a model directory, a Hub model or an adapter for inference. A model may be quantized, by tools.quantize.

An adapter is loaded only on the base model that it was trained on, which ``base_model.json`` in its directory describes (see
:mod:`common.model.adapters`). Without that file, for example if the adapter was trained with other code, only the shapes of its
weights are checked.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.runtime.process import InputError

from .adapters import BASE_DESCRIPTION, COPY_AGAIN, attach_adapter, base_fault, find_adapter, find_base, read_base_description
from .checkpoint import fetch_checkpoint, load_processor, load_weights
from .checks import BAD_VALUES, first_line, read_config
from .loading import avoid_avx512_kernel
from .quantization import quantization_scheme, quantization_settings


def load_for_inference(
    name_or_path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    base: str | None = None,
) -> tuple[nn.Module, Phi3VProcessor]:
    """Load a model for inference.

    Parameters
    ----------
    name_or_path : str or Path
        Directory or Hub id of a full model, or of an adapter, which is loaded on its base model.
    device : str or torch.device
        Device of the model.
    dtype : torch.dtype, optional
        Of the weights and the computation. Default: :func:`inference_dtype`.
    base : str, optional
        Directory or Hub id of the adapter's base model. Default: the one that the adapter names.

    Returns
    -------
    model : torch.nn.Module
        ``Phi3VForCausalLM``, or a ``PeftModel`` that wraps one, in evaluation mode. ``model.disable_adapter()`` restores the
        base model, except where :func:`rewrites_base`. The base of an adapter is quantized as in its training.
    processor : Phi3VProcessor
        The one saved with the model or adapter, otherwise that of the base model.

    Raises
    ------
    InputError
        If something is missing, or the adapter does not match its base model.
    """
    adapter = find_adapter(name_or_path)
    if adapter is None:
        if base is not None:
            raise InputError(f"{name_or_path} is not an adapter (adapter_config.json is missing): remove --base")
        model = load_full(str(name_or_path), device, dtype)
        return model, load_processor(str(name_or_path))
    model = load_base(adapter, device, dtype, base)
    return attach_adapter(model, adapter), adapter_processor(adapter, base)


def inference_dtype(device: str | torch.device) -> torch.dtype:
    """Return the dtype for inference: bf16 on a GPU that supports it, fp16 on an older one, fp32 on a CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_full(
    name_or_path: str,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    quantization: dict[str, Any] | None = None,
) -> Phi3VForCausalLM:
    """Load a full model in evaluation mode.

    ``quantization`` holds the fields of a ``BitsAndBytesConfig``; a checkpoint that is quantized already stays as it is. The
    kernels for fp8 are code on the Hub, so fp8 weights are converted to ``dtype``.

    Raises
    ------
    InputError
        If the checkpoint is missing, incomplete, or not a Phi-3-V model.
    """
    fetch_checkpoint(name_or_path, None, revision)
    processor = load_processor(name_or_path, revision)
    dtype = dtype or inference_dtype(device)
    config: Any = read_config(name_or_path, revision)
    options: dict[str, Any] = {}
    if scheme := quantization_scheme(config):
        config.quantization_config = quantization_settings(scheme, config, dtype)
        if scheme == "fp8":
            config.quantization_config["dequantize"] = True
        options["config"] = config
    elif quantization:
        try:
            settings = quantization | {"bnb_4bit_compute_dtype": dtype}
            options["quantization_config"] = BitsAndBytesConfig.from_dict(settings)
        except BAD_VALUES as error:
            raise InputError(f"{BASE_DESCRIPTION}: invalid quantization ({first_line(error)}): {COPY_AGAIN}") from error
    model = load_weights(
        name_or_path,
        processor,
        revision,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": torch.device(device)},
        **options,
    )
    avoid_avx512_kernel(model)
    for parameter in model.parameters() if scheme else ():
        if parameter.is_floating_point():  # what is not quantized would keep its saved dtype
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def load_base(
    adapter: Path,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    quantized: bool = True,
) -> Phi3VForCausalLM:
    """Load the base model of an adapter.

    Parameters
    ----------
    adapter : Path
        Directory of the adapter.
    base : str, optional
        Directory or Hub id. Default: the base model that the adapter names.
    quantized : bool
        Quantize the base model if it was quantized in training. If False, it is never quantized.

    Raises
    ------
    InputError
        If the base model is missing, or is not the one that the adapter was trained on. If ``base`` is given and only its
        weights differ, this is a warning.
    """
    trained_on = read_base_description(adapter)
    name, revision = find_base(adapter, base)
    try:
        model = load_full(name, device, dtype, revision, trained_on.get("quantization") if quantized else None)
    except InputError as error:
        raise InputError(
            f"adapter {adapter} requires its base model, {name}, which cannot be loaded: {first_line(error)}. "
            "If it is in another place, pass --base DIR"
        ) from None
    fault, only_weights = base_fault(adapter, name, revision)
    if fault and base and only_weights:
        warnings.warn(f"{fault}; its answers may be worse", stacklevel=2)
    elif fault:
        raise InputError(f"{fault}: pass the right one with --base DIR")
    return model


def rewrites_base(model: PeftModel) -> bool:
    """Whether the adapter's initialization changed the base weights, so that disabling it does not restore the base model."""
    return any(
        str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq"))
        for config in model.peft_config.values()
        if hasattr(config, "init_lora_weights")
    )


def adapter_processor(adapter: Path, base: str | None = None) -> Phi3VProcessor:
    """Load the processor saved with an adapter, or that of its base model, see :func:`load_base`."""
    if all((adapter / name).is_file() for name in ("preprocessor_config.json", "tokenizer.json")):
        return load_processor(str(adapter))
    return load_processor(*find_base(adapter, base))
