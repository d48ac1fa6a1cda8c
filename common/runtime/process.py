"""This process: input errors, its rank, what it prints, how it ends. Imports only the standard library."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO


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


def stop_on_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception, as ``sys.excepthook``; after Ctrl-C, as :func:`stop_at_once` does."""
    if issubclass(kind, KeyboardInterrupt):
        stop_at_once(signal.SIGINT)
    sys.__excepthook__(kind, error, traceback)


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends. Linux only."""
    if sys.platform != "linux":
        return
    parent, PR_SET_PDEATHSIG = os.getppid(), 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def fail(message: str, show: bool = True, others_may_continue: bool = False) -> NoReturn:
    """Exit with code 1 and show ``error: message`` as the last lines, below all that torchrun prints about a failed process.

    Parameters
    ----------
    message : str
    show : bool
        False if another process of this machine shows the same message.
    others_may_continue : bool
        torchrun shows the message only when all processes have ended. If that may take a while, it is printed now as well.
    """
    message = f"error: {message}"
    if show:
        # torchrun's summary ends with what this file says of the earliest failure; it counts whole seconds.
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
            Path(file).write_text(json.dumps({"message": details}), encoding="utf-8")
        if not file or others_may_continue:
            print(message, file=sys.stderr, flush=True)
    sys.exit(1)
