"""Names a process that has stopped responding, before the timeout of the other processes ends the run."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from threading import Event, Thread

import torch.distributed as dist

from .process import counted

PATIENCE = 120  # seconds
BEATS = 10  # in that time


class Heartbeat(Thread):
    """Tells the other processes that this one is alive, and warns about those that are not.

    A process that waits for one that hangs is ended by the timeout of its process group. With NCCL, that message does not say
    which process is missing. The main process watches the others, and the second process watches the main process.

    Parameters
    ----------
    store : torch.distributed.Store
        Shared by all processes, and not used by another thread.
    rank, world_size : int
    timeout : int
        Of the process group, in seconds.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.timeout = store, rank, timeout
        self.patience = min(PATIENCE, timeout / 2)
        self.watched = {0: range(1, world_size), 1: [0]}.get(rank, [])
        self._ended = Event()

    def run(self) -> None:
        # Each one's newest beat, and the own beat at which it was noticed. Time would also pass while all are stopped together.
        last = {other: ("", 0) for other in self.watched}
        reported: set[int] = set()
        host, beat = socket.gethostname(), 0
        with suppress(RuntimeError):  # the process that holds the store has ended, and with it the run
            while not self._ended.wait(self.patience / BEATS):
                beat += 1
                self.store.set(f"beat/{self.rank}", f"{host} {beat}")
                for other in self.watched:
                    newest = self._newest(other)
                    if newest != last[other][0]:
                        last[other] = newest, beat
                        reported.discard(other)
                    elif newest and other not in reported and beat - last[other][1] > BEATS:
                        reported.add(other)
                        self._warn(other, newest.split()[0])
            self.store.set(f"beat/{self.rank}", "")

    def _newest(self, other: int) -> str:
        """Host and count of a process's beats; empty before its first one and after it has ended."""
        key = f"beat/{other}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _warn(self, other: int, host: str) -> None:
        silence = f"process {other} on {host} has not responded for {counted(round(self.patience), 'second')}"
        limit = f"the others end after --ddp_timeout ({counted(self.timeout, 'second')}), once the data is ready"
        print(f"warning: {silence}; {limit}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Stop, and have the other processes expect no more beats."""
        self._ended.set()
        self.join(1)  # longer, if the process that holds the store hangs: then this one ends without it
