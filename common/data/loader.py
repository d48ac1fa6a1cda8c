"""Worker processes: a DataLoader for batches, and a function called in parallel.

Workers start safely, ignore SIGTERM to the process group, and pass on input errors or skip the sample.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, die_with_parent

T = TypeVar("T")
U = TypeVar("U")

SECONDS_TO_WAIT = 1800  # for a worker


class WorkerLoader(DataLoader):
    """DataLoader whose workers survive a SIGTERM to their process group and pass on input errors.

    After a collective, communication threads briefly hold an interpreter lock while they release Python objects. In Python
    3.11, a worker forked at that time inherits the locked lock and deadlocks, so the loader waits before it forks workers.

    An :class:`InputError` in a worker is returned in place of a batch and raised in the main process. PyTorch
    itself would only pass on its traceback as text.

    Parameters
    ----------
    dataset, collate_fn, batch_sampler, **kwargs
        As for :class:`torch.utils.data.DataLoader`, except ``worker_init_fn``, ``prefetch_factor`` and
        ``multiprocessing_context``.
    num_workers : int
        Number of workers, limited to this process's share of the CPU cores.
    ahead : int
        Number of batches to prefetch, at least two per worker.
    timeout : int
        Seconds after which a worker that does not deliver a batch ends the run.
    filler : dict, optional
        Sample that takes the place of one with an :class:`InputError`. The batch then has an entry
        ``"skipped"``, a list of messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate_fn: Callable[[list[Any]], Any],
        num_workers: int = 0,
        ahead: int = 0,
        timeout: int = SECONDS_TO_WAIT,
        filler: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        workers = min(num_workers, cores_per_process())
        super().__init__(
            _ErrorReturningDataset(dataset, filler),
            collate_fn=_ErrorReturningCollator(collate_fn, filler),
            num_workers=workers,
            prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
            timeout=timeout if workers else 0,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_start_worker,
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator around PyTorch's iterator
        if self.num_workers > 0:
            wait_until_quiet()
        return raise_input_errors(super().__iter__())


class _ErrorReturningDataset(Dataset):
    def __init__(self, dataset: Dataset, filler: dict[str, Any] | None) -> None:
        self.dataset, self.filler = dataset, filler

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style datasets have a length

    def __getitems__(self, keys: list[Any]) -> list[Any] | InputError:
        samples = []
        for key in keys:
            try:
                samples.append(self.dataset[key])
            except InputError as error:
                if self.filler is None:
                    return error
                samples.append(self.filler | {"skipped": str(error)})
        return samples


class _ErrorReturningCollator:
    def __init__(self, collate: Callable[[list[Any]], Any], filler: dict[str, Any] | None) -> None:
        self.collate, self.filler = collate, filler

    def __call__(self, samples: list[Any] | InputError) -> Any:
        if isinstance(samples, InputError):
            return samples
        try:
            batch = self.collate(samples)
        except InputError as error:
            if self.filler is None:
                return error
            samples = [self._usable(sample, self.filler) for sample in samples]
            batch = self.collate(samples)
        skipped = [sample["skipped"] for sample in samples if "skipped" in sample] if self.filler else []
        return batch | {"skipped": skipped} if skipped else batch

    def _usable(self, sample: dict[str, Any], filler: dict[str, Any]) -> dict[str, Any]:
        try:
            self.collate([sample])
            return sample
        except InputError as error:
            return filler | {"skipped": str(error)}


def in_parallel(work: Callable[[T], U], chunks: Iterable[T], num_workers: int) -> Iterator[U]:
    """Call a function on chunks of items in forked processes, and yield the results in order.

    An :class:`InputError` of the function is raised here. With 0 workers, it is called in this process.
    """
    if num_workers:
        wait_until_quiet()
    results = DataLoader(
        _Work(work),
        batch_sampler=chunks,  # type: ignore[arg-type]  # declared to yield lists
        collate_fn=lambda result: result,
        num_workers=num_workers,
        timeout=SECONDS_TO_WAIT if num_workers else 0,
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the random numbers of training must not depend on this
    )
    return raise_input_errors(iter(results))


class _Work(Dataset):
    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __getitems__(self, chunk: Any) -> Any:
        try:
            return self.work(chunk)
        except InputError as error:
            return error


def raise_input_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches, and raise an input error that a worker returned in place of a batch."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def wait_until_quiet() -> None:
    """Wait until communication threads have released their Python objects, so that workers can be forked safely."""
    time.sleep(0.05)


def release_memory() -> None:
    """Prepare the memory of this process for workers that share it: release what is not used, and keep the rest as it is.

    Collecting garbage writes to every object, which would copy their pages. The objects of this time are left out of it until
    the next call.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def _start_worker(_: int) -> None:
    gc.freeze()  # collecting would copy the memory that is shared with the process
    # SIGTERM is sent to the whole group, but the training process needs its workers until it has saved a checkpoint.
    os.setsid()
    die_with_parent()  # otherwise it notices after seconds
