"""Checkpoints: their files, whether they are complete and undamaged, and which are deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.runtime.files import (
    COUNT,
    NUMBER,
    OBJECT,
    OBJECTS,
    OPTIONAL_PATH,
    Check,
    check_config,
    is_number,
    read_json,
    replacing,
)
from common.runtime.process import InputError

# Written last, after every process has written its part: size and checksum of every file.
MANIFEST = "complete.json"
TOTALS = "totals.json"
EARLIER = "use an earlier checkpoint"


def _has_counters(callbacks: Any) -> bool:
    """Whether the state of early stopping, if there is one, has its counter."""
    if not isinstance(callbacks, dict) or "EarlyStopping" not in callbacks:
        return isinstance(callbacks, dict)
    try:
        return type(callbacks["EarlyStopping"]["attributes"]["early_stopping_patience_counter"]) is int
    except (TypeError, LookupError):
        return False


TOTALS_FIELDS: dict[str, Check] = {
    "loss": NUMBER,
    "running_loss": ("a list of numbers", lambda value: isinstance(value, list) and value != [] and all(map(is_number, value))),
    "settings": OBJECT,
    "last_logged": COUNT,
    "seconds": ("a finite number", lambda value: is_number(value) and abs(value) < 2**63),
    "evaluation_due": ("true or false", lambda value: isinstance(value, bool)),
}
SETTINGS_FIELDS: dict[str, Check] = {
    "steps": COUNT,
    "max_tokens_per_batch": ("an integer or null", lambda value: value is None or type(value) is int),
}
STATE_FIELDS: dict[str, Check] = {
    **dict.fromkeys(("global_step", "max_steps", "train_batch_size", "num_train_epochs", "num_input_tokens_seen"), COUNT),
    "epoch": NUMBER,
    "total_flos": ("a number", lambda value: type(value) in (int, float)),
    "best_metric": ("a number or null", lambda value: value is None or is_number(value)),
    "best_global_step": ("an integer or null", lambda value: value is None or type(value) is int),
    "best_model_checkpoint": OPTIONAL_PATH,
    "log_history": OBJECTS,
    "stateful_callbacks": ("the states of the callbacks", _has_counters),
}


def write_manifest(directory: Path) -> None:
    """Mark a checkpoint as complete by recording the size and the checksum of its files. The file is written atomically."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST]
    with ThreadPoolExecutor(8) as threads:
        checksums = list(threads.map(partial(checksum, flush=True), files))
    entries = {
        str(path.relative_to(directory)): [path.stat().st_size, found] for path, found in zip(files, checksums, strict=True)
    }
    for folder in {path.parent for path in files} | {directory.parent}:
        _flush_directory(folder)
    with replacing(directory / MANIFEST) as temporary, temporary.open("w") as file:
        json.dump(entries, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _flush_directory(directory)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush directories
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path, flush: bool = False) -> str:
    """XXH3 (64 bits) of a file, which is computed faster than a disk reads. ``flush`` writes the file to the disk before."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def why_incomplete(directory: Path, checksums: bool = True) -> str | None:
    """Return why a checkpoint is incomplete or damaged, or None if it is neither. Computing the checksums reads all files."""
    if not directory.is_dir():
        return "no such directory"
    if not (directory / MANIFEST).exists():
        return "saving was interrupted"
    try:
        entries = read_json(directory / MANIFEST, EARLIER)
        if not entries or any(Path(name).is_absolute() or ".." in Path(name).parts for name in entries):
            return f"{MANIFEST} is corrupted"
        for name, (size, _) in entries.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
    except (ValueError, TypeError, OSError):  # not JSON, or JSON of something else
        return f"{MANIFEST} is corrupted"
    if not checksums:
        return None
    try:
        with ThreadPoolExecutor(8) as threads:
            found = threads.map(checksum, [directory / name for name in entries])
            for (name, (_, expected)), digest in zip(entries.items(), found, strict=True):
                if digest != expected:
                    return f"{name} is damaged"
        read_state(directory)
        read_totals(directory)
    except (OSError, InputError) as error:
        return str(error)
    return None


def read_state(checkpoint: Path) -> TrainerState:
    """Read ``trainer_state.json``.

    Raises
    ------
    InputError
        If it is missing, or not what the Trainer writes.
    """
    path = checkpoint / TRAINER_STATE_NAME
    content = read_json(path, EARLIER)
    check_config(content, STATE_FIELDS, path, EARLIER, required=True)
    try:
        return TrainerState(**content)
    except TypeError as error:  # an unknown key
        raise InputError(f"{error}: {EARLIER}", str(path)) from None


def read_totals(checkpoint: Path) -> dict[str, Any]:
    """Read ``totals.json``, as :func:`read_state`."""
    path = checkpoint / TOTALS
    content = read_json(path, EARLIER)
    check_config(content, TOTALS_FIELDS, path, EARLIER, required=True)
    check_config(content["settings"], SETTINGS_FIELDS, path, EARLIER)
    return content


def checkpoint_of_step(output_dir: Path, step: int) -> Path:
    """Return the directory in which transformers saves the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def steps_of_checkpoints(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in an output directory, complete or not."""
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted({int(step) for step in steps if step.isdecimal()})


def rotate_checkpoints(output_dir: Path, newest: int, limit: int | None, best: str | None) -> None:
    """Delete old checkpoints, so that at most ``limit`` are left. That of step ``newest`` and the ``best`` one are kept.

    Incomplete ones are deleted first, then those of later steps, which a run that resumed from an earlier step does not use.
    """
    if not limit:
        return

    def order(step: int) -> tuple[bool, bool, int]:
        complete = why_incomplete(checkpoint_of_step(output_dir, step), checksums=False) is None
        return complete, step < newest, step

    paths = [checkpoint_of_step(output_dir, step) for step in sorted(steps_of_checkpoints(output_dir), key=order)]
    kept = {checkpoint_of_step(output_dir, newest).resolve()} | ({Path(best).resolve()} if best else set())
    old = [path for path in paths if path.resolve() not in kept]
    for path in old[: max(0, len(paths) - limit)]:
        # Without its manifest, what is left of it if this is interrupted does not count as a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
