"""The worker processes of data loaders: when they are started, and which signals reach them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from common.runtime import InputError, cores_per_process


class WorkerLoader(DataLoader):
    """A DataLoader whose workers are forked at a quiet moment and outlive a SIGTERM to their whole process group.

    After a collective, communication threads register with the interpreter for a moment, to give back what they held. A worker
    that Python 3.11 forks in that moment inherits a lock that nobody releases, and waits for ever.

    An input error travels from a worker as itself, in place of a batch: torch would hand on only the text of its traceback.

    Parameters
    ----------
    dataset, collate_fn, batch_sampler, **kwargs
        As for :class:`torch.utils.data.DataLoader`, but for ``worker_init_fn`` and ``prefetch_factor``.
    num_workers : int
        At most this process's share of the cores is started.
    ahead : int
        Batches to have ready, at least two per worker.
    """

    def __init__(
        self, dataset: Dataset, collate_fn: Callable[[list[Any]], Any], num_workers: int = 0, ahead: int = 0, **kwargs: Any
    ) -> None:
        workers = min(num_workers, cores_per_process())
        super().__init__(
            _CarryingDataset(dataset),
            collate_fn=_CarryingCollator(collate_fn),
            num_workers=workers,
            prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
            worker_init_fn=_leave_process_group,
            **kwargs,
        )

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers > 0:
            wait_until_quiet()
        return raise_input_errors(super().__iter__())


class _CarryingDataset(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[Any]) -> list[Any] | InputError:
        try:
            return [self.dataset[key] for key in keys]
        except InputError as error:
            return error


class _CarryingCollator:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any] | InputError) -> Any:
        if isinstance(samples, InputError):
            return samples
        try:
            return self.collate(samples)
        except InputError as error:
            return error


def raise_input_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Give batches, but raise what a worker handed on in place of one."""
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def wait_until_quiet() -> None:
    """Wait until communication threads have given back what they held, before workers are forked."""
    time.sleep(0.05)


def _leave_process_group(_: int) -> None:
    # SIGTERM is sent to the whole group; the process that these workers serve saves first, and ends them itself.
    os.setsid()
