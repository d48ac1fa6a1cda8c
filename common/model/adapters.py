"""The description of an adapter's base model.

It is saved next to the adapter as ``base_model.json``: name, revision, settings, fingerprint of the weights, quantization.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from common.phi3v import Phi3VConfig
from common.runtime import InputError, read_json, write_file

from .checkpoint import OPTIONAL_TEXT, TEXT, Check, check_fields, find_snapshot, open_tensors, read_config

BASE_DESCRIPTION = "base_model.json"
BASE_FIELDS: dict[str, Check] = {
    "name": TEXT,
    "revision": OPTIONAL_TEXT,
    "path": OPTIONAL_TEXT,
    "settings": ("an object", lambda value: isinstance(value, dict)),
    "weights": TEXT,
    "quantization": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
# Settings that names and shapes of the weights do not show.
COMPARED = ("num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling")


def write_base_description(directory: Path, model: PeftModel) -> None:
    """Write ``base_model.json``, which identifies an adapter's base model, next to the adapter.

    Parameters
    ----------
    directory : Path
        Directory of the adapter.
    model : PeftModel
        The adapter on its base model, which was loaded from a directory or from the Hub.
    """
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
    description = read_json(path, "copy it again, or delete it to skip its checks")
    if missing := [key for key in BASE_FIELDS if key not in description]:
        raise InputError(f"{path} has no {missing[0]}: copy it again, or delete it to skip its checks")
    check_fields(description, BASE_FIELDS, path)
    return description


def differences(directory: Path, name: str, revision: str | None) -> tuple[str, bool]:
    """Compare a base model with the one that an adapter was trained on.

    Parameters
    ----------
    directory : Path
        Directory of the adapter.
    name : str
        Directory or Hub id of the base model, which has been downloaded.
    revision : str, optional
        Its commit.

    Returns
    -------
    settings : str
        Names of the settings that differ; empty if none does, or if the adapter has no ``base_model.json``.
    weights : bool
        Whether the weights differ.
    """
    trained_on = read_base_description(directory)
    if not trained_on:
        return "", False
    found, expected = _settings(read_config(name, revision)), trained_on["settings"]
    differing = ", ".join(key for key in COMPARED if found[key] != expected.get(key))
    return differing, trained_on["weights"] != fingerprint(find_snapshot(name, revision))


def _settings(config: Phi3VConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {key: values.get(key) for key in COMPARED}
