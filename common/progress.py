"""How far a long step is: one bar on a terminal, plain lines where there is none or no bar is wanted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

import datasets
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState
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


class TrainingProgress(TrainerCallback):
    """Steps done, time left and the last log line's figures: one bar on a terminal, plain lines elsewhere."""

    FIGURES = {"loss": "loss {:.4f}", "eval_loss": "evaluation loss {:.4f}", "grad_norm": "gradient {:.3g}"}
    FIGURES |= {"learning_rate": "rate {:.2e}", "images_per_second": "{:.3g} images/s"}
    FIGURES |= {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}"}
    # The task's metrics have names of their own; these are the Trainer's.
    NO_METRICS = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")

    def __init__(self, bar: bool) -> None:
        self.show_bar = show_bars(bar)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        begun = state.global_step
        self.bar = tqdm(
            desc="Training", unit=" steps", total=state.max_steps, initial=begun, disable=not self.show_bar, dynamic_ncols=True
        )
        self.begun, self.began_at = begun, time.monotonic()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        parts = [form.format(logs[name]) for name, form in self.FIGURES.items() if name in logs]
        if "eval_loss" in logs:  # what is evaluated before and after training is printed by itself
            metrics = [name for name in logs if name.startswith("eval_") and name not in self.NO_METRICS]
            parts += [f"{name.removeprefix('eval_')} {logs[name]:.4f}" for name in metrics]
        figures = ", ".join(parts)
        if not figures or not state.is_world_process_zero:
            return
        step, last = state.global_step, state.max_steps
        left = (time.monotonic() - self.began_at) / max(1, step - self.begun) * (last - step)
        if self.show_bar:
            self.bar.set_postfix_str(figures)
        else:
            print(f"step {step} of {last}, {tqdm.format_interval(left)} left: {figures}", flush=True)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.bar.close()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
