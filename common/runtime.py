"""Processes and their machine: collectives, a script's run, atomic file writes, progress, hardware and versions."""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import datasets
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from common.process import (
    InputError,
    counted,
    excerpt,
    fail,
    is_main_process,
    local_rank,
    local_world_size,
    rank,
    say,
    stop_at_once,
    world_size,
)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10
SECONDS_TO_FIRST_LINE = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LIBRARIES = ["torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "pillow"]
LIBRARIES += ["flash-attn", "liger-kernel"]


def cores_per_process() -> int:
    """CPU cores available to this process: its share of the cores available on this machine."""
    # macOS does not support CPU affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order of rank, on every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return the main process's value on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes in place; it must be on the device of the process group's backend."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main_process(load: Callable[[], T]) -> T:
    """Call a function on the main process only; all processes return its result or raise its input error."""
    result: Any = None
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
    """Call a function on the first process of each machine, then on the other processes."""
    with PartialState().local_main_process_first():
        try:
            return prepare()
        except InputError as error:
            failure = error  # raised after the barrier, for which the other processes wait
    raise failure


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; its file replaces ``path`` when the block completes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may write the same file on a shared file system.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | dict[str, Any]) -> None:
    """Write a text, or a dict as JSON, atomically."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : Path
    remedy : str
        How to fix an invalid file, for the message.

    Raises
    ------
    InputError
        If the file is missing or does not contain a JSON object; the message names the file.
    """
    if not path.is_file():  # opening a FIFO would wait
        raise InputError(f"{path} is {'not a file' if path.exists() else 'missing'}: {remedy}")
    try:
        return parse_json(path.read_bytes(), remedy, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}") from None


def parse_json(text: str | bytes, remedy: str, place: str | None = None) -> dict[str, Any]:
    """Parse a JSON object; ``place`` is its location, for messages, and otherwise as :func:`read_json`."""
    try:
        content = json.loads(text, object_pairs_hook=_reject_duplicate_keys)
        json.dumps(content, ensure_ascii=False).encode()  # fails for lone surrogates, which escapes can produce
    except (ValueError, RecursionError) as error:
        raise InputError(f"invalid JSON ({error}): {remedy}", place) from None
    if not isinstance(content, dict):
        raise InputError(f"expected a JSON object, got {type(content).__name__}: {remedy}", place)
    return content


def _reject_duplicate_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(fields)) < len(fields):
        names = [name for name, _ in fields]
        raise InputError(f'duplicate key "{excerpt(max(names, key=names.count))}"')
    return found


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a script's ``main``; an :class:`InputError` exits with its message and code 1, other errors show their traceback.

    A message is shown once on each machine, by the first process that fails with it.

    SIGTERM and SIGINT end the process at once, except where ``main`` handles them. A process of torchrun is killed if torchrun
    is, because torchrun's successor would write to the same directory.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_at_once)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        main(args)
    except InputError as error:
        # In training, processes that receive SIGTERM first complete the step, or wait for this one.
        in_training = signal.getsignal(signal.SIGTERM) is not stop_at_once
        fail(str(error), show=_is_first_with(str(error)), others_may_go_on=in_training)
    except RuntimeError as error:
        if not (reason := _why_alone(error)):
            raise
        fail(reason, others_may_go_on=True)
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EROFS):
            raise
        remedy = "check the disk" if error.errno == errno.EROFS else "free disk space"
        message = f"writing failed ({error}): {remedy}, and restart with --resume_from_checkpoint auto"
        fail(message, show=_is_first_with(message), others_may_go_on=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_first_with(message: str) -> bool:
    """Whether no other process of this machine has ended with this message."""
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return c10d._get_default_store().add(f"{os.environ.get('GROUP_RANK')}: {message}", 1) == 1
    except RuntimeError:  # the process that holds the store is gone
        return True


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends. Linux only."""
    if sys.platform != "linux":
        return
    parent, PR_SET_PDEATHSIG = os.getppid(), 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _why_alone(error: RuntimeError) -> str | None:
    """Say which process is missing, if that is the reason for an error."""
    text = re.sub(r"^\[\S+\] ", "", str(error).strip().partition("\n")[0])  # without the place in gloo's code
    if "DataLoader worker" in text:
        return f"a data worker died ({text}), usually for lack of memory: use fewer --dataloader_num_workers"
    if not dist.is_initialized():
        return None
    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"{_missing_processes()} did not respond within --ddp_timeout ({text})"
    if "by peer" in text:
        return f"another process has ended ({text}): its own message says why, or the kernel's log if it was killed"
    return None


def _missing_processes() -> str:
    """Name the processes that have not noticed the timeout, because they hang."""
    missing: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the process that holds the store is gone
            store = c10d._get_default_store()
            store.set(f"timeout/{rank()}", "")
            time.sleep(SECONDS_BETWEEN_LINES)  # the others notice it at about the same time
            missing.extend(str(other) for other in range(world_size()) if not store.check([f"timeout/{other}"]))

    thread = Thread(target=ask, daemon=True)  # if the process that holds the store hangs, there is no answer
    thread.start()
    thread.join(2 * SECONDS_BETWEEN_LINES)
    return f"process {', '.join(missing)}" if missing else "a process"


def set_timeout(seconds: int) -> None:
    """Set the timeout of all process groups that exist."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def show_bars(wanted: bool) -> bool:
    """Whether this process shows progress bars: the main process on a terminal, unless ``--no-tqdm`` was given."""
    return wanted and is_main_process() and sys.stderr.isatty()


def limit_library_bars(wanted: bool) -> None:
    """Disable the progress bars of transformers, datasets and huggingface_hub where :func:`show_bars` is False."""
    if not show_bars(wanted):
        logging.disable_progress_bar()  # also disables those of huggingface_hub
        datasets.disable_progress_bars()


class Progress:
    """Context manager that shows progress on stderr.

    Parameters
    ----------
    description, unit : str
        Label, and name of the items.
    total : int
        Number of items.
    bar : bool
        False with ``--no-tqdm``. Without a bar, lines are printed after two seconds, at every 10 % but not more than one in ten
        seconds, and at the end.
    shared : bool
        Whether the items are divided over all processes: those of the others, which are as fast, are counted as well.
    """

    def __init__(self, description: str, unit: str, total: int, bar: bool = True, shared: bool = False) -> None:
        self.description, self.unit, self.total, self.done = description, unit, total, 0
        self._processes = world_size() if shared else 1
        self._lines = not show_bars(bar)
        self._bar = tqdm(
            desc=description, unit=f" {unit}", unit_scale=total > 1e6, total=total, disable=self._lines, leave=None
        )
        self._start, self._last_line = time.monotonic(), float("-inf")

    def update(self, count: int = 1, note: str = "") -> None:
        """Advance by ``count`` items of this process, and show a note, such as the loss."""
        before, self.done = self.done, min(self.done + count * self._processes, self.total)
        if not self._lines:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(self.done - before)
            return
        now = time.monotonic()
        if self._last_line < self._start:
            due = now - self._start >= SECONDS_TO_FIRST_LINE
        else:
            tenth = self.done * 10 // self.total > before * 10 // self.total
            due = tenth and now - self._last_line >= SECONDS_BETWEEN_LINES
        if due or self.done == self.total > before:
            self._last_line, elapsed = now, now - self._start
            remaining = elapsed / self.done * (self.total - self.done)
            times = f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(remaining)} left"
            details = f"{self.done:,} of {self.total:,} {self.unit}, {times}{note and f', {note}'}"
            say(f"{self.description}: {self.done / self.total:.0%}, {details}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def track(items: Collection[T] | DataLoader[T], description: str, unit: str, bar: bool = True) -> Iterator[T]:
    """Iterate over items and show progress; see :class:`Progress` for the parameters."""
    with Progress(description, unit, len(items), bar) as progress:
        for item in items:
            yield item
            progress.update()


def hardware() -> str:
    """Describe the hardware of all processes, for example ``8 × NVIDIA A100-SXM4-80GB``."""
    count = world_size()
    if torch.cuda.is_available():
        return f"{count} × {torch.cuda.get_device_name()}"
    cores = counted(os.cpu_count() or 1, "core")
    return f"{counted(count, 'CPU process', 'CPU processes')} on {cores} of {cpu_name()}"


def cpu_name() -> str:
    """Name of the CPU and, on Linux, its family and model, since some clouds hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    name = names.get("model name", platform.machine())
    return f"{name}, family {names['cpu family']} model {names['model']}" if "cpu family" in names else name


def versions() -> dict[str, str]:
    """Versions of Python, of the CUDA that PyTorch was built for, and of the installed libraries."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
