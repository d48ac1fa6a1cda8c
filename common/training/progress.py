"""The progress of training: one bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from common.runtime import show_bars


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
