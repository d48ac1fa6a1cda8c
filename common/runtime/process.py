"""This process: flags, input errors, its rank, what it prints, how it ends. Imports only the standard library."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

# Flags of transformers, PEFT and TRL, and what to use instead.
OTHER_NAMES = {
    "bs": "--batch_size",
    "epochs": "--num_train_epochs",
    "fp16": "no flag: fp16 is the default on a GPU",
    "gradient_accumulation_steps": "--batch_size, the samples per step over all processes",
    "load_in_4bit": "--use_qlora",
    "lora_alpha": "--lora_alpha_ratio, alpha divided by the rank",
    "lora_r": "--lora_rank",
    "lr": "--learning_rate",
    "model": "--model_name_or_path",
    "per_device_eval_batch_size": "--eval_batch_size",
    "per_device_train_batch_size": "--batch_size_per_gpu",
    "warmup_ratio": "--warmup_steps with a value below 1",
    "weight_decay": "--wd",
}
TORCHRUN_FLAGS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone")


class InputError(ValueError):
    """Invalid user input: a flag, a file or a row. A script exits with the message only, without a traceback.

    Parameters
    ----------
    message : str
        What is wrong and how to fix it.
    place : str, optional
        Location of the error, put before the message: a flag, a file and line, or a dataset row.
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place

    def at(self, place: str | None) -> InputError:
        """Return the same error with its location added."""
        return InputError(str(self), place)


def excerpt(value: object) -> str:
    """Return a value as text for a message, in at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number of things as text: ``1 row``, ``1,200 rows``; ``plural`` is the noun with an s by default."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def rank() -> int:
    """Global rank of this process, as set by torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes on all machines, as set by torchrun; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Rank of this process on its machine, as set by torchrun; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes on this machine, as set by torchrun; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process has global rank 0."""
    return rank() == 0


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line on the main process, to stderr by default."""
    if is_main_process():
        print(text, file=stream or sys.stderr, flush=True)


def stop_at_once(number: int, _: Any = None) -> None:
    """End this process now, as the handler of a signal."""
    if is_main_process():
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def fail(message: str, show: bool = True, others_may_go_on: bool = False) -> NoReturn:
    """Exit with code 1 and show ``error: message`` as the last lines, below all that torchrun prints about a failed process.

    Parameters
    ----------
    message : str
    show : bool
        False if another process of this machine shows the same message.
    others_may_go_on : bool
        torchrun shows the message only when all processes have ended. If that may take a while, it is printed now as well.
    """
    message = f"error: {message}"
    if show:
        # torchrun's summary ends with what this file says of the earliest failure; it counts whole seconds.
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
            Path(file).write_text(json.dumps({"message": details}), encoding="utf-8")
        if not file or others_may_go_on:
            print(message, file=sys.stderr, flush=True)
    sys.exit(1)


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, on one process of each machine, and suggests what was meant."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Show the message and exit with code 1. All processes have the same flags."""
        fail(message, show=local_rank() == 0)

    # Without the overloads of argparse, which are for other classes of namespaces.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the values of the flags. Unknown ones are named before missing ones: they may be the same, misspelled."""
        words = sys.argv[1:] if args is None else list(args)
        names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        for name in names:
            if name and name not in known and "help" not in names:
                self.error(f"unknown flag --{name}{_suggestion(name, known)}")
        values, unexpected = self.parse_known_args(words, namespace)
        if unexpected:
            before = words[words.index(unexpected[0]) - 1] if unexpected[0] in words[1:] else self.prog
            self.error(f"unexpected {unexpected[0]!r} after {before}; --help shows which flags take a value")
        return values


def _suggestion(name: str, known: list[str]) -> str:
    if name.replace("-", "_") in TORCHRUN_FLAGS:
        return ": torchrun's own flags come before the script"
    if (other := OTHER_NAMES.get(name)) and other.split()[0].strip("-,:") in [*known, "no"]:
        return f": use {other}"
    closest = get_close_matches(name.lower().replace("-", "_"), known, n=1) or get_close_matches(name, known, n=1)
    return f": did you mean --{closest[0]}?" if closest else "; --help lists all flags"
