"""Progress on stderr: bars on a terminal, otherwise lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

import datasets
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from .process import is_main_process, say, world_size

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10
SECONDS_TO_FIRST_LINE = 2


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
        if self.done and (due or self.done == self.total > before):
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
