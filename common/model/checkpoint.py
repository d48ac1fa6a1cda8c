"""Find, download and check a checkpoint, on disk or on the Hub, before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import AutoConfig

from common.phi3v import Phi3VProcessor
from common.runtime import InputError, read_json, say

COPY_AGAIN = "copy the checkpoint's files to this directory again"


def fetch_checkpoint(name_or_path: str, flag: str = "--model_name_or_path") -> str | None:
    """Check a model and, if it is on the Hub, download all of it, so that later commits on the Hub do not affect the run.

    Returns
    -------
    str or None
        The downloaded commit; None for a directory.

    Raises
    ------
    InputError
        As :func:`check_checkpoint`.
    """
    check_checkpoint(name_or_path, flag)
    revision = base_revision(name_or_path)
    if not Path(name_or_path).is_dir():
        try:
            patterns = ["*.json", "*.jinja", "*.safetensors"]
            check_checkpoint(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns), flag)
        except (OSError, HfHubHTTPError) as error:
            raise InputError(f"{flag} {name_or_path} cannot be downloaded ({first_line(error)}): try again") from None
    return revision


def check_checkpoint(name_or_path: str, flag: str | None = None) -> None:
    """Check that a model exists, is a Phi-3-V model, and has all files that are required to load it.

    Parameters
    ----------
    name_or_path : str
        Directory or Hub id.
    flag : str, optional
        The flag that gave it, for messages.

    Raises
    ------
    InputError
        The message names what is missing and how to fix it.
    """
    directory = Path(name_or_path)
    place = f"{flag} {name_or_path}" if flag else name_or_path
    model_type = None
    if not directory.is_dir():
        looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
        if looks_local:
            raise InputError("no such directory, and not a Hub id", place)
        say(f"Downloading {name_or_path} from the Hub, or using the cached files")
        try:
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        except ValueError as error:  # unknown model type, or one that requires code from the checkpoint
            raise InputError(
                f"{place} is not a phi3_v checkpoint; these recipes support only "
                f"Phi-3-vision and Phi-3.5-vision: {first_line(error)}"
            ) from None
        except OSError as error:
            raise InputError(
                "no such directory, and the Hub cannot be reached or has no "
                f"such model ({first_line(error)}); download it on a machine with access (hf download) and pass its directory",
                place,
            ) from None
        model_type = config.model_type
    elif (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise InputError(
            f"{place} is an adapter: merge it into its base model first "
            f"(python -m tools.merge_lora --adapter {name_or_path} --output_dir MERGED), and pass that directory"
        )
    else:
        needed = ["config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
        missing = [name for name in needed if not (directory / name).is_file()]
        if "tokenizer_config.json" not in missing and not _has_chat_template(directory):
            missing.append("chat_template.jinja")
        if "config.json" not in missing:
            model_type = read_json(directory / "config.json", COPY_AGAIN).get("model_type")
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            shards = _shards(index)
            missing += [shard for shard in shards if not (directory / shard).is_file()]
        elif not (directory / "model.safetensors").is_file():
            missing.append("model.safetensors (or model.safetensors.index.json and its shards)")
        if missing and model_type in ("phi3_v", None):
            raise InputError(f"{place} is missing {', '.join(missing)}: {COPY_AGAIN}")
    if model_type != "phi3_v":
        raise InputError(
            f"{place} is a {model_type} checkpoint, expected phi3_v; these recipes support only Phi-3-vision and Phi-3.5-vision"
        )
    if directory.is_dir():
        try:
            AutoConfig.from_pretrained(directory)
        except (ValueError, TypeError) as error:
            raise InputError(f"{first_line(error)}: {COPY_AGAIN}", str(directory / "config.json")) from None


def load_processor(name_or_path: str, revision: str | None = None, num_crops: int | None = None) -> Phi3VProcessor:
    """Load the processor saved with a model or adapter.

    Parameters
    ----------
    name_or_path : str
        Directory or Hub id.
    revision : str, optional
        Commit of a Hub model. Default: the latest.
    num_crops : int, optional
        Maximum number of crops per image. Default: the saved value.

    Raises
    ------
    InputError
        If a file of the processor cannot be read.
    """
    options = {} if num_crops is None else {"num_crops": num_crops}
    try:
        return Phi3VProcessor.from_pretrained(name_or_path, revision=revision or "main", **options)
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            f"the tokenizer or image processor files cannot be read ({first_line(error)}): {COPY_AGAIN}",
            name_or_path,
        ) from error


def base_revision(name_or_path: str) -> str | None:
    """Return the commit of a Hub model that was downloaded last, or None for a directory."""
    directory = find_snapshot(name_or_path)
    return directory.name if directory.parent.name == "snapshots" else None


def find_snapshot(name_or_path: str, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint; for a Hub id the local copy, even if the Hub has a newer commit."""
    directory = Path(name_or_path)
    if directory.is_dir():
        return directory.resolve()
    return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))


def read_tensors(directory: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read some tensors of a checkpoint, with the dtype that they have on disk."""
    files = open_tensors(directory)
    return {name: files[name].get_tensor(name) for name in names}


def open_tensors(directory: Path) -> dict[str, Any]:
    """Open the files of a checkpoint; return the open file for each tensor name."""
    files: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        files |= dict.fromkeys(file.keys(), file)
    return files


def _shards(index: Path) -> list[str]:
    files = read_json(index, COPY_AGAIN).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{index} is not a valid weight index: {COPY_AGAIN}")
    return sorted(set(files.values()))


def _has_chat_template(directory: Path) -> bool:
    """Whether there is a chat template, in a separate file or, as published, in the tokenizer configuration."""
    if (directory / "chat_template.jinja").is_file():
        return True
    return "chat_template" in read_json(directory / "tokenizer_config.json", COPY_AGAIN)


def first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0]
