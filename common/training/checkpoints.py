"""Checkpoints: whether they are complete and undamaged, and whether a run can resume from them."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import CHANGEABLE, LORA_DEFAULTS, method_name
from common.data.conversations import pictures
from common.data.pictures import Picture
from common.data.samples import TrainingData
from common.data.streaming import StreamedData
from common.model.adapters import fingerprint
from common.model.checkpoint import find_snapshot
from common.runtime.collectives import gather, on_main_process
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
from common.runtime.process import InputError, counted, local_rank

from .deepspeed import zero_settings, zero_stage

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
        entries = read_json(directory / MANIFEST, "use an earlier checkpoint")
        if entries and all(isinstance(entry, int) for entry in entries.values()):
            return "written by an earlier version, without checksums, so that its files cannot be verified"
        expected = {directory / name: (int(size), str(digest)) for name, (size, digest) in entries.items()}
        names = [str(path.relative_to(directory)) for path in expected]  # fails for absolute ones
        if not expected or any(".." in path.parts for path in expected):
            return f"{MANIFEST} is corrupted"
        for (path, (size, _)), name in zip(expected.items(), names, strict=True):
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
    except (ValueError, TypeError, OverflowError, OSError):  # not JSON, or JSON of something else
        return f"{MANIFEST} is corrupted"
    if not checksums:
        return None
    try:
        with ThreadPoolExecutor(8) as threads:
            for name, (_, digest), found in zip(names, expected.values(), threads.map(checksum, expected), strict=True):
                if found != digest:
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


def rotate_checkpoints(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete old checkpoints next to the ``newest`` one, so that at most ``limit`` are left. The ``best`` one is kept too.

    Incomplete ones are deleted first, then those of later steps, which a run that resumed from an earlier step does not use.
    """
    if not limit:
        return
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    steps = {path: path.name.rpartition("-")[2] for path in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    order = {
        path: (why_incomplete(path, checksums=False) is None, int(step) < int(steps[newest]), int(step))
        for path, step in steps.items()
        if step.isdigit()
    }
    old = sorted((path for path in order if path.resolve() not in kept), key=lambda path: order[path])
    for path in old[: max(0, len(order) - limit)]:
        # Without its manifest, what is left of it if this is interrupted does not count as a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(
    wanted: str | None, output_dir: Path, identity: dict[str, Any], accepted: list[str]
) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from. It has to be complete on all nodes, which may not share a file system.

    Parameters
    ----------
    wanted : str, optional
        ``"auto"`` for the last complete checkpoint of this run in ``output_dir``, or the directory of a checkpoint.
    output_dir : Path
        The run directory.
    identity : dict
        The :func:`run_identity` of this run.
    accepted : list of str
        ``--accept_changes``

    Returns
    -------
    checkpoint : Path or None
        None if there is no checkpoint to resume from.
    skipped : list of str
        Names of checkpoints that are newer but incomplete or of another run, with the reason.

    Raises
    ------
    InputError
        If the given directory is not a complete checkpoint, or if there are only checkpoints of other runs.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        if reason := _incomplete_anywhere(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted} is not complete ({reason}); use auto or an earlier checkpoint")
        check_resumable(Path(wanted), identity, accepted)
        return Path(wanted), []
    skipped: list[str] = []
    refused = None
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step in sorted({int(step) for names in gather(steps) for step in names if step.isdigit()}, reverse=True):
        path = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        reason = _incomplete_anywhere(path)
        if reason is None:
            try:
                check_resumable(path, identity, accepted)
                return path, skipped
            except InputError as error:
                refused = refused or error
                reason = f"another run: {error}"
        skipped.append(f"{path.name} ({reason})")
    if refused:
        raise refused
    return None, skipped


def _incomplete_anywhere(directory: Path) -> str | None:
    # One process per node reads all files.
    own = why_incomplete(directory) if local_rank() == 0 else None
    return next((reason for reason in gather(own) if reason), None)


def run_identity(
    args: argparse.Namespace,
    deepspeed: str | None,
    num_processes: int,
    precision: str,
    revision: str | None,
    base: str | None = None,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """What makes a run this run, by name: all settings that change its course. Must be called on all processes."""
    names = ["batch_size", "seed", "num_crops", "optim", "learning_rate", "vision_learning_rate", "projector_learning_rate"]
    names += ["wd", "lr_scheduler_type", "warmup_steps", "streaming"]
    names += LORA_DEFAULTS if args.use_lora or args.use_qlora else []
    weights = on_main_process(lambda: fingerprint(find_snapshot(base or args.model_name_or_path, revision)))
    identity: dict[str, Any] = {
        "method": method_name(args),
        "base model (--model_name_or_path)": weights,
        "precision (--bf16)": precision,
        "sharding (--deepspeed)": "none",
    }
    stage = zero_stage(deepspeed)
    if deepspeed:
        # Another optimizer, which cannot read the states.
        offloads = "offload_optimizer" in zero_settings(deepspeed)
        identity["sharding (--deepspeed)"] = f"ZeRO-{stage}{' with offloading' if offloads else ''}"
    identity |= {f"--{name}": getattr(args, name) for name in names}
    if adapter:
        identity["adapter (--model_name_or_path)"] = on_main_process(lambda: fingerprint(adapter))
    if stage or args.streaming:  # each process has its own states, or its own part of the stream
        identity["number of processes"] = num_processes
    return identity


def data_fingerprint(data: TrainingData | StreamedData, count: int = 256) -> str:
    """Describe training data by the number of its rows and a checksum of some of them: texts, and names of pictures."""
    rows = data.rows.peek()
    sample = TrainingData(rows, data.to_conversation, data.processor, 0)
    digest = hashlib.sha256()
    for row in np.unique(np.linspace(0, len(rows) - 1, count).astype(int)).tolist():
        conversation = sample.conversation(0, row)
        turns = [{key: value for key, value in turn.items() if key != "images"} for turn in conversation["conversations"]]
        digest.update(json.dumps([turns, [_identify(picture) for picture in pictures(conversation)]]).encode())
    mixture = data.rows.mixture
    weights = f", --train_weights {' '.join(f'{weight:g}' for weight in mixture.weights)}" if mixture else ""
    return f"{len(data)} rows, {digest.hexdigest()[:16]}{weights}"


def _identify(picture: Picture) -> str:
    """Identify a picture by its file name, wherever that file is, or by its bytes."""
    if isinstance(picture, dict) and picture.get("bytes") is not None:
        return xxhash.xxh3_64(picture["bytes"]).hexdigest()
    if isinstance(picture, Image.Image):
        return str(picture.size)
    return Path(picture["path"] if isinstance(picture, dict) else picture).name


def check_resumable(checkpoint: Path, identity: dict[str, Any], accepted: list[str]) -> None:
    """Check that a complete checkpoint was saved by this run, whose :func:`run_identity`, or a part of it, is given.

    ``accepted`` are names of flags that may have changed.

    Raises
    ------
    InputError
        If a setting differs; the message names it.
    """
    place = f"--resume_from_checkpoint {checkpoint}"
    saved = read_totals(checkpoint)["settings"]
    for name, value in identity.items():
        flag = name.removeprefix("--")
        if saved.get(name) == value or flag in accepted:
            continue
        remedy = f", or accept the change with --accept_changes {flag}" if flag in CHANGEABLE else ""
        raise InputError(
            f"{name} is {value}, but the checkpoint's run had {saved.get(name)}: use the same value, or start a new run in "
            f"another --output_dir{remedy}",
            place,
        )


def check_plan(checkpoint: Path, plan: dict[str, Any], accepted: list[str]) -> str | None:
    """Check a plan (``data``, the :func:`data_fingerprint`, and ``steps``) as :func:`check_resumable`, but let a run be longer.

    Returns what is done about another number of steps, or None.
    """
    done = read_state(checkpoint).global_step
    now = plan["steps"]
    before = read_totals(checkpoint)["settings"].get("steps", now)
    if now < done:
        raise InputError(
            f"it has made {counted(done, 'step')}, more than the {now} of this run", f"--resume_from_checkpoint {checkpoint}"
        )
    check_resumable(checkpoint, plan, [*accepted, "steps"] if now > before else accepted)
    if now == before:
        return None
    return f"planned for {now:,} steps instead of {before:,}: the learning rate continues as in a run of {now:,} steps"
