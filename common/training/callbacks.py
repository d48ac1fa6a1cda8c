"""What happens between the steps of a run: stopping on a signal, early stopping, checks of the numbers, restoring counters."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common.phi3v.parts import part_of
from common.runtime.collectives import gather, received, sum_over_processes
from common.runtime.process import InputError, counted, say, stop_at_once

FinetuningTrainer = Any  # the module of that class imports this one

SECONDS_OF_ONE_SIGNAL = 3
SKIPPED_STEPS = 16  # fp16 halves the loss scale of 65,536 at each; at 1, DeepSpeed fails
UNCHANGED_STEPS = 10


class StopOnSignal(TrainerCallback):
    """After SIGTERM or SIGINT on any process, save a complete checkpoint at the end of the step and stop all processes.

    During an evaluation, stop after its current batch; the resumed run repeats the evaluation.

    A second signal ends the process at once. One that follows within seconds is the same: torchrun passes on a Ctrl-C that its
    processes have already received from the terminal.
    """

    def __init__(self) -> None:
        received.clear()
        self._received_at = 0.0
        self.stopped = False
        self.evaluation_due = False
        self._previous_handlers: dict[int, Any] = {}

    def _receive(self, number: int, _: Any) -> None:
        if received and time.monotonic() - self._received_at > SECONDS_OF_ONE_SIGNAL:
            stop_at_once(number)
        if not received:
            received.append(number)
            self._received_at = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Install the signal handlers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous_handlers[number] = signal.signal(number, self._receive)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop if any process has received SIGTERM."""
        if sum_over_processes(torch.tensor(sum(received), device=args.device)):
            ends_epoch = state.epoch.is_integer() or state.global_step >= state.max_steps
            due = control.should_evaluate or (args.eval_strategy == "epoch" and ends_epoch)
            # There may be no time left for an evaluation, so the resumed run does it instead. With ZeRO-3 it cannot: after an
            # evaluation before its first step, the backward pass of that step fails.
            self.stop(control, evaluation_due=due and not is_deepspeed_zero3_enabled())
            control.should_evaluate = due and is_deepspeed_zero3_enabled()
        return control

    def stop(self, control: TrainerControl, evaluation_due: bool) -> None:
        """Save a checkpoint and stop. With ``evaluation_due``, the resumed run evaluates first. Called on all processes."""
        self.stopped, self.evaluation_due = True, evaluation_due
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Skip evaluation and saving at the end of the epoch: the checkpoint of this step is already saved."""
        if self.stopped:
            control.should_evaluate = control.should_save = False
        return control

    def end(self) -> int:
        """Restore the previous handlers; return the number of the signal that any process has received, or 0."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        return max(gather(sum(received)))


class EarlyStopping(EarlyStoppingCallback):
    """Early stopping whose patience counter is restored on resume. A run that had already stopped early stops again."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Restore the counter, but not the patience, from the checkpoint."""
        super().on_train_begin(args, state, control, **kwargs)
        states: Any = state.stateful_callbacks  # a dict by name, annotated as a list in transformers
        saved = states.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        return control


class CheckNumbers(TrainerCallback):
    """Ends a run whose loss or gradient is not finite for several steps; warns if a part that is trained does not change.

    Parameters
    ----------
    trainer : FinetuningTrainer
    limit : int
        Number of such steps in a row. In fp16, up to ``SKIPPED_STEPS`` that overflow and are skipped are normal.
    """

    def __init__(self, trainer: FinetuningTrainer, limit: int) -> None:
        self.trainer, self.limit, self.bad = trainer, limit, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._first_step, self._before = state.global_step, bit_sums(self.trainer.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        # The sum is not finite if it is not on any process. DeepSpeed hides such norms, but not such losses.
        total = sum_over_processes(torch.as_tensor(trainer.step_loss) + trainer.grad_norm)
        trainer.step_loss = torch.zeros(())
        skipped = args.fp16 and trainer.accelerator.optimizer_step_was_skipped
        self.bad = 0 if torch.isfinite(total) and not skipped else self.bad + 1
        if self.bad >= (SKIPPED_STEPS if skipped else self.limit):
            raise self.failure(state.global_step)
        steps = state.global_step - self._first_step
        if steps == UNCHANGED_STEPS or (steps >= 3 and state.global_step == state.max_steps and steps < UNCHANGED_STEPS):
            after = bit_sums(trainer.model)
            if unchanged := [part for part, total in self._before.items() if after[part] == total]:
                say(f"warning: {' and '.join(unchanged)} did not change in {steps} steps: check learning rates and data")

    def failure(self, step: int) -> InputError:
        """Return the error that ends the run after a step."""
        first = step - self.bad
        return InputError(
            f"loss or gradient was not finite in {counted(self.bad, 'consecutive step')}, starting at step {first + 1}"
            f"{self.trainer.rows_of(first)}: nothing was saved since then; check these rows, use a lower --learning_rate or a "
            "longer --warmup_steps, and restart with --resume_from_checkpoint auto"
        )


def bit_sums(model: nn.Module) -> dict[str, int]:
    """Sums of the bit patterns of the trainable weights, by part: they differ if any weight has changed."""
    sums: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        weights = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps this process's share there
        if parameter.requires_grad and weights.numel():
            bits = weights.contiguous().view({2: torch.int16, 4: torch.int32}[weights.element_size()])
            sums[part_of(name)] = sums.get(part_of(name), 0) + int(bits.sum(dtype=torch.int64))
    return sums


def find_nonfinite(model: nn.Module, optimizer: Any = None) -> str | None:
    """Return the name of a weight that is not finite on any process, or None. Must be called on all processes.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : optional
        Its parameters may be master weights.
    """
    weights = [(name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters()]
    groups = optimizer.param_groups if optimizer is not None else []
    weights += [("a master weight", parameter) for group in groups for parameter in group["params"]]
    found = None
    for name, tensor in weights:
        # The extremes take no memory, and are NaN if a weight is.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
            found = name
            break
    return next(filter(None, gather(found)), None)


class PrepareFirstStep(TrainerCallback):
    """Restores the counters of a resumed run, and stops a run that is already complete."""

    def __init__(self, trainer: FinetuningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.trainer.prepare_first_step()
        control.should_training_stop |= state.global_step >= state.max_steps
        return control
