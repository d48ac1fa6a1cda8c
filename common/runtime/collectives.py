"""Collectives over the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .process import InputError, is_main_process, world_size

T = TypeVar("T")
received: list[int] = []  # signals that end training after the current step; see common.training.callbacks.StopOnSignal


class Interrupted(Exception):
    """An evaluation was ended, on all processes, by a signal that ends training."""


def gather(value: T) -> list[T]:
    """Return the values of all processes, which must be picklable, in order of rank. Must be called on all processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def interrupted() -> bool:
    """Whether to end an evaluation before its next batch, because of a signal.

    Each process decides for itself, and all of them call :func:`raise_if_interrupted` after their batches. With ZeRO-3, which
    needs the same number of batches on all processes, evaluations are completed.
    """
    return bool(received) and not is_deepspeed_zero3_enabled()


def raise_if_interrupted() -> None:
    """Raise :class:`Interrupted` on all processes if any has received a signal. Must be called on all processes."""
    if any(gather(interrupted())):
        raise Interrupted


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes in place; it must be on the device of the process group's backend."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the main process only; all processes return its result, a picklable one, or raise its input error."""
    results: list[Any] = [None]
    if is_main_process():
        try:
            results = [function()]
        except InputError as error:
            results = [error]
    if world_size() > 1:
        dist.broadcast_object_list(results)
    if isinstance(results[0], InputError):
        raise results[0]
    return results[0]


def first_on_each_machine(function: Callable[[], T]) -> T:
    """Call a function on the first process of each machine, then on the other processes."""
    with PartialState().local_main_process_first():
        try:
            return function()
        except InputError as error:
            failure = error  # raised after the barrier, for which the other processes wait
    raise failure


def set_timeout(seconds: int) -> None:
    """Set the timeout of all process groups that exist."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=seconds), group)
