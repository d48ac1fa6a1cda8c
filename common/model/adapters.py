"""Adapters on disk: finding, checking and loading one, and the description of its base model.

The description is saved next to the adapter as ``base_model.json``: name, revision, settings, fingerprint of the weights,
quantization.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict

from common.arguments import LORA_DEFAULTS, adapter_settings
from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.phi3v.parts import fully_trained_modules, lora_targets
from common.runtime.files import OBJECT, OPTIONAL_PATH, TEXT, Check, check_config, is_path, read_json, write_file
from common.runtime.process import InputError

from .checkpoint import find_snapshot
from .checks import BAD_VALUES, first_line, is_positive, open_file, open_tensors, read_config

BASE_DESCRIPTION = "base_model.json"
BASE_FIELDS: dict[str, Check] = {
    "name": ("a name or a path", is_path),
    "revision": OPTIONAL_PATH,
    "path": OPTIONAL_PATH,
    "settings": OBJECT,
    "weights": TEXT,
    "quantization": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
# Settings that names and shapes of the weights do not show.
COMPARED = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling")
COPY_AGAIN = "copy the adapter's files again"


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_NULL: Check = ("null, since it is not supported", lambda value: value is None)
ADAPTER_FIELDS: dict[str, Check] = {
    "peft_type": ("LORA, the only type that is supported", lambda value: value == "LORA"),
    "base_model_name_or_path": OPTIONAL_PATH,
    "revision": OPTIONAL_PATH,
    "r": ("an integer from 1 to 4096", lambda value: type(value) is int and 1 <= value <= 4096),
    "lora_alpha": ("a number above 0", is_positive),
    "lora_dropout": ("from 0 to 1", lambda value: value == 0 or (is_positive(value) and value < 1)),
    "target_modules": ("a string or a list of strings", _is_names),
    "modules_to_save": ("a list of strings or null", lambda value: value is None or _is_names(value)),
    "layer_replication": _NULL,
    "megatron_config": _NULL,  # imports the module that it names
}


def write_base_description(directory: Path, model: PeftModel) -> None:
    """Write ``base_model.json``, which identifies the base model of the adapter ``model``, to the adapter's directory."""
    base: Any = model.get_base_model()
    revision = model.peft_config["default"].revision
    name, snapshot = base.name_or_path, find_snapshot(base.name_or_path, revision)
    quantization = getattr(base.config, "quantization_config", None)
    description = {
        "name": name,
        "revision": revision,
        "path": str(snapshot) if Path(name).is_dir() else None,
        "settings": _settings(read_config(str(snapshot))),
        "weights": fingerprint(snapshot),
        "quantization": quantization.to_dict() if quantization is not None else None,
    }
    write_file(directory / BASE_DESCRIPTION, description)


def fingerprint(directory: Path) -> str:
    """SHA-256 over the first row of every matrix, and all vectors, of a checkpoint.

    It is computed in bf16, so that an fp32 copy has the same fingerprint. Only a small part of the weights is read, which takes
    less than a second.
    """
    digest = hashlib.sha256()
    files = open_tensors(directory)
    for name in sorted(files):
        tensor = files[name].get_slice(name)
        part = tensor[:] if len(tensor.get_shape()) == 1 else tensor[:1]
        digest.update(name.encode())
        digest.update(part.bfloat16().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_base_description(adapter: Path) -> dict[str, Any]:
    """Read ``base_model.json``; empty if the adapter has none, because it was trained with other code.

    Raises
    ------
    InputError
        If the file is broken.
    """
    path = adapter / BASE_DESCRIPTION
    if not path.exists():
        return {}
    remedy = "copy it again, or delete it to skip its checks"
    description = read_json(path, remedy)
    check_config(description, BASE_FIELDS, path, remedy, required=True)
    return description


def base_fault(directory: Path, name: str, revision: str | None) -> tuple[str, bool]:
    """Compare a base model, which has been downloaded, with the one that the adapter in ``directory`` was trained on.

    Returns what differs, and whether only the weights differ; an empty text if nothing does, or if the adapter has no
    ``base_model.json``.
    """
    trained_on = read_base_description(directory)
    if not trained_on:
        return "", False
    found, expected = _settings(read_config(name, revision)), trained_on["settings"]
    settings = ", ".join(key for key in COMPARED if found[key] != expected.get(key))
    if not settings and trained_on["weights"] == fingerprint(find_snapshot(name, revision)):
        return "", False
    what = f"different {settings}" if settings else "different weights"
    return f"adapter {directory} was trained on {trained_on['name']}, but {name} has {what}", not settings


def adapter_to_continue(args: argparse.Namespace) -> Path | None:
    """Return the adapter that is to be trained further, if ``--model_name_or_path`` is the directory of one.

    Raises
    ------
    InputError
        If the adapter is invalid, or a flag does not fit it.
    """
    directory = Path(args.model_name_or_path)
    if not (directory / "adapter_config.json").is_file() or (directory / "config.json").is_file():
        return None
    place = f"--model_name_or_path {directory}"
    if not (args.use_lora or args.use_qlora):
        raise InputError(
            f"{place} is an adapter: merge it into its base model first (python -m tools.merge_lora --adapter {directory} "
            "--output_dir MERGED), and pass that directory, or add --use_lora to train the adapter further"
        )
    find_adapter(directory)
    settings = adapter_settings(args.model_name_or_path)
    for name in (*LORA_DEFAULTS, "train_fully", "freeze_vision_model"):
        if (value := getattr(args, name)) != settings.get(name):
            kept = f"the adapter was trained with {settings.get(name)}, which cannot change: remove the flag"
            raise InputError(f"{kept}, or train a new adapter on the merged model", f"--{name} {value}")
    if missing := [name for name in ("preprocessor_config.json", "tokenizer.json") if not (directory / name).is_file()]:
        raise InputError(f"{place} is missing {missing[0]}: copy the files of the processor from its base model")
    if bool(quantized := read_base_description(directory).get("quantization")) != args.use_qlora:
        right, base = ("--use_qlora", "a 4-bit") if quantized else ("--use_lora", "an unquantized")
        raise InputError(f"the adapter was trained on {base} base: use {right}", place)
    return directory


def check_targets(directory: Path, config: Phi3VConfig, vision: bool, train_fully: tuple[str, ...]) -> None:
    """Check that an adapter that is to be trained further changes the same modules as a new one would.

    ``vision`` tells whether a new one would change the vision tower and the projector.

    Raises
    ------
    InputError
        If it does not, because it was trained with other code.
    """
    adapter = read_json(directory / "adapter_config.json", COPY_AGAIN)
    targets = lora_targets(config, vision)
    found = (adapter["target_modules"], set(adapter.get("modules_to_save") or ()))
    if found != (targets, set(fully_trained_modules(config, train_fully))):
        raise InputError(
            "the adapter was trained with other code, and changes other modules: merge it, and train a new adapter",
            f"--model_name_or_path {directory}",
        )


def _settings(config: Phi3VConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {key: values.get(key) for key in COMPARED}


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
    check_config(read_json(path, COPY_AGAIN), ADAPTER_FIELDS, path)
    return directory


def find_base(adapter: Path, base: str | None = None) -> tuple[str, str | None]:
    """Return the name or directory of an adapter's base model, and its revision on the Hub; ``base`` replaces the saved name.

    Raises
    ------
    InputError
        If the adapter does not name its base model.
    """
    if base:
        return base, None
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


def attach_adapter(model: Phi3VForCausalLM, adapter: Path, trainable: bool = False) -> PeftModel:
    """Load an adapter on its base model, in evaluation mode unless it is ``trainable``.

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
        device = str(model.device)
        adapted = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, torch_device=device).train(trainable)
    except torch.OutOfMemoryError:
        raise
    except (*BAD_VALUES, RuntimeError) as error:  # RuntimeError for weights of another shape, as load_state_dict
        raise InputError(f"adapter {adapter} cannot be loaded ({first_line(error)}): {COPY_AGAIN}") from error
    names = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    # Embeddings that other code saved with the adapter are those of the base model.
    if different := sorted((names - files.keys()) | {name for name in files.keys() - names if ".lora_" in name}):
        raise InputError(f"{path} does not fit adapter_config.json, see {different[0]}: {COPY_AGAIN}")
    return adapted


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
