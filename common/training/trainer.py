"""The Trainer of a run: planned micro-batches, complete checkpoints, learning rates per part, throughput."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, PrinterCallback, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from common.arguments import Setup
from common.data.batches import PlannedBatches, epoch_steps
from common.data.loader import WorkerLoader, raise_input_errors, release_memory, wait_until_quiet
from common.data.samples import TrainingData, filler
from common.data.streaming import StreamedBatches, StreamedData
from common.evaluation.predictions import Evaluation, write_evaluation
from common.model.adapters import write_base_description
from common.model.checkpoint import find_snapshot, read_tensors
from common.model.checks import first_line
from common.model.loading import autocast
from common.phi3v import Phi3VProcessor
from common.phi3v.flops import TrainingFlops, peak_flops
from common.phi3v.parts import part_of
from common.runtime.collectives import broadcast, set_timeout, sum_over_processes
from common.runtime.files import read_json, replacing, write_file
from common.runtime.process import InputError, counted, is_main_process, rank, say, world_size
from common.runtime.progress import Progress

from .callbacks import CheckNumbers, EarlyStopping, LogAtStart, PrepareFirstStep, StopOnSignal, find_nonfinite
from .checkpoints import MANIFEST, TOTALS, saving, write_manifest
from .masters import MasterWeights
from .output import BAD_SAMPLES, SAVING, note_bad_sample
from .progress import TrainingProgress

NAMED_ROWS = 8
# DeepSpeed makes one tensor of each group of parameters, and bitsandbytes counts its elements in 32 bits.
GROUP_ELEMENTS = 2**31 - 1


class FinetuningTrainer(Trainer):
    """A Trainer with planned micro-batches, checkpoints that are verified to be complete, and logged throughput.

    Parameters
    ----------
    flags : argparse.Namespace
        The script's flags.
    setup : Setup
        The settings determined from them at the start.
    identity : dict
        What must not change when the run is resumed, by name.
    batches : PlannedBatches or StreamedBatches
        Micro-batches of this process.
    evaluate_task : callable
        Scores a model on the task.
    flops : TrainingFlops
        Counts the FLOPs of a batch.
    recomputation : {"none", "elementwise", "vision", "selective", "full"}
        The chosen mode, which the benchmark records.
    """

    # What transformers declares as possibly None, or as a choice of types that the recipes do not make.
    model: nn.Module
    processing_class: Phi3VProcessor
    train_dataset: TrainingData | StreamedData
    eval_dataset: TrainingData
    masters: MasterWeights | None = None  # of bf16 weights without DeepSpeed
    # Of the current step, read and reset by CheckNumbers.
    step_loss: torch.Tensor | float = 0.0
    grad_norm: Any = 0.0

    def __init__(
        self,
        *args: Any,
        flags: argparse.Namespace,
        setup: Setup,
        identity: dict[str, Any],
        batches: PlannedBatches | StreamedBatches,
        flops: TrainingFlops,
        evaluate_task: Callable[[nn.Module], Evaluation],
        recomputation: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flags = flags
        self.setup = setup
        self.identity = identity
        self.result: TrainOutput | None = None
        self.batches = batches
        self.flops = flops
        self.evaluate_task = evaluate_task
        self.recomputation = recomputation
        # Replaces the Trainer's progress bar and the dict that it prints per log entry.
        self.remove_callback(PrinterCallback)
        self.add_callback(TrainingProgress(flags.tqdm))
        self.stop_on_signal = StopOnSignal()
        self.add_callback(CheckNumbers(self, flags.max_nonfinite_steps))
        self.add_callback(self.stop_on_signal)
        if flags.early_stopping_patience:
            self.add_callback(EarlyStopping(flags.early_stopping_patience))
        if self.accelerator.ddp_handler:
            # Saves memory: gradients are views into DDP's buckets instead of copies.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.start_time = 0.0  # of training, moved back by the training time before a resume
        self.add_callback(PrepareFirstStep(self))  # last, because it may evaluate and stop
        self._processed = torch.zeros(3, dtype=torch.float64)  # images, tokens, FLOPs since the last log entry
        self._measuring_since: float | None = None

    def get_train_dataloader(self) -> DataLoader:
        # The Trainer fetches all micro-batches of a step before it runs the first one.
        skip = self.flags.on_bad_sample == "skip"
        release_memory()  # before workers are forked for the whole training
        return self._loader(
            self.train_dataset,
            self.batches,
            ahead=self.batches.accumulation,
            filler=filler(self.processing_class) if skip else None,
        )

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
            **options,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A separate generator for the worker seeds: starting workers must not change the random numbers of dropout.
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        rates = {"vision": self.flags.vision_learning_rate, "projector": self.flags.projector_learning_rate}
        part = {parameter: part_of(name) for name, parameter in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for name in ("decoder", "vision", "projector"):
                members = [parameter for parameter in group["params"] if part[parameter] == name]
                for some in split_parameters(members, GROUP_ELEMENTS):
                    groups.append({**group, "params": some, "lr": rates.get(name) or group["lr"]})
        optimizer.param_groups[:] = groups
        weights = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and parameter.dtype == torch.bfloat16
        }
        if weights and not self.is_deepspeed_enabled:
            saved = read_tensors(self.setup.checkpoint, list(weights)) if self.setup.checkpoint else None
            self.masters = MasterWeights(optimizer, weights, saved)
        self._settings_of_groups = [(group["lr"], group["weight_decay"]) for group in groups]
        return optimizer

    def evaluate_before(self) -> None:
        """Evaluate the model before training and write ``eval_before.json``. A resumed run keeps the existing file."""
        path = self.flags.output_dir / "eval_before.json"
        if not broadcast(self.setup.checkpoint is not None and path.is_file()):
            before = self.evaluate_task(self.model)
            write_evaluation(path, before)
            say(f"before finetuning: {before}", sys.stdout)
            # Logged at step 0, when the --report_to integrations are set up.
            self.add_callback(LogAtStart(self, before.logs))

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
        self.require_finite("the result is")
        with saving():
            self.save_model(_internal_call=True)  # without pushing, which is done at the end
            if self.args.should_save:
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
        path = self.flags.output_dir / "eval_before.json"
        if is_main_process() and path.is_file():
            before = read_json(path, "delete it").get("predictions", [])
            if [entry["prediction"] for entry in before] == [entry.prediction for entry in after.predictions]:
                say("warning: no answer differs from before training; check the learning rate and the data")
        write_evaluation(self.flags.output_dir / "eval_after.json", after)
        self.log(after.logs)
        say(f"after finetuning: {after}; results saved in {self.flags.output_dir}", sys.stdout)

    def report(self) -> None:
        """Write the model card, push to the Hub with ``--push_to_hub``, and write ``report.html``."""
        from common.report.model_card import write_model_card
        from common.report.page import report_run

        output_dir = self.flags.output_dir
        if is_main_process():
            write_model_card(output_dir, name=self.flags.hub_model_id)
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
                f"{name} is not finite after step {self.state.global_step}{self.rows_of(self.state.global_step - 1)}: {what} "
                "not saved, earlier checkpoints are intact; use a lower --learning_rate, or check these rows"
            )

    def rows_of(self, step: int) -> str:
        """Name the rows of a step, counted from 0, for messages; empty for streamed rows."""
        batches = self.batches
        if not isinstance(batches, PlannedBatches) or not isinstance(self.train_dataset, TrainingData):
            return ""
        epoch, number = divmod(step, len(batches) // batches.accumulation)
        rows = sorted(set(epoch_steps(batches.num_rows, batches.batch_size, batches.seed, epoch)[number].tolist()))
        names = [str(self.train_dataset.place(row)) for row in rows[:NAMED_ROWS]]
        more = f" and {counted(len(rows) - NAMED_ROWS, 'other')}" if len(rows) > NAMED_ROWS else ""
        return f" ({', '.join(names)}{more})"

    def _apply_flags(self) -> None:
        """Reapply the flags' learning rates and weight decay at this step of the schedule: resuming restored the old ones."""
        scheduler: Any = self.lr_scheduler
        optimizer: Any = self.optimizer
        base = [rate for rate, _ in self._settings_of_groups]
        rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": base, "_last_lr": rates})
        for group, rate, (initial, decay) in zip(optimizer.param_groups, rates, self._settings_of_groups, strict=True):
            group |= {"lr": rate, "initial_lr": initial, "weight_decay": decay}

    def prepare_first_step(self) -> None:
        """Start the clock; on resume, restore counters, reapply flags, and do an evaluation that SIGTERM prevented."""
        self.start_time = time.time()
        # On resume, the Trainer would use the intervals saved in the checkpoint instead of the current flags.
        self.state.compute_steps(self.args, self.state.max_steps)
        set_timeout(self.flags.ddp_timeout)  # also of the groups that DeepSpeed has created
        checkpoint = self.setup.checkpoint
        if not checkpoint:
            return
        self._apply_flags()
        if name := find_nonfinite(self.model, self.optimizer):
            raise InputError(f"{name} is not finite: use an earlier one", f"--resume_from_checkpoint {checkpoint}")
        totals = read_json(checkpoint / TOTALS, "use an earlier checkpoint")
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

    # Overridden to measure the training time from the start of the run, and to keep all checkpoints after SIGTERM.
    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if self.stop_on_signal.stopped:
            # The best checkpoint is loaded only at the end of the run. Until then, the last one is needed to resume.
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        return super()._finalize_training(trial, num_train_samples, self.start_time)

    # Overridden because the Trainer would move all tensors, and wait for each copy.
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copy a batch to the device without waiting, except for ``image_sizes``, which the model reads on the CPU."""
        return {
            name: value.to(self.args.device, non_blocking=True) if torch.is_tensor(value) and name != "image_sizes" else value
            for name, value in inputs.items()
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._measuring_since is None:
            self._measuring_since = time.perf_counter()
        sizes = self.flops.sizes(inputs)
        images = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        self._processed += torch.tensor([images, sizes.tokens, sum(self.flops.count(sizes))], dtype=torch.float64)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_loss = self.step_loss + loss.detach()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            processed, now = self._processed.to(self.args.device), time.perf_counter()
            images, tokens, flops = (sum_over_processes(processed) / (now - (self._measuring_since or now))).tolist()
            logs |= {"images_per_second": round(images, 3), "tokens_per_second": round(tokens, 1)}
            if peak := peak_flops(self.args.device):
                logs["mfu"] = round(flops / (peak * self.args.world_size), 4)
            self._processed.zero_()
            self._measuring_since = now
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
                    inputs = self._prepare_inputs(inputs)
                    # num_items_in_batch=1: the sum over the supervised tokens, not their mean.
                    loss = self.model(**inputs, num_items_in_batch=1, skip_logits=True).loss
                    if number < self._num_eval_batches:
                        totals += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()])
                    progress.update()
        totals = sum_over_processes(totals.float().to(self.args.device))
        metrics = {"eval_loss": (totals[0] / totals[1]).item()}
        every = self.flags.eval_metric_steps
        if every and (self.state.global_step % every == 0 or self.state.global_step >= self.state.max_steps):
            metrics |= self.evaluate_task(self.model).logs
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._excluded_from_throughput():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _excluded_from_throughput(self) -> Iterator[None]:
        """Exclude the time spent here, between two steps, from the training throughput."""
        start = time.perf_counter()
        yield
        if self._measuring_since is not None:
            self._measuring_since += time.perf_counter() - start

    # Overridden because the public callbacks are called per process, and not before and after all processes have saved.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._excluded_from_throughput():
            self._save_complete_checkpoint(*args, **kwargs)

    def _save_complete_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.require_finite("the checkpoint is")
        directory = self.flags.output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A checkpoint that is overwritten is incomplete until all of it is written again.
            (directory / MANIFEST).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        # Old checkpoints are deleted only after this one is complete on all processes.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving():
            super()._save_checkpoint(*args, **kwargs)
            self._write_totals(directory)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.is_deepspeed_enabled and not (directory / "latest").exists():
                    # DeepSpeed writes this file only on the first node. The other nodes need it if they have their own disks.
                    (directory / "latest").write_text(f"global_step{self.state.global_step}")
                write_manifest(directory)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(self.flags.output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

    # Overridden to choose the format. save_model gathers DeepSpeed's shards, then calls this method to write them.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.flags.output_dir)
        is_result = directory == self.flags.output_dir
        if is_result:
            # The result is written to a temporary directory first, and replaces earlier files once it is complete.
            directory = directory / SAVING
            shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options, dtype = {}, None
        if hasattr(model, "peft_config"):
            # If lm_head has an adapter, PEFT by default also saves the base model's lm_head.
            options["save_embedding_layers"] = False
            write_base_description(directory, model)
        elif is_result:
            # The result is saved in the dtype of the base model. Checkpoints keep the training dtype, to resume exactly.
            base = find_snapshot(self.flags.model_name_or_path, self.setup.revision)
            dtype = AutoConfig.from_pretrained(base).dtype or model.dtype
            state_dict = {name: tensor.to(dtype) for name, tensor in (state_dict or model.state_dict()).items()}
            # DeepSpeed also casts frozen weights, and fp16 cannot represent all bf16 values: save the original frozen weights.
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            state_dict |= read_tensors(base, frozen)
        elif self.masters:
            state_dict = (state_dict or model.state_dict()) | self.masters.fp32
        # transformers would write only on the first process of all nodes. should_save above has already decided.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(directory, state_dict=state_dict, **options)
        if dtype:
            # transformers has written the training dtype.
            model.config.dtype = dtype
            model.config.save_pretrained(directory)
        for path in directory.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors creates files that only the owner can read
        self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")
        if is_result:
            for path in directory.iterdir():
                os.replace(path, self.flags.output_dir / path.name)
            directory.rmdir()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: :mod:`common.report.model_card` writes the model card at the end of the run."""


def split_parameters(parameters: list[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Split a list, in order, into lists of parameters with at most ``most`` elements together."""
    lists: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not lists or size > most:
            lists.append([])
            size = parameter.numel()
        lists[-1].append(parameter)
    return lists


class _PlannedLoader(WorkerLoader):
    batch_sampler: PlannedBatches | StreamedBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
