"""Checkpoints that are skipped unless they are complete, and runs that stop cleanly on SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from common.arguments import method_name, uses_adapters
from common.runtime import InputError, gather, read_json, replacing, sum_over_processes

# Written last, after every process has written its part: the names and sizes of all files.
MANIFEST = "complete.json"
TOTALS = "totals.json"
# Error texts of a full disk: Python, safetensors and tokenizers quote the operating system, torch does not.
DISK_FULL = (*(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "inline_container.cc")


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Report a full disk as an :class:`InputError` which says that earlier checkpoints are intact.

    Raises
    ------
    InputError
        If the disk is full. All other errors are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        if not any(text in str(error) for text in DISK_FULL):
            raise
        raise InputError(
            f"saving failed ({error}): free disk space and restart with --resume_from_checkpoint auto; "
            "earlier checkpoints are intact"
        ) from error


def write_manifest(directory: Path) -> None:
    """Mark a checkpoint as complete by recording its files and their sizes. The file is written atomically."""
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
    sizes.pop(MANIFEST, None)
    with replacing(directory / MANIFEST) as temporary, temporary.open("w") as file:
        json.dump(sizes, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def why_incomplete(directory: Path) -> str | None:
    """Return why a checkpoint is incomplete, or None if it is complete."""
    if not directory.is_dir():
        return "no such directory"
    try:
        sizes = read_json(directory / MANIFEST, "use an earlier checkpoint")
    except InputError:
        return f"{MANIFEST} is corrupted" if (directory / MANIFEST).exists() else "saving was interrupted"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    return None


def find_checkpoint(wanted: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from. It has to be complete on all nodes, which may not share a file system.

    Parameters
    ----------
    wanted : str, optional
        ``"auto"`` for the last complete checkpoint in ``output_dir``, or the directory of a checkpoint.
    output_dir : Path
        The run directory.

    Returns
    -------
    checkpoint : Path or None
        None if there is no checkpoint to resume from.
    skipped : list of str
        Names of incomplete checkpoints, with the reason.

    Raises
    ------
    InputError
        If the given directory is not a complete checkpoint.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        if reason := _incomplete_anywhere(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted} is not complete ({reason}); use auto or an earlier checkpoint")
        return Path(wanted), []
    skipped = []
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step in sorted({int(step) for names in gather(steps) for step in names if step.isdigit()}, reverse=True):
        path = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        reason = _incomplete_anywhere(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path.name} ({reason})")
    return None, skipped


def _incomplete_anywhere(directory: Path) -> str | None:
    return next((reason for reason in gather(why_incomplete(directory)) if reason), None)


class StopOnSignal(TrainerCallback):
    """After SIGTERM on any process, save a complete checkpoint at the end of the step and stop all processes."""

    def __init__(self) -> None:
        self.received = False
        self.stopped = False
        self.evaluation_due = False

    def _receive(self, *_: Any) -> None:
        self.received = True

    def _received_anywhere(self) -> bool:
        return bool(sum_over_processes(torch.tensor(int(self.received), device=PartialState().device)))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Install the signal handler."""
        self._previous_handler = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop if any process has received SIGTERM."""
        if self._received_anywhere():
            self.stopped = True
            ends_epoch = state.epoch.is_integer() or state.global_step >= state.max_steps
            # There may be no time left for an evaluation. The resumed run does it instead.
            self.evaluation_due = control.should_evaluate or (args.eval_strategy == "epoch" and ends_epoch)
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Skip evaluation and saving at the end of the epoch: the checkpoint of this step is already saved."""
        if self.stopped:
            control.should_evaluate = control.should_save = False
        return control

    def end(self) -> bool:
        """Restore the previous handler; return whether any process has received SIGTERM since training began."""
        received = self._received_anywhere()
        signal.signal(signal.SIGTERM, self._previous_handler)
        return received


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping whose patience counter is restored on resume. A run that had already stopped early stops again."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Restore the counter, but not the patience, from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        return control


def run_settings(args: argparse.Namespace, zero_stage: int | None, num_processes: int) -> dict[str, Any]:
    """Settings, by name, that must not change on resume, because weights, optimizer states or rows would no longer match."""
    settings = {
        "method": method_name(args),
        "optimizer (--optim)": args.optim,
        "sharding (--deepspeed)": "none" if zero_stage is None else f"ZeRO-{zero_stage}",
        "--batch_size": args.batch_size,
    }
    if uses_adapters(args):
        settings["--lora_rank"] = args.lora_rank
    if zero_stage or args.streaming:  # each process has its own states, or its own part of the stream
        settings["number of processes"] = num_processes
    return settings


def check_resumable(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Check that a run can resume exactly from a checkpoint.

    Parameters
    ----------
    checkpoint : Path
        A complete checkpoint.
    settings : dict
        The :func:`run_settings` of this run.

    Raises
    ------
    InputError
        If a setting differs from that of the checkpoint's run; the message names it.
    """
    path = checkpoint / TOTALS
    saved = read_json(path, "use an earlier checkpoint").get("settings", settings) if path.is_file() else settings
    for name in saved | settings:
        if saved.get(name) != settings.get(name):
            raise InputError(
                f"{name} is {settings.get(name)}, but the checkpoint's run had "
                f"{saved.get(name)}: use the same value, or start a new run in another --output_dir",
                f"--resume_from_checkpoint {checkpoint}",
            )
