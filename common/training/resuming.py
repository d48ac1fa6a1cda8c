"""Resuming a run: what makes it the same run, which of its checkpoints to use, and which one was the best."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image
from transformers import TrainerState

from common.arguments import CHANGEABLE, LORA_DEFAULTS, method_name
from common.data.conversations import pictures
from common.data.pictures import Picture
from common.data.samples import TrainingData
from common.data.streaming import StreamedData
from common.model.adapters import fingerprint
from common.model.checkpoint import find_snapshot
from common.runtime.collectives import gather, on_main_process
from common.runtime.process import InputError, counted, local_rank, say

from .checkpoints import checkpoint_of_step, read_state, read_totals, steps_of_checkpoints, why_incomplete
from .deepspeed import zero_settings


def run_identity(
    args: argparse.Namespace,
    base: str,
    revision: str | None,
    adapter: Path | None,
    deepspeed: str | None,
    precision: str,
    num_processes: int,
) -> dict[str, Any]:
    """Return the settings that must be the same to resume, by name. Must be called on all processes."""
    names = ["batch_size", "seed", "num_crops", "optim", "learning_rate", "vision_learning_rate", "projector_learning_rate"]
    names += ["wd", "lr_scheduler_type", "warmup_steps", "streaming"]
    names += LORA_DEFAULTS if args.use_lora or args.use_qlora else []
    identity: dict[str, Any] = {
        "method": method_name(args),
        "base model (--model_name_or_path)": on_main_process(lambda: fingerprint(find_snapshot(base, revision))),
        "precision (--bf16)": precision,
        "sharding (--deepspeed)": "none",
    }
    if deepspeed:
        zero = zero_settings(deepspeed)
        # The optimizer for offloaded states is another one, which cannot read the states.
        offloads = " with offloading" if "offload_optimizer" in zero else ""
        identity["sharding (--deepspeed)"] = f"ZeRO-{zero.get('stage', 0)}{offloads}"
    identity |= {f"--{name}": getattr(args, name) for name in names}
    if adapter:
        identity["adapter (--model_name_or_path)"] = on_main_process(lambda: fingerprint(adapter))
    if deepspeed or args.streaming:  # each process has its own states, or its own part of the stream
        identity["number of processes"] = num_processes
    return identity


def data_fingerprint(data: TrainingData | StreamedData, count: int = 256) -> str:
    """Describe training data by the number of its rows and a checksum of them: texts, and names of pictures.

    Conversations of ``count`` rows are included, since they depend on flags; of streamed rows, only those of the first ones.
    Must be called on all processes.
    """
    rows = data.rows.peek()
    sample = TrainingData(rows, data.to_conversation, data.processor, 0)
    digest = hashlib.sha256()
    if contents := data.rows.contents:
        indices, hashes = contents.rows[:, 0].view(np.uint64), contents.rows[:, 4].view(np.uint64)
        checksum = sum(gather(int(np.sum((2 * indices + 1) * hashes)))) % 2**64  # the same for any number of processes
        digest.update(str(checksum).encode())
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
    saved = read_totals(checkpoint)["settings"]
    for name, value in identity.items():
        flag = name.removeprefix("--")
        if saved.get(name) == value or flag in accepted:
            continue
        remedy = f", or accept the change with --accept_changes {flag}" if flag in CHANGEABLE else ""
        raise InputError(
            f"{name} is {value}, but the checkpoint's run had {saved.get(name)}: use the same value, or start a new run in "
            f"another --output_dir{remedy}",
            f"--resume_from_checkpoint {checkpoint}",
        )


def check_plan(checkpoint: Path, plan: dict[str, Any], accepted: list[str]) -> str | None:
    """Check that the data and the number of steps are those of the checkpoint; more steps are allowed.

    ``plan`` has the entries ``data``, the :func:`data_fingerprint`, and ``steps``. Returns a message if the number of steps has
    changed, else None.
    """
    done, steps = read_state(checkpoint).global_step, plan["steps"]
    before = read_totals(checkpoint)["settings"].get("steps", steps)
    if steps < done:
        raise InputError(
            f"the checkpoint is at step {done:,}, but this run has only {counted(steps, 'step')}: increase --num_train_epochs "
            "or --max_steps, or use another --output_dir",
            f"--resume_from_checkpoint {checkpoint}",
        )
    check_resumable(checkpoint, plan, [*accepted, "steps"] if steps > before else accepted)
    if steps == before:
        return None
    return f"planned for {steps:,} steps instead of {before:,}: the learning rate continues as in a run of {steps:,} steps"


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
    steps = {step for found in gather(steps_of_checkpoints(output_dir)) for step in found}
    for step in sorted(steps, reverse=True):
        path = checkpoint_of_step(output_dir, step)
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


def find_best_checkpoint(state: TrainerState, metric: str | None, checkpoint: Path) -> None:
    """Set the best checkpoint so far in the state of a run that resumes from ``checkpoint``, and may have been moved.

    ``metric`` is the one by which checkpoints are compared now, if they are.
    """
    best = read_state(checkpoint).best_model_checkpoint  # the Trainer has dropped one that was moved
    if not metric or not best:
        state.best_metric = None
        return
    found = [entry.get(metric) for entry in state.log_history if entry.get("step") == state.best_global_step]
    places = [place for place in (checkpoint.parent / Path(best).name, Path(best)) if place.is_dir()]
    if state.best_metric in found and places:
        state.best_model_checkpoint = str(places[0])
    else:
        say(f"warning: {best} is missing, or was not the best by {metric}: the best of the next checkpoints will be loaded")
        state.best_model_checkpoint = state.best_global_step = state.best_metric = None
