"""The worker processes of data loaders: when they are started, and which signals reach them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


class WorkerLoader(DataLoader):
    """A DataLoader whose workers are forked at a quiet moment and outlive a SIGTERM to their whole process group.

    After a collective, communication threads register with the interpreter for a moment, to give back what they held. A worker
    that Python 3.11 forks in that moment inherits a lock that nobody releases, and waits for ever.

    Parameters
    ----------
    *args, **kwargs
        As for :class:`torch.utils.data.DataLoader`, but for ``worker_init_fn``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, worker_init_fn=_leave_process_group, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers > 0:
            wait_until_quiet()
        return super().__iter__()


def wait_until_quiet() -> None:
    """Wait until communication threads have given back what they held, before workers are forked."""
    time.sleep(0.05)


def _leave_process_group(_: int) -> None:
    # SIGTERM is sent to the whole group; the process that these workers serve saves first, and ends them itself.
    os.setsid()
