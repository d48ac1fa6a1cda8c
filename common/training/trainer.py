"""The Trainer of a run: planned micro-batches, complete checkpoints, learning rates per part, throughput."""

from __future__ import annotations

import argparse
import math
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from common.arguments import Setup
from common.data.batches import PlannedBatches
from common.data.loader import WorkerLoader, raise_input_errors, release_memory, wait_until_quiet
from common.data.samples import TrainingData, filler
from common.data.streaming import StreamedBatches, StreamedData
from common.evaluation.predictions import Evaluation, write_evaluation
from common.model.checkpoint import find_snapshot, read_tensors
from common.model.checks import first_line
from common.model.loading import autocast
from common.phi3v import Phi3VProcessor
from common.phi3v.flops import TrainingFlops
from common.runtime.collectives import (
    Interrupted,
    gather,
    interrupted,
    on_main_process,
    raise_if_interrupted,
    set_timeout,
    sum_over_processes,
)
from common.runtime.files import read_json, replacing, write_file
from common.runtime.process import InputError, counted, is_main_process, rank, say, world_size
from common.runtime.progress import Progress

from .callbacks import CheckNumbers, EarlyStopping, PrepareFirstStep, StopOnSignal, find_nonfinite
from .checkpoints import MANIFEST, TOTALS, checkpoint_of_step, read_totals, rotate_checkpoints, write_manifest
from .optimizer import MasterWeights, group_by_part, restore_settings
from .output import BAD_SAMPLES, check_output_dir_locked, count_bad_samples, note_bad_sample
from .progress import TrainingProgress
from .resuming import find_best_checkpoint
from .saving import saving, write_model, write_result
from .throughput import Throughput

NAMED_ROWS = 8


class FinetuningTrainer(Trainer):
    """A Trainer with planned micro-batches, checkpoints that are verified to be complete, and logged throughput."""

    # What transformers declares as possibly None, or as a choice of types that the recipes do not make.
    model: nn.Module
    processing_class: Phi3VProcessor
    train_dataset: TrainingData | StreamedData
    eval_dataset: TrainingData
    masters: MasterWeights | None = None  # of bf16 weights without DeepSpeed
    logs_before: dict[str, float] | None = None  # of the evaluation before training
    # Of the current step, read and reset by CheckNumbers.
    step_loss: torch.Tensor | float = 0.0
    grad_norm: Any = 0.0

    def __init__(
        self,
        *args: Any,
        flags: argparse.Namespace,
        setup: Setup,
        identity: dict[str, Any],  # what must not change when the run is resumed, by name
        batches: PlannedBatches | StreamedBatches,  # micro-batches of this process
        flops: TrainingFlops,
        evaluate_task: Callable[[nn.Module], Evaluation],
        recomputation: str,  # the mode, which the benchmark records
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flags = flags
        self.setup = setup
        self.identity = identity
        self.result: TrainOutput | None = None
        self.batches = batches
        self.evaluate_task = evaluate_task
        self.recomputation = recomputation
        # Replaces the Trainer's progress bar and the dict that it prints per log entry.
        self.remove_callback(PrinterCallback)
        self.add_callback(TrainingProgress(flags.tqdm))
        self.stop_on_signal = StopOnSignal()
        self.check_numbers = CheckNumbers(self, flags.max_nonfinite_steps)
        self.add_callback(self.check_numbers)
        self.add_callback(self.stop_on_signal)
        if flags.early_stopping_patience:
            self.add_callback(EarlyStopping(flags.early_stopping_patience))
        if self.accelerator.ddp_handler:
            # Saves memory: gradients are views into DDP's buckets instead of copies.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.start_time = 0.0  # of training, moved back by the training time before a resume
        self.add_callback(PrepareFirstStep(self))  # last, because it may evaluate and stop
        self.throughput = Throughput(flops, self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        # The Trainer fetches all micro-batches of a step before it runs the first one.
        ahead = self.batches.accumulation
        spare = filler(self.processing_class) if self.flags.on_bad_sample == "skip" else None
        release_memory()  # before workers are forked for the whole training
        return self._loader(self.train_dataset, self.batches, ahead=ahead, filler=spare)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        size = self.setup.batch_size_per_gpu
        rows = [(0, row) for row in range(len(self.eval_dataset))]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._num_eval_batches = len(batches[rank() :: world_size()])
        if self.setup.zero_stage == 3:
            # ZeRO-3 gathers the weights of each layer collectively, so all processes need the same number of batches.
            batches += [batches[-1]] * (-len(batches) % world_size())
        return self._loader(self.eval_dataset, batches[rank() :: world_size()])

    def _loader(self, data: TrainingData | StreamedData, batches: Any, **options: Any) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return _PlannedLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            timeout=self.flags.ddp_timeout,
            **options,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A separate generator for the worker seeds: starting workers must not change the random numbers of dropout.
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        rates = {"vision": self.flags.vision_learning_rate, "projector": self.flags.projector_learning_rate}
        self._settings_of_groups = group_by_part(optimizer, self.model, rates)
        weights = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.dtype == torch.bfloat16
        }
        if weights and not self.is_deepspeed_enabled:
            saved = read_tensors(self.setup.checkpoint, list(weights)) if self.setup.checkpoint else None
            self.masters = MasterWeights(optimizer, weights, saved)
        return optimizer

    def evaluate_before(self) -> None:
        """Evaluate the model before training and write ``eval_before.json``. A resumed run keeps a file with all answers."""
        if not (self.setup.checkpoint and on_main_process(lambda: self._answers_before() is not None)):
            before = self.evaluate_task(self.model)
            write_evaluation(self.flags.output_dir / "eval_before.json", before)
            say(f"before finetuning: {before}", sys.stdout)
            self.logs_before = before.logs

    def train(self) -> TrainOutput:  # type: ignore[override]  # the checkpoint was chosen at the start
        """Train, resuming from the checkpoint if there is one. After SIGTERM, save a checkpoint and exit."""
        try:
            self.result = super().train(str(self.setup.checkpoint) if self.setup.checkpoint else None)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"a file may run code or is damaged, and is not loaded ({first_line(error)}): use another checkpoint",
                f"--resume_from_checkpoint {self.setup.checkpoint}",
            ) from error
        if self.stop_on_signal.stopped:
            self._exit_if_stopped(f"after step {self.state.global_step}; resume with --resume_from_checkpoint auto")
        return self.result

    def save_result(self) -> None:
        """Write the model or adapter, the processor, ``train_results.json`` and ``trainer_state.json``."""
        assert self.result is not None, "called after train()"
        on_main_process(lambda: check_output_dir_locked(self.flags.output_dir))
        self.require_finite("result")
        # With --save_on_each_node, every machine has a list of its own.
        skipped = sum(gather(count_bad_samples(self.flags.output_dir) if self.args.should_save else 0))
        with saving():
            self.save_model(_internal_call=True)  # without pushing, which is done at the end
            if self.args.should_save:
                if skipped:
                    say(f"{counted(skipped, 'sample')} skipped in training, see {self.flags.output_dir / BAD_SAMPLES}")
                    self.result.metrics["skipped_samples"] = skipped
                write_file(self.flags.output_dir / "train_results.json", self.result.metrics)
                with replacing(self.flags.output_dir / TRAINER_STATE_NAME) as temporary:
                    self.state.save_to_json(str(temporary))
        self._exit_if_stopped(f"after training; the model is saved in {self.flags.output_dir}, but not evaluated")

    def _exit_if_stopped(self, when: str) -> None:
        """Exit if any process has received SIGTERM or SIGINT. Called on all processes."""
        if number := self.stop_on_signal.end():
            say(f"stopped by {signal.Signals(number).name} {when}", sys.stdout)
            sys.exit(128 + number)

    def evaluate_after(self) -> None:
        """Evaluate the trained model and write ``eval_after.json``."""
        after = self.evaluate_task(self.model)
        write_evaluation(self.flags.output_dir / "eval_after.json", after)
        self.log(after.logs)
        try:
            if is_main_process() and self._answers_before() == [entry.prediction for entry in after.predictions]:
                say("warning: no answer differs from before training; check the learning rate and the data")
        except InputError as error:  # only for the comparison; the result is saved
            say(f"warning: {error}")
        say(f"after finetuning: {after}; results saved in {self.flags.output_dir}", sys.stdout)

    def _answers_before(self) -> list[str] | None:
        """Return the answers in ``eval_before.json``, or None if it does not have those of the evaluation rows."""
        path = self.flags.output_dir / "eval_before.json"
        found = read_json(path, "delete it") if path.is_file() else {}
        if (found.get("metric"), found.get("samples")) != (self.flags.metric, len(self.eval_dataset)):
            return None
        try:
            answers = [entry["prediction"] for entry in found["predictions"]]
        except (KeyError, TypeError):
            return None
        return answers if len(answers) == len(self.eval_dataset) else None

    def report(self) -> None:
        """Write the model card, push to the Hub with ``--push_to_hub``, and write ``report.html``."""
        from common.report.model_card import write_model_card
        from common.report.page import report_run

        output_dir = self.flags.output_dir
        if is_main_process():
            try:
                write_model_card(output_dir, name=self.hub_model_id)  # with the user's name, which the flag may leave out
            except InputError as error:  # a file of the run was deleted or changed; the result is saved
                say(f"warning: README.md was not written: {error}")
        try:
            if self.flags.push_to_hub:
                self.push_to_hub()
        finally:
            if is_main_process():
                report_run(output_dir, lambda row: self.eval_dataset.conversation(0, row))

    def _write_totals(self, directory: Path) -> None:
        """Save the counters that the Trainer would reset on resume, and the run's identity. Called on all processes."""
        running_loss = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        totals = {
            "loss": self._total_loss_scalar,
            "running_loss": running_loss,  # per process, since the last log entry
            "settings": self.identity,
            "last_logged": self._globalstep_last_logged,
            "seconds": time.time() - self.start_time,
            "evaluation_due": self.stop_on_signal.evaluation_due,
        }
        if self.args.should_save:
            write_file(directory / TOTALS, totals)

    def require_finite(self, what: str) -> None:
        """End the run on all processes if a weight is not finite, before something is saved."""
        if name := find_nonfinite(self.model, self.optimizer):
            raise InputError(
                f"{name} is not finite after step {self.state.global_step}{self.rows_of(self.state.global_step - 1)}: the "
                f"{what} was not saved, earlier checkpoints are intact; use a lower --learning_rate, or check these rows"
            )

    def rows_of(self, step: int) -> str:
        """Name the rows of a step, counted from 0, for messages; empty for streamed rows."""
        rows = self.batches.rows_of_step(step)
        names = [self.train_dataset.place(row) for row in rows[:NAMED_ROWS]]
        more = f" and {counted(len(rows) - NAMED_ROWS, 'other')}" if len(rows) > NAMED_ROWS else ""
        return f" ({', '.join(names)}{more})" if rows else ""

    def prepare_first_step(self) -> None:
        """Start the clock; on resume, restore counters, reapply flags, and do an evaluation that SIGTERM prevented."""
        self.start_time = time.time()
        # On resume, the Trainer would use the intervals saved in the checkpoint instead of the current flags.
        self.state.compute_steps(self.args, self.state.max_steps)
        set_timeout(self.flags.ddp_timeout)  # also of the groups that DeepSpeed has created
        if self.logs_before and self.state.global_step == 0:
            self.log(self.logs_before)  # now that the --report_to integrations are set up
        checkpoint = self.setup.checkpoint
        if not checkpoint:
            return
        restore_settings(self.optimizer, self.lr_scheduler, self._settings_of_groups)
        if name := find_nonfinite(self.model, self.optimizer):
            raise InputError(f"{name} is not finite: use an earlier one", f"--resume_from_checkpoint {checkpoint}")
        find_best_checkpoint(self.state, self.args.metric_for_best_model, checkpoint)
        totals = read_totals(checkpoint)
        running = totals["running_loss"]
        self._tr_loss += running[rank()] if len(running) == world_size() else sum(running) / len(running)
        self._total_loss_scalar, self._globalstep_last_logged = totals["loss"], totals["last_logged"]
        self._initial_global_step = 0
        self.start_time -= totals["seconds"]
        if totals["evaluation_due"] and self._determine_best_metric(self._evaluate(None, None), None):
            self.state.best_model_checkpoint = str(checkpoint)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        # On resume, accelerate replaces the loader of the epoch by its own.
        batches, tokens = super().get_batch_samples(raise_input_errors(epoch_iterator), *args, **kwargs)
        if self.flags.on_bad_sample == "skip":
            step = self.state.global_step + 1
            for message in chain.from_iterable(batch.pop("skipped", ()) for batch in batches):
                note_bad_sample(self.flags.output_dir, step, message)
            if tokens == 0:
                raise InputError(f"all samples of step {step} are unusable: see {self.flags.output_dir / BAD_SAMPLES}")
        return batches, tokens

    # Overridden because callbacks do not get the gradient norm of a step, and to clip the gradients of the fp32 masters.
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.masters is None:
            self.grad_norm = super()._clip_grad_norm(model)
        else:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.masters.take_gradients(), self.args.max_grad_norm)
        return self.grad_norm

    # Overridden because no public method is called between on_train_begin and the first batch, where a run that is already
    # complete has to stop.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:
            if self.args.dataloader_num_workers:
                wait_until_quiet()  # accelerate's loader, used on resume, does not do this
            super()._run_epoch(*args, **kwargs)

    # Overridden to measure the training time from the start of the run, and to load the best checkpoint only at its end.
    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        best = self.state.best_model_checkpoint
        if self.stop_on_signal.stopped:
            self.args.load_best_model_at_end = False
        elif self.args.load_best_model_at_end and best and not on_main_process(Path(best).is_dir):
            say(
                f"warning: the best checkpoint, {best}, was deleted during the run: the weights of the last step are the result"
            )
            self.args.load_best_model_at_end = False
        return super()._finalize_training(trial, num_train_samples, self.start_time)

    # Overridden because the Trainer would move all tensors, and wait for each copy.
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copy a batch to the device without waiting, except for ``image_sizes``, which the model reads on the CPU."""
        return {
            name: value.to(self.args.device, non_blocking=True) if torch.is_tensor(value) and name != "image_sizes" else value
            for name, value in inputs.items()
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.throughput.add(inputs)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            if "loss scale already at minimum" not in str(error):  # raised by DeepSpeed after an overflow, on all processes
                raise
            self.check_numbers.bad += 1
            raise self.check_numbers.failure(self.state.global_step + 1) from error
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self.throughput.take()
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Compute the loss per supervised token over all processes and, every ``--eval_metric_steps``, the task's metric."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        with autocast(self.model, self.flags.bf16):
            inputs: dict[str, Any]
            total = -(-len(self.eval_dataset) // self.setup.batch_size_per_gpu)
            with Progress("Evaluating the loss", "batches", total, self.flags.tqdm, shared=True) as progress:
                for number, inputs in enumerate(dataloader):
                    if interrupted():
                        break
                    inputs = self._prepare_inputs(inputs)
                    # num_items_in_batch=1: the sum over the supervised tokens, not their mean.
                    loss = self.model(**inputs, num_items_in_batch=1, skip_logits=True).loss
                    if number < self._num_eval_batches:
                        totals += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()])
                    progress.update()
        raise_if_interrupted()
        totals = sum_over_processes(totals.float().to(self.args.device))
        metrics = {"eval_loss": (totals[0] / totals[1]).item()}
        every = self.flags.eval_metric_steps
        if every and (self.state.global_step % every == 0 or self.state.global_step >= self.state.max_steps):
            metrics |= self.evaluate_task(self.model).logs
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.throughput.excluded():
            try:
                return super().evaluate(*args, **kwargs)
            except Interrupted:  # there may be no time for it: save and stop
                self.stop_on_signal.stop(self.control, evaluation_due=True)
                return {self.args.metric_for_best_model or "eval_loss": math.nan}  # which is never the best

    # Overridden because the public callbacks are called per process, and not before and after all processes have saved.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        step, output_dir = self.state.global_step, self.flags.output_dir
        directory = checkpoint_of_step(output_dir, step)
        with self.throughput.excluded():
            on_main_process(lambda: check_output_dir_locked(output_dir))
            self.require_finite("checkpoint")
            if self.args.should_save:
                # A checkpoint that is overwritten is incomplete until all of it is written again.
                (directory / MANIFEST).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            with saving():
                super()._save_checkpoint(*args, **kwargs)
                self._write_totals(directory)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if self.is_deepspeed_enabled:
                        # DeepSpeed writes this file only on the first node. Others need it if they have their own disks.
                        (directory / "latest").write_text(f"global_step{step}")
                    write_manifest(directory)
            self.accelerator.wait_for_everyone()
            # Old checkpoints are deleted only after this one is complete on all processes.
            if self.args.should_save:
                rotate_checkpoints(output_dir, step, self.flags.save_total_limit, self.state.best_model_checkpoint)

    # Overridden to choose the format. save_model gathers DeepSpeed's shards, then calls this method to write them.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.flags.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if directory == self.flags.output_dir:
            base = find_snapshot(self.setup.base, self.setup.revision)
            write_result(directory, model, self.processing_class, state_dict, base)
        else:  # with the training dtype, to resume exactly
            if self.masters:
                state_dict = (state_dict or model.state_dict()) | self.masters.fp32
            write_model(directory, model, self.processing_class, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: :mod:`common.report.model_card` writes the model card at the end of the run."""


class _PlannedLoader(WorkerLoader):
    batch_sampler: PlannedBatches | StreamedBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
