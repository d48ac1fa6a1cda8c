"""Checkpoints that are either complete or passed over, and runs that can be told to stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import replacing

# Written last, once every process has written its part: the names and sizes of all files.
MANIFEST = "complete.json"


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Say clearly that saving failed, and that nothing saved before is lost.

    Raises
    ------
    ValueError
        In place of what a full disk, say, makes the libraries raise.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
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


def what_is_torn(directory: Path) -> str | None:
    """Say what a checkpoint lacks, or None if it is complete."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return "saving it was cut short"
    except json.JSONDecodeError:
        return f"{MANIFEST} is damaged"
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def find_checkpoint(wanted: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to go on from.

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
    ValueError
        If a directory was named that is no complete checkpoint.
    """
    if wanted is None:
        return None, []
    if wanted != "auto":
        directory = Path(wanted)
        if not directory.is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted}: there is no such directory")
        if reason := what_is_torn(directory):
            raise ValueError(f"--resume_from_checkpoint {wanted} is not complete ({reason}); use auto, or an earlier one")
        return directory, []
    passed_over = []
    numbered = [(path.name.rpartition("-")[2], path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, path in sorted(((int(step), path) for step, path in numbered if step.isdigit()), reverse=True):
        reason = what_is_torn(path)
        if reason is None:
            return path, passed_over
        passed_over.append(f"{path.name} ({reason})")
    return None, passed_over


class StopOnSignal(TrainerCallback):
    """After SIGTERM on any process, save a complete checkpoint at the end of the step and stop, on all of them."""

    def __init__(self) -> None:
        self.received = False
        self.stopped = False

    def _receive(self, *_: Any) -> None:
        self.received = True

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Listen."""
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave SIGTERM to who had it before."""
        signal.signal(signal.SIGTERM, self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Agree with the other processes whether to stop."""
        stop = torch.tensor(int(self.received), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        if stop.item():
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control
