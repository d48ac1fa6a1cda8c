"""This process among others, and its machine: input errors, ranks, collectives, whole-file writes, progress, versions."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO, TypeVar

import datasets
import torch
import torch.distributed as dist
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "pillow")
LIBRARIES += ("flash-attn", "liger-kernel")


class InputError(ValueError):
    """What the user gave can't be used: a flag, a file, a row. A script ends with its message alone, without a traceback.

    Parameters
    ----------
    message : str
        What is wrong and what to do.
    place : str, optional
        Where: a flag, a file and its line, a data set's row. Stands before the message.
    """

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place

    def at(self, place: str | None) -> InputError:
        """The same error, met at a place of which it does not know."""
        return InputError(str(self), place)


def rank() -> int:
    """This process's number over all machines, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes over all machines, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores_per_process() -> int:
    """Cores that this process may use: its share of those given to this machine's processes."""
    # macOS has no affinities.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def is_main_process() -> bool:
    """Whether this is the first process over all machines."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """Give every process the values of all of them, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Give every process the first one's value."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Add up a tensor, which is on the device that collectives use, over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main_process(load: Callable[[], T]) -> T:
    """Call a function on the first process alone; all return its result, or raise the same input error."""
    result: T | InputError | None = None
    if is_main_process():
        try:
            result = load()
        except InputError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, InputError):
        raise result
    return result


def first_on_each_machine(prepare: Callable[[], T]) -> T:
    """Call a function on each machine's first process, then on the others; an input error must not keep those waiting."""
    with PartialState().local_main_process_first():
        try:
            return prepare()
        except InputError as error:
            failure = error
    raise failure


def say(text: str, stream: TextIO | None = None) -> None:
    """Write a line from the first process, to stderr unless told otherwise."""
    if is_main_process():
        print(text, file=stream or sys.stderr, flush=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, whose file takes the place of the one at `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may write the same file of a shared file system.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | dict[str, Any]) -> None:
    """Write a text, or an object as JSON, whole or not at all."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : Path
    remedy : str
        What to do otherwise, for the message.

    Raises
    ------
    InputError
        If the file is missing or holds something else; names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # escapes can spell half characters
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(content).__name__}: {remedy}")
    return content


def run(main: Callable[[], None]) -> None:
    """Run a script's ``main``. Bad input ends it with its message and exit code 1; anything else shows its traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def show_bars(wanted: bool) -> bool:
    """Whether this process shows bars: the first one, on a terminal, unless ``--no-tqdm`` was given."""
    return wanted and is_main_process() and sys.stderr.isatty()


def limit_library_bars(wanted: bool) -> None:
    """Switch the bars of transformers, datasets and the hub off unless :func:`show_bars` says otherwise."""
    if not show_bars(wanted):
        logging.disable_progress_bar()  # those of the hub too
        datasets.disable_progress_bars()


class Progress:
    """Show on stderr how far a step is, as a context manager.

    Parameters
    ----------
    description, unit : str
        What is done, and to what.
    total : int
        To how many.
    bar : bool
        False for ``--no-tqdm``. Without a bar a line is written at each tenth of the way, but not within ten seconds of the
        last one, and at the end.
    """

    def __init__(self, description: str, unit: str, total: int, bar: bool = True) -> None:
        self.description, self.unit, self.total, self.done = description, unit, total, 0
        self._lines = not show_bars(bar)
        self._bar = tqdm(
            desc=description, unit=f" {unit}", unit_scale=total > 1e6, total=total, disable=self._lines, leave=None
        )
        self._start = self._last_line = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Go on by some, with a note, the loss say, on how it goes."""
        before, self.done = self.done, self.done + count
        if not self._lines:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        tenth = self.done * 10 // self.total > before * 10 // self.total
        if self.done == self.total or (tenth and now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line, gone = now, now - self._start
            left = gone / self.done * (self.total - self.done)
            times = f"{tqdm.format_interval(gone)} gone, {tqdm.format_interval(left)} left"
            figures = f"{self.done:,} of {self.total:,} {self.unit}, {times}{note and f', {note}'}"
            say(f"{self.description}: {self.done / self.total:.0%}, {figures}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Collection[T], description: str, unit: str, bar: bool = True) -> Iterator[T]:
    """Give items one by one and show how many are done; parameters as :class:`Progress`."""
    with Progress(description, unit, len(items), bar) as progress:
        for item in items:
            yield item
            progress.update()


def hardware() -> str:
    """What a run is computed on, over all processes: ``8 × NVIDIA A100-SXM4-80GB``, say."""
    count = world_size()
    if torch.cuda.is_available():
        return f"{count} × {torch.cuda.get_device_name()}"
    processes = f"{count} CPU process{'es' if count > 1 else ''}"
    return f"{processes} on {os.cpu_count()} cores of {cpu_name()}"


def cpu_name() -> str:
    """The processor's name and, where Linux tells them, its family and model: some clouds hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    name = names.get("model name", platform.machine())
    return f"{name}, family {names['cpu family']} model {names['model']}" if "cpu family" in names else name


def versions() -> dict[str, str]:
    """Versions of Python, of CUDA as torch was built for it, and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
