"""How far a long step is: one bar on a terminal, plain lines where there is none or no bar is wanted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import TypeVar

import datasets
from tqdm import tqdm
from transformers.utils import logging

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10


def show_bars(wanted: bool) -> bool:
    """Whether this process shows bars: the first one, on a terminal, unless ``--no-tqdm`` was given."""
    return wanted and _is_first_process() and sys.stderr.isatty()


def limit_library_bars(wanted: bool) -> None:
    """Switch the bars of transformers, datasets and the hub off unless :func:`show_bars` says otherwise."""
    if not show_bars(wanted):
        logging.disable_progress_bar()  # those of the hub too
        datasets.disable_progress_bars()


def say(text: str) -> None:
    """Write a line to stderr, from the first process."""
    if _is_first_process():
        print(text, file=sys.stderr, flush=True)


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


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
