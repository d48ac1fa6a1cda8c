"""The output directory: it holds one result, and one run at a time writes to it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from common.runtime.process import InputError, say

BAD_SAMPLES = "bad_samples.jsonl"
LOCK, SAVING = "_lock", "_saving"  # files that begin with _ are not pushed to the Hub
RESULTS = ("model*.safetensors", "adapter_model.safetensors", "eval_after.json")
OTHER_FILES = (
    *("run.json", "eval_before.json", "train_results.json", "trainer_state.json", "README.md"),
    *("evaluation.json", BAD_SAMPLES, SAVING, "report.html", "curves", "gallery", "runs"),
    "training_args.bin",  # of earlier versions
    *("base_model.json", "adapter_config.json", "config.json"),
    *("generation_config.json", "model.safetensors.index.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
)
_held: dict[Path, tuple[TextIO, str]] = {}  # a lock lasts as long as its file is open


def lock_output_dir(directory: Path) -> None:
    """Create an output directory, and lock it until this process ends. The operating system drops the lock of a dead process.

    Raises
    ------
    InputError
        If another process holds the lock, or the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("a+")
    except OSError as error:
        raise InputError(f"cannot be written to ({error}): choose another directory", f"--output_dir {directory}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise InputError(
            f"another run ({file.read() or 'just started'}) is writing to it: wait until it has ended, or choose another "
            "directory",
            f"--output_dir {directory}",
        ) from None
    except OSError:
        pass  # a file system without locks
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    _held[directory] = file, owner
    file.truncate(0)
    file.write(owner)
    file.flush()


def check_output_dir_locked(directory: Path) -> None:
    """Check that an output directory is still the one that this process has locked. If the lock was deleted, lock it again.

    Some file systems change the numbers of their files. There, the lock is recognized by its content.

    Raises
    ------
    InputError
        If another run has locked the directory.
    """
    if directory not in _held:
        return
    (file, owner), path = _held[directory], directory / LOCK
    try:
        # Not read if it is the same file, because closing that once would drop the lock.
        same = os.path.samestat(path.stat(), os.fstat(file.fileno())) or path.read_text() == owner
    except FileNotFoundError:
        say(
            f"warning: --output_dir {directory}, or its {path.name}, was deleted during the run, which continues to write there"
        )
        lock_output_dir(directory)
        return
    if not same:
        raise InputError(
            "was replaced during the run, and another run has written to it: nothing is saved; start the run again",
            f"--output_dir {directory}",
        )


def note_bad_sample(directory: Path, step: int, message: str) -> None:
    """Add a skipped sample to ``bad_samples.jsonl``. Lines of several processes do not mix."""
    say(f"step {step}: skipped: {message}")
    _add_lines(directory, [json.dumps({"step": step, "error": message})])


def note_skipped_rows(directory: Path, messages: Sequence[str]) -> None:
    """List the rows that were skipped when the data was loaded in ``bad_samples.jsonl``, as of step 0, unless it lists them."""
    lines = dict.fromkeys(json.dumps({"step": 0, "error": message}) for message in messages)
    listed = _bad_samples(directory)
    if new := [line for line in lines if line not in listed]:
        _add_lines(directory, new)


def _add_lines(directory: Path, lines: list[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)  # on another machine, or deleted
    with (directory / BAD_SAMPLES).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else ["", *lines]  # after a line that a full disk has cut off
        file.write("".join(f"{line}\n" for line in lines).encode())


def count_bad_samples(directory: Path) -> int:
    """Number of samples in ``bad_samples.jsonl`` of steps; a step that was taken again after a resume counts once."""
    return sum(not line.startswith('{"step": 0,') for line in _bad_samples(directory))


def _bad_samples(directory: Path) -> set[str]:
    """The different lines of ``bad_samples.jsonl``, which are not parsed: a full disk may have left incomplete ones."""
    file = directory / BAD_SAMPLES
    return set(filter(None, file.read_text(errors="replace").splitlines())) if file.is_file() else set()


def is_checkpoint_of(directory: Path, checkpoint: Path | None) -> bool:
    """Whether a checkpoint is in an output directory, so that a run that resumes from it continues there."""
    return checkpoint is not None and checkpoint.resolve().parent == directory.resolve()


def check_output_dir_unused(directory: Path, overwrite: bool, resuming: bool, models: Sequence[str] = ()) -> None:
    """Refuse a new run in a directory that holds the result or the checkpoints of another one.

    If ``resuming``, ``--resume_from_checkpoint auto`` found no checkpoint that it can use; incomplete ones are ignored.
    ``models`` are the names of the models that the run reads, which it must not delete.

    Raises
    ------
    InputError
        The message names a file, and what can be done.
    """
    for model in models if overwrite else ():
        path = Path(model).resolve()
        if directory.resolve() == path or (directory.resolve() == path.parent and path.match("checkpoint-*")):
            raise InputError(
                f"--overwrite_output_dir would delete {model}, which this run reads: choose another directory",
                f"--output_dir {directory}",
            )
    patterns = RESULTS if resuming else (*RESULTS, "checkpoint-*")
    found = next((path for pattern in patterns for path in sorted(directory.glob(pattern))), None)
    if found and not overwrite:
        raise InputError(
            f"holds {found.name} of another run: choose another directory, resume that run with --resume_from_checkpoint auto, "
            "or delete what it wrote with --overwrite_output_dir",
            f"--output_dir {directory}",
        )


def remove_outputs(directory: Path) -> None:
    """Delete what a run writes to its output directory, and nothing else."""
    for pattern in (*RESULTS, *OTHER_FILES, "checkpoint-*"):
        for path in directory.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
