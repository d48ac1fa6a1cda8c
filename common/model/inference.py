"""Load a model directory, a Hub model or an adapter for inference.

An adapter is loaded only on the base model that it was trained on, which ``base_model.json`` in its directory describes (see
:mod:`common.model.adapters`). Without that file, for example if the adapter was trained with other code, only the shapes of its
weights are checked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import BitsAndBytesConfig

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.runtime import InputError, read_json

from .adapters import BASE_DESCRIPTION, differences, read_base_description
from .checkpoint import (
    OPTIONAL_TEXT,
    Check,
    check_fields,
    fetch_checkpoint,
    first_line,
    is_positive,
    load_processor,
    load_weights,
    open_file,
)
from .loading import avoid_avx512_kernel

COPY_AGAIN = "copy the adapter's files again"


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_NULL: Check = ("null, since it is not supported", lambda value: value is None)
ADAPTER_FIELDS: dict[str, Check] = {
    "peft_type": ("LORA, the only type that is supported", lambda value: value == "LORA"),
    "base_model_name_or_path": OPTIONAL_TEXT,
    "revision": OPTIONAL_TEXT,
    "r": ("an integer from 1 to 4096", lambda value: type(value) is int and 1 <= value <= 4096),
    "lora_alpha": ("a number above 0", is_positive),
    "lora_dropout": ("from 0 to 1", lambda value: value == 0 or (is_positive(value) and value < 1)),
    "target_modules": ("a string or a list of strings", _is_names),
    "modules_to_save": ("a list of strings or null", lambda value: value is None or _is_names(value)),
    "layer_replication": _NULL,
    "megatron_config": _NULL,  # imports the module that it names
}


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
    if adapter is None and base is not None:
        raise InputError(f"{name_or_path} is not an adapter (adapter_config.json is missing): remove --base")
    if adapter is None:
        model = load_full(str(name_or_path), device, dtype)
        return model, load_processor(str(name_or_path))
    model = load_base(adapter, device, dtype, base)
    return attach_adapter(model, adapter), adapter_processor(adapter, model)


def inference_dtype(device: str | torch.device) -> torch.dtype:
    """Return the dtype for inference: bf16 on a GPU that supports it, fp16 on an older one, fp32 on a CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def find_adapter(name_or_path: str | Path) -> Path | None:
    """Return the directory of an adapter, downloaded from the Hub if necessary, or None if it is not an adapter.

    Raises
    ------
    InputError
        If the weights of the adapter are missing.
    """
    directory = Path(name_or_path)
    if not directory.is_dir():
        try:
            directory = Path(snapshot_download(str(name_or_path), allow_patterns=["adapter_*", "*.json", "*.jinja"]))
        except (OSError, ValueError):
            return None  # loading it as a full model reports the problem
    if not (directory / "adapter_config.json").exists():
        return None
    if not (directory / "adapter_model.safetensors").is_file():
        pickle = directory / "adapter_model.bin"
        hint = f" ({pickle.name} is not read: a pickle can run code; convert it to safetensors)" if pickle.exists() else ""
        raise InputError(f"adapter {name_or_path} is missing adapter_model.safetensors{hint}: {COPY_AGAIN}")
    path = directory / "adapter_config.json"
    check_fields(read_json(path, COPY_AGAIN), ADAPTER_FIELDS, path)
    return directory


def load_full(
    name_or_path: str,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    quantization: dict[str, Any] | None = None,
) -> Phi3VForCausalLM:
    """Load a full model in evaluation mode. ``quantization`` holds the fields of a ``BitsAndBytesConfig``.

    Raises
    ------
    InputError
        If the checkpoint is missing, incomplete, or not a Phi-3-V model.
    """
    fetch_checkpoint(name_or_path, None, revision)
    processor = load_processor(name_or_path, revision)
    dtype = dtype or inference_dtype(device)
    model = load_weights(
        name_or_path,
        processor,
        revision,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": torch.device(device)},
        quantization_config=_quantization(quantization, dtype) if quantization else None,
    )
    avoid_avx512_kernel(model)
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
    name, revision = (base, None) if base else find_base(adapter)
    try:
        model = load_full(name, device, dtype, revision, trained_on.get("quantization") if quantized else None)
    except InputError as error:
        raise InputError(
            f"adapter {adapter} requires its base model, {name}, which cannot be loaded: {first_line(error)}. "
            "If it is in another place, pass --base DIR"
        ) from None
    settings, weights = differences(adapter, name, revision)
    if settings or weights:
        what = f"different {settings}" if settings else "different weights"
        message = f"adapter {adapter} was trained on {trained_on['name']}, but {name} has {what}"
        if settings or not base:
            raise InputError(f"{message}: pass the right one with --base DIR")
        warnings.warn(f"{message}; its answers may be worse", stacklevel=2)
    return model


def attach_adapter(model: Phi3VForCausalLM, adapter: Path) -> PeftModel:
    """Load an adapter on its base model.

    Raises
    ------
    InputError
        If the shapes of the weights do not match, or the weights cannot be read.
    """
    path = adapter / "adapter_model.safetensors"
    files = open_file(path)
    if mismatch := next(_mismatches(model, files), None):
        module, expected, found = mismatch
        raise InputError(
            f"adapter {adapter} does not match {model.name_or_path}: its weights for {module} expect {expected} features, "
            f"but the base model has {found}; pass the model that it was trained on with --base DIR"
        )
    try:
        # By default, PEFT loads the adapter onto any GPU that it finds, even one that the model does not use.
        adapted = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device)).eval()
    except Exception as error:  # PEFT raises anything for a configuration that does not fit the weights
        raise InputError(f"adapter {adapter} cannot be loaded ({first_line(error)}): {COPY_AGAIN}") from error
    names = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # Embeddings that other code saved with the adapter are those of the base model.
    if different := sorted((names - files.keys()) | {name for name in files.keys() - names if ".lora_" in name}):
        raise InputError(f"{path} does not fit adapter_config.json, see {different[0]}: {COPY_AGAIN}")
    return adapted


def rewrites_base(model: PeftModel) -> bool:
    """Whether the adapter's initialization changed the base weights, so that disabling it does not restore the base model."""
    return any(
        str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq"))
        for config in model.peft_config.values()
        if hasattr(config, "init_lora_weights")
    )


def adapter_processor(adapter: Path, model: Phi3VForCausalLM) -> Phi3VProcessor:
    """Load the processor saved with an adapter, or that of its base model."""
    saved = all((adapter / name).is_file() for name in ("preprocessor_config.json", "tokenizer.json"))
    return load_processor(str(adapter if saved else model.name_or_path))


def find_base(adapter: Path) -> tuple[str, str | None]:
    """Return the name or directory of an adapter's base model, and its revision on the Hub.

    Raises
    ------
    InputError
        If the adapter does not name its base model.
    """
    config = read_json(adapter / "adapter_config.json", COPY_AGAIN)
    trained_on = read_base_description(adapter)
    name = config.get("base_model_name_or_path") or trained_on.get("name")
    if not name:
        raise InputError(
            f"{adapter / 'adapter_config.json'} has no base_model_name_or_path: pass the base model with --base DIR"
        )
    # The path may be relative to the directory where training was started. The description has the absolute path.
    if not Path(name).is_dir() and Path(trained_on.get("path") or os.devnull).is_dir():
        name = trained_on["path"]
    return name, config.get("revision") or trained_on.get("revision")


def _quantization(fields: dict[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    try:
        return BitsAndBytesConfig.from_dict(fields | {"bnb_4bit_compute_dtype": dtype})
    except Exception as error:  # raises anything
        raise InputError(f"{BASE_DESCRIPTION}: invalid quantization ({first_line(error)}): {COPY_AGAIN}") from error


def _mismatches(model: Phi3VForCausalLM, files: dict[str, Any]) -> Iterator[tuple[str, int, int | str]]:
    """Yield modules whose adapter weights do not match the base model: name, features in the adapter, features in the base."""
    modules = dict(model.named_modules())
    for key, file in files.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        shape = file.get_slice(key).get_shape()
        module = modules.get(name)
        expected = shape[part == "A.weight"] if len(shape) == 2 else 0
        found = getattr(module, "in_features" if part == "A.weight" else "out_features", "no such module")
        if found != expected:
            yield name, expected, found
