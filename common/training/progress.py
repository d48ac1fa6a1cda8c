"""Training progress: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from common.runtime.progress import show_bars


class TrainingProgress(TrainerCallback):
    """Shows completed steps, remaining time and the latest logged values: a bar on a terminal, plain lines elsewhere."""

    FORMATS = {"loss": "loss {:.4f}", "eval_loss": "evaluation loss {:.4f}", "grad_norm": "gradient norm {:.3g}"}
    FORMATS |= {"learning_rate": "learning rate {:.2e}", "images_per_second": "{:.3g} images/s"}
    FORMATS |= {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.0%}"}
    # Added by the Trainer; all other eval_ entries are metrics of the task.
    TRAINER_ENTRIES = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")

    def __init__(self, bar: bool) -> None:
        self.show_bar = show_bars(bar)

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.first_step, self.start_time = state.global_step, time.monotonic()
        self.bar = tqdm(
            desc="Training",
            unit=" steps",
            total=state.max_steps,
            initial=self.first_step,
            disable=not self.show_bar,
            dynamic_ncols=True,
        )

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, *, logs: Any = None, **kwargs: Any) -> None:
        parts = [form.format(logs[name]) for name, form in self.FORMATS.items() if name in logs]
        if "eval_loss" in logs:  # evaluations before and after training print their own line
            metrics = [name for name in logs if name.startswith("eval_") and name not in self.TRAINER_ENTRIES]
            parts += [f"{name.removeprefix('eval_')} {logs[name]:.4f}" for name in metrics]
        values = ", ".join(parts)
        if not values or not state.is_world_process_zero:
            return
        step, last = state.global_step, state.max_steps
        elapsed = time.monotonic() - self.start_time
        left = elapsed / max(1, step - self.first_step) * (last - step)
        if self.show_bar:
            self.bar.set_postfix_str(values)
        else:
            times = f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left"
            print(f"step {step:,} of {last:,}, {times}: {values}", flush=True)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.bar.close()
