"""Checkpoints that are either complete or passed over, and runs that can be told to stop."""

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
from common.runtime import InputError, gather, replacing, sum_over_processes

# Written last, once every process has written its part: the names and sizes of all files.
MANIFEST = "complete.json"
TOTALS = "totals.json"
# What is said of a disk without room: by Python, safetensors and tokenizers in the system's words, by torch in its own.
NO_ROOM = (*(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "inline_container.cc")


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Say clearly that the disk has no room, and that nothing saved before is lost.

    Raises
    ------
    InputError
        In place of what a full disk makes the libraries raise; what else goes wrong passes as it is.
    """
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        raise InputError(
            f"saving failed ({error}): make room on the disk and start again with --resume_from_checkpoint auto; "
            "earlier checkpoints are intact"
        ) from error


def write_manifest(directory: Path) -> None:
    """Declare a checkpoint complete: record its files and their sizes, whole or not at all."""
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()}
    sizes.pop(MANIFEST, None)
    with replacing(directory / MANIFEST) as temporary, temporary.open("w") as file:
        json.dump(sizes, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def why_incomplete(directory: Path) -> str | None:
    """Say what a checkpoint lacks, or None if it is complete."""
    if not directory.is_dir():
        return "there is no such directory"
    try:
        sizes = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return "saving it was cut short"
    except ValueError:  # no JSON, or not even text
        return f"{MANIFEST} is damaged"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def find_checkpoint(wanted: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to go on from: one that is complete on all machines, which may have disks of their own.

    Parameters
    ----------
    wanted : str, optional
        ``"auto"`` for the last complete one in ``output_dir``, or a checkpoint's directory.
    output_dir : Path
        The run's directory.

    Returns
    -------
    checkpoint : Path or None
        None if there is none to go on from.
    passed_over : list of str
        What was torn, and why.

    Raises
    ------
    InputError
        If a directory was named that is no complete checkpoint.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        if reason := _incomplete_anywhere(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint {wanted} is not complete ({reason}); use auto, or an earlier one")
        return Path(wanted), []
    passed_over = []
    steps = [path.name.rpartition("-")[2] for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for step in sorted({int(step) for names in gather(steps) for step in names if step.isdigit()}, reverse=True):
        path = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        reason = _incomplete_anywhere(path)
        if reason is None:
            return path, passed_over
        passed_over.append(f"{path.name} ({reason})")
    return None, passed_over


def _incomplete_anywhere(directory: Path) -> str | None:
    return next((reason for reason in gather(why_incomplete(directory)) if reason), None)


class StopOnSignal(TrainerCallback):
    """After SIGTERM on any process, save a complete checkpoint at the end of the step and stop, on all of them."""

    def __init__(self) -> None:
        self.received = False
        self.stopped = False
        self.evaluation_due = False

    def _receive(self, *_: Any) -> None:
        self.received = True

    def _agree(self) -> bool:
        return bool(sum_over_processes(torch.tensor(int(self.received), device=PartialState().device)))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Listen."""
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Agree with the other processes whether to stop."""
        if self._agree():
            self.stopped = True
            ends_epoch = state.epoch.is_integer() or state.global_step >= state.max_steps
            # There may be no time for an evaluation: the run that goes on makes up for it.
            self.evaluation_due = control.should_evaluate or (args.eval_strategy == "epoch" and ends_epoch)
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leave out what is due at an epoch's end: the checkpoint of this step is saved already."""
        if self.stopped:
            control.should_evaluate = control.should_save = False
        return control

    def end(self) -> bool:
        """Leave SIGTERM to who had it before, and say whether it came to any process since training began."""
        came = self._agree()
        signal.signal(signal.SIGTERM, self._before)
        return came


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping that goes on counting where the checkpoint stopped, and is over if it was over there."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take the count, but not the patience, from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        return control


def run_settings(args: argparse.Namespace, zero_stage: int | None, num_processes: int) -> dict[str, Any]:
    """What a run has to keep when it goes on from a checkpoint, by name: other weights, states or rows would not fit it."""
    settings = {
        "method": method_name(args),
        "optimizer (--optim)": args.optim,
        "sharding (--deepspeed)": "none" if zero_stage is None else f"ZeRO-{zero_stage}",
        "--batch_size": args.batch_size,
    }
    if uses_adapters(args):
        settings["--lora_rank"] = args.lora_rank
    if zero_stage or args.streaming:  # each process has states, or a part of the stream, of its own
        settings["number of processes"] = num_processes
    return settings


def check_resumable(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Check that a run can go on from a checkpoint exactly.

    Parameters
    ----------
    checkpoint : Path
        A complete one.
    settings : dict
        The run's :func:`run_settings`.

    Raises
    ------
    InputError
        Naming what the checkpoint's run had and this one has not.
    """
    path = checkpoint / TOTALS
    then = json.loads(path.read_text()).get("settings", settings) if path.is_file() else settings
    for name in then | settings:
        if then.get(name) != settings.get(name):
            raise InputError(
                f"{name} is {settings.get(name)}, and the checkpoint's run had "
                f"{then.get(name)}: go on with the same, or begin anew in another --output_dir",
                f"--resume_from_checkpoint {checkpoint}",
            )
