"""A script's run: its input errors, its signals, its end."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from .process import InputError, fail, local_rank, rank, stop_at_once, world_size

SECONDS_TO_NOTICE = 10  # until the others have noticed the same timeout
# Errors of a file system. safetensors and tokenizers quote their texts, torch has its own for a full disk.
FULL = [*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "inline_container.cc"]
BROKEN = [os.strerror(number) for number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)]


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a script's ``main``; an :class:`InputError` exits with its message and code 1, other errors show their traceback.

    A message is shown once on each machine, by the first process that fails with it.

    SIGTERM and SIGINT end the process at once, except where ``main`` handles them.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_at_once)
    try:
        main(args)
    except InputError as error:
        # In training, processes that receive SIGTERM first complete the step, or wait for this one.
        in_training = signal.getsignal(signal.SIGTERM) is not stop_at_once
        fail(str(error), show=_is_first_with(str(error)), others_may_continue=in_training)
    except RuntimeError as error:
        if not (reason := _explain_failure(error)):
            raise
        fail(reason, others_may_continue=True)
    except OSError as error:
        if not (remedy := disk_remedy(error)):
            raise
        # The error of a data worker contains its traceback.
        reason = str(error).strip().splitlines()[-1]
        message = f"reading or writing failed ({reason}): {remedy}, and restart with --resume_from_checkpoint auto"
        fail(message, show=_is_first_with(message), others_may_continue=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def disk_remedy(error: Exception) -> str | None:
    """Return what to do about an error of a file system, or None for another error."""
    if any(text in str(error) for text in FULL):
        return "free disk space"
    return "check the disk and its permissions" if any(text in str(error) for text in BROKEN) else None


def _is_first_with(message: str) -> bool:
    """Whether no other process of this machine has ended with this message."""
    if not dist.is_initialized():
        return local_rank() == 0
    try:
        return c10d._get_default_store().add(f"{os.environ.get('GROUP_RANK')}: {message}", 1) == 1
    except RuntimeError:  # the process that holds the store is gone
        return True


def _explain_failure(error: RuntimeError) -> str | None:
    """Return a message if another process or a data worker caused the error, otherwise None."""
    text = re.sub(r"^\[\S+\] ", "", str(error).strip().partition("\n")[0])  # without the place in gloo's code
    if text.startswith("DataLoader timed out"):
        return f"a data worker hangs ({text}): check the disk or network that the data are on"
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
            time.sleep(SECONDS_TO_NOTICE)  # the others notice it at about the same time
            missing.extend(str(other) for other in range(world_size()) if not store.check([f"timeout/{other}"]))

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * SECONDS_TO_NOTICE)
    if thread.is_alive():  # the process that holds the store hangs
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return f"torchrun on {os.environ['MASTER_ADDR']}" if of_torchrun else "process 0"
    return f"process {', '.join(missing)}" if missing else "a process"
