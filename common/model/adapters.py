"""The description of an adapter's base model.

It is saved next to the adapter as ``base_model.json``: name, revision, main settings, fingerprint of the weights, quantization.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from common.phi3v import Phi3VConfig
from common.runtime import read_json, write_file

from .checkpoint import find_snapshot, open_tensors

BASE_DESCRIPTION = "base_model.json"
COMPARED_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "vision_config",
)


def write_base_description(directory: Path, model: PeftModel) -> None:
    """Write ``base_model.json``, which identifies an adapter's base model, next to the adapter.

    Parameters
    ----------
    directory : Path
        Directory of the adapter.
    model : PeftModel
        The adapter on its base model, which was loaded from a directory or from the Hub.
    """
    base, revision = model.get_base_model(), model.peft_config["default"].revision
    name, snapshot = base.name_or_path, find_snapshot(base.name_or_path, revision)
    quantization = getattr(base.config, "quantization_config", None)
    description = {
        "name": name,
        "revision": revision,
        "path": str(snapshot) if Path(name).is_dir() else None,
        "settings": _settings(AutoConfig.from_pretrained(snapshot)),
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
    path = adapter / BASE_DESCRIPTION
    return read_json(path, "copy it again, or delete it to skip its checks") if path.is_file() else {}


def _settings(config: Phi3VConfig) -> dict[str, Any]:
    values = config.to_dict() | {"vision_config": config.vision_config.to_dict()}
    settings = {key: values.get(key) for key in COMPARED_SETTINGS}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    settings["vision_config"] = {key: values["vision_config"][key] for key in sizes}
    return settings


def compare_settings(name: str, revision: str | None, trained_on: dict[str, Any]) -> str:
    """Describe how the configuration of a base model differs from the one that an adapter was trained on; empty if equal."""
    if not trained_on:
        return ""
    found = _settings(AutoConfig.from_pretrained(name, revision=revision or "main"))
    differences = []
    for key, expected in trained_on["settings"].items():
        if found[key] != expected:
            scalar = not isinstance(expected, dict)
            differences.append(f"{key} {found[key]}, expected {expected}" if scalar else f"different {key}")
    return "; ".join(differences)
