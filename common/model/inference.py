"""Load a model directory, a hub model or an adapter to answer with; an adapter only on the base it was trained on.

Beside an adapter, ``base_model.json`` describes that base: name, revision, main settings, a fingerprint of its weights,
and how it was quantized. Adapters without that file, trained elsewhere say, are checked by the shapes of their weights.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.processing import stop_token_ids
from common.runtime import InputError

from .adapters import compare_settings, fingerprint, read_base_description
from .checkpoint import check_checkpoint, find_snapshot, load_processor
from .loading import avoid_avx512_kernel


def load_for_inference(
    name_or_path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    base: str | None = None,
) -> tuple[nn.Module, Phi3VProcessor]:
    """Load a model to answer with.

    Parameters
    ----------
    name_or_path : str or Path
        Directory or hub id of a full model, or of an adapter, which is put on its base model.
    device : str or torch.device
        Where the model goes.
    dtype : torch.dtype, optional
        Of weights and computation; by default :func:`inference_dtype`.
    base : str, optional
        Directory or hub id of an adapter's base; by default the one it names.

    Returns
    -------
    model : torch.nn.Module
        ``Phi3VForCausalLM``, or a ``PeftModel`` around one (``model.disable_adapter()`` gives the base's answers, but for
        :func:`rewrites_base`); in evaluation mode. An adapter trained on a quantized base gets it quantized likewise.
    processor : Phi3VProcessor
        As saved with the model or adapter, else the base's.

    Raises
    ------
    InputError
        If something is missing, an adapter doesn't fit its base, or that base is another than the adapter's.
    """
    adapter = find_adapter(name_or_path)
    if adapter is None and base is not None:
        raise InputError(f"{name_or_path} is no adapter (it has no adapter_config.json): leave --base out")
    if adapter is None:
        model = load_full(str(name_or_path), device, dtype)
        return model, load_processor(str(name_or_path))
    model = load_base(adapter, device, dtype, base)
    return attach_adapter(model, adapter), adapter_processor(adapter, model)


def inference_dtype(device: str | torch.device) -> torch.dtype:
    """What to compute in: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_adapter(name_or_path: str | Path) -> Path | None:
    """Directory of an adapter, fetched from the hub if need be; None for anything else.

    Raises
    ------
    InputError
        If the adapter has no weights.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(name_or_path), allow_patterns=["adapter_*", "*.json", "*.jinja"]))
        except (OSError, ValueError):
            return None  # loading it as a full model says what is wrong
    if not (directory / "adapter_config.json").is_file():
        return None
    if not (directory / "adapter_model.safetensors").is_file():
        raise InputError(f"adapter {name_or_path} lacks adapter_model.safetensors: copy the adapter's files there again")
    return directory


def load_full(
    name_or_path: str,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    quantization: dict[str, Any] | None = None,
) -> Phi3VForCausalLM:
    """Load a full model in evaluation mode; ``quantization`` are the fields of a ``BitsAndBytesConfig``.

    Raises
    ------
    InputError
        If the checkpoint is missing or incomplete, or no Phi-3-V.
    """
    check_checkpoint(name_or_path)
    dtype = dtype or inference_dtype(device)
    if quantization:
        quantization = BitsAndBytesConfig.from_dict(quantization | {"bnb_4bit_compute_dtype": dtype})
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation="sdpa",
            device_map={"": torch.device(device)},
            quantization_config=quantization,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name_or_path}: its weights can't be read ({error}): copy the checkpoint's files anew") from None
    avoid_avx512_kernel(model)
    processor = load_processor(name_or_path, revision)
    model.config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = stop_token_ids(processor)
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
        The adapter's directory.
    base : str, optional
        Directory or hub id; by default what the adapter names.
    quantized : bool
        Quantize it as in training (nothing happens if it wasn't); else as it is published.

    Raises
    ------
    InputError
        If the base is missing or another than the adapter was trained on. Where ``base`` is given and only its weights
        differ, it is a warning instead.
    """
    trained_on = read_base_description(adapter)
    name, revision = (base, None) if base else find_base(adapter)
    quantization = trained_on.get("quantization") if quantized else None
    try:
        differences = compare_settings(name, revision, trained_on)
        model = load_full(name, device, dtype, revision, quantization) if not differences else None
    except (OSError, InputError) as error:
        raise InputError(
            f"adapter {adapter} needs its base model, {name}, which can't be loaded: {str(error).splitlines()[0]}. "
            "Where it lies elsewhere, say so with --base DIR"
        ) from None
    remedy = "give the right one with --base DIR"
    if differences:
        was = trained_on["name"]
        raise InputError(f"adapter {adapter} was trained on {was}, and {name} is another model ({differences}): {remedy}")
    if trained_on and trained_on["weights"] != fingerprint(find_snapshot(name, revision)):
        message = f"adapter {adapter} was trained on {trained_on['name']}, and {name} has other weights"
        if not base:
            raise InputError(f"{message}: {remedy}")
        warnings.warn(f"{message}; its answers may be worse", stacklevel=2)
    return model


def attach_adapter(model: Phi3VForCausalLM, adapter: Path) -> PeftModel:
    """Put an adapter on its base model.

    Raises
    ------
    InputError
        If shapes don't fit.
    """
    try:
        misfit = next(_misfits(model, adapter), None)
    except SafetensorError as error:
        path = adapter / "adapter_model.safetensors"
        raise InputError(f"{path} is damaged ({error}): copy the adapter's files anew") from None
    if misfit is not None:
        module, expected, found = misfit
        raise InputError(
            f"adapter {adapter} doesn't fit {model.name_or_path}: its weights for {module} are for {expected} features, "
            f"the base has {found}; give the model it was trained on with --base DIR"
        )
    # PEFT would read an adapter onto a GPU that it finds, whoever uses that.
    return PeftModel.from_pretrained(model, adapter, torch_device=str(model.device)).eval()


def rewrites_base(model: PeftModel) -> bool:
    """Whether an adapter's initialization took it out of the base's weights, so that without it they are not the base's."""
    return any(
        str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq"))
        for config in model.peft_config.values()
        if hasattr(config, "init_lora_weights")
    )


def adapter_processor(adapter: Path, model: Phi3VForCausalLM) -> Phi3VProcessor:
    """The processor saved beside an adapter, or that of its base model."""
    beside = all((adapter / name).is_file() for name in ("preprocessor_config.json", "tokenizer.json"))
    return load_processor(str(adapter) if beside else model.name_or_path)


def find_base(adapter: Path) -> tuple[str, str | None]:
    """Name or directory of an adapter's base, and its revision on the hub.

    Raises
    ------
    InputError
        If the adapter doesn't name its base.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on = read_base_description(adapter)
    name = config.get("base_model_name_or_path") or trained_on.get("name")
    if not name:
        raise InputError(f"{adapter / 'adapter_config.json'} names no base_model_name_or_path: give the base with --base DIR")
    # A path relative to where training was started; the description has the whole one.
    if not Path(name).is_dir() and Path(trained_on.get("path") or os.devnull).is_dir():
        name = trained_on["path"]
    return name, config.get("revision") or trained_on.get("revision")


def _misfits(model: Phi3VForCausalLM, adapter: Path) -> Iterator[tuple[str, int, int | str]]:
    """Modules of a base that an adapter's weights don't fit: name, features in the adapter, features in the base."""
    modules = dict(model.named_modules())
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            shape = file.get_slice(key).get_shape()
            module = modules.get(name)
            expected = shape[1] if part == "A.weight" else shape[0]
            found = "no such module" if module is None else module.in_features if part == "A.weight" else module.out_features
            if found != expected:
                yield name, expected, found
