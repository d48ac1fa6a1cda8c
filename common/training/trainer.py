"""The Trainer: planned micro-batches, complete checkpoints, learning rates by part, speed."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from common.arguments import Setup, method_name, trained_parts, uses_adapters
from common.data.batches import Lengths, PlannedBatches, accumulation_for_budget
from common.data.collator import Collator
from common.data.loader import WorkerLoader, raise_input_errors, wait_until_quiet
from common.data.samples import TrainingData
from common.data.streaming import StreamedBatches, StreamedData
from common.evaluation.predictions import Evaluation, write_evaluation
from common.model.adapters import write_base_description
from common.model.checkpoint import find_snapshot, read_tensors
from common.model.loading import autocast, base_model, set_gradient_checkpointing
from common.phi3v import Phi3VProcessor
from common.phi3v.flops import TrainingFlops, peak_flops
from common.phi3v.parts import part_of
from common.report.run import remove_report, write_run
from common.runtime import (
    InputError,
    broadcast,
    cores_per_process,
    is_main_process,
    rank,
    say,
    sum_over_processes,
    track,
    world_size,
    write_file,
)

from .checkpoints import MANIFEST, TOTALS, EarlyStopping, StopOnSignal, run_settings, saving, write_manifest
from .memory import estimate_memory, least_recomputation
from .progress import TrainingProgress
from .summary import summarize

NO_FLAGS = ("task", "metric")  # in args, but set by no flag: run.json has them elsewhere
EXIT_AFTER_SIGTERM = 128 + 15


def build_trainer(
    args: argparse.Namespace,
    setup: Setup,
    model: nn.Module,
    processor: Phi3VProcessor,
    train_data: TrainingData | StreamedData,
    eval_data: TrainingData,
    evaluate: Callable[[nn.Module], Evaluation],
    source: str,
) -> FinetuningTrainer:
    """Plan the batches, set up the Trainer, write ``run.json``, and print what is going to happen.

    Parameters
    ----------
    args : argparse.Namespace
        The script's flags.
    setup : Setup
        What :func:`common.training.start.start` settled of them.
    evaluate : callable
        Answers the evaluation's questions with a model and scores them; its predictions are in the order of ``eval_data``.
    source : str
        Where the data comes from: hub ids, separated by blanks, or a directory.
    """
    flags = {name: value for name, value in vars(args).items() if name not in NO_FLAGS}
    settled = {name: getattr(setup, name) for name in ("packing", "deepspeed")}
    settled |= {"attention": (setup.attention, setup.attention_reason), "resume_from_checkpoint": setup.checkpoint}
    settled |= {"use_lora": uses_adapters(args), "eval_steps": args.eval_steps or args.logging_steps}
    settled["dataloader_num_workers"] = min(args.dataloader_num_workers, cores_per_process())
    write_run(
        args.output_dir,
        task=args.task,
        base_model=args.model_name_or_path,
        base_revision=setup.revision,
        method=method_name(args),
        data=f"{source}: {len(train_data)} rows train, {len(eval_data)} evaluate",
        hyperparameters=flags | settled,
        datasets=[name for name in source.split() if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()],
    )
    if args.push_to_hub and is_main_process():
        # What is pushed holds no report: its pictures are the data set's, which not every licence lets pass on.
        remove_report(args.output_dir)
    batches, lengths = _plan_batches(args, setup, train_data)
    if setup.zero_stage == 3:
        base_model(model).run_same_modules_always()
    flops = TrainingFlops(base_model(model))
    trial = estimate_memory(model, args, setup, flops)
    recomputation = args.gradient_checkpointing
    if recomputation == "auto":
        recomputation = least_recomputation(trial, *batches.largest(lengths))
    set_gradient_checkpointing(model, recomputation)
    if args.torch_compile:
        for layer in base_model(model).model.layers[:-1]:  # the last one's shapes are each batch's own
            layer.compile(dynamic=True)
    trainer = FinetuningTrainer(
        flags=args,
        setup=setup,
        batches=batches,
        flops=flops,
        evaluate_task=evaluate,
        recomputation=recomputation,
        model=model,
        args=_training_arguments(args, setup, batches.accumulation),
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor, packing=setup.packing),
        processing_class=processor,
    )
    say(summarize(args, setup, model, len(train_data), batches, lengths, recomputation, trial, flops), sys.stdout)
    return trainer


def _plan_batches(
    args: argparse.Namespace, setup: Setup, data: TrainingData | StreamedData
) -> tuple[PlannedBatches | StreamedBatches, Lengths]:
    """Micro-batches of this process, and lengths to foretell their size by: of some samples, or of all if that is known."""
    order = {"seed": args.seed, "rank": rank(), "world_size": world_size()}
    if args.streaming and not isinstance(data, StreamedData):
        raise InputError("this script reads its data as a whole; leave the flag out", "--streaming")
    if isinstance(data, StreamedData):
        batches = StreamedBatches(data.rows, args.batch_size, args.batch_size_per_gpu, **order)
        if setup.checkpoint:
            trainer_state = setup.checkpoint / "trainer_state.json"
            batches.begin_at(TrainerState.load_from_json(str(trainer_state)).global_step)
        return batches, data.sample_lengths()
    accumulation = args.batch_size // (world_size() * args.batch_size_per_gpu)
    if args.max_tokens_per_batch:
        steps_an_epoch = -(-len(data) // args.batch_size)
        epochs = -(-args.max_steps // steps_an_epoch) if args.max_steps > 0 else args.num_train_epochs
        by_epoch = [data.lengths(epoch, args.tqdm) for epoch in range(epochs)]
        lengths = Lengths(*np.hstack([(epoch.tokens, epoch.views) for epoch in by_epoch]))
        accumulation = accumulation_for_budget(by_epoch, args.batch_size, args.seed, world_size(), args.max_tokens_per_batch)
    else:
        lengths = data.sample_lengths()
    batches = PlannedBatches(
        len(data),
        args.batch_size,
        **order,
        accumulation=accumulation,
        measure=data.measure if setup.packing else None,
        max_tokens=args.max_tokens_per_batch,
        vision_trains="vision" in trained_parts(args),
    )
    return batches, lengths


class FinetuningTrainer(Trainer):
    """A Trainer whose micro-batches come from a plan, whose checkpoints are complete or passed over, and which logs its speed.

    Parameters
    ----------
    flags : argparse.Namespace
        The script's flags.
    setup : Setup
        What was settled of them.
    batches : PlannedBatches or StreamedBatches
        Micro-batches of this process.
    evaluate_task : callable
        Scores a model on the task.
    flops : TrainingFlops
        Counts what a batch costs.
    recomputation : {"none", "selective", "full"}
        What was chosen, for the benchmark to record.
    """

    def __init__(
        self,
        *args: Any,
        flags: argparse.Namespace,
        setup: Setup,
        batches: PlannedBatches | StreamedBatches,
        flops: TrainingFlops,
        evaluate_task: Callable[[nn.Module], Evaluation],
        recomputation: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flags = flags
        self.setup = setup
        self.result: TrainOutput | None = None
        self.batches = batches
        self.flops = flops
        self.evaluate_task = evaluate_task
        self.recomputation = recomputation
        # One bar or plain lines of our own, instead of a bar and a dict per log line.
        self.remove_callback(PrinterCallback)
        self.add_callback(TrainingProgress(flags.tqdm))
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)
        if flags.early_stopping_patience:
            self.add_callback(EarlyStopping(flags.early_stopping_patience))
        if self.accelerator.ddp_handler:
            # Gradients lie in DDP's buckets instead of beside them.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.began = 0.0  # when training did, the time of a resumed run's earlier sessions included
        self.add_callback(_Beginning(self))  # last: it may evaluate and stop
        self._done = torch.zeros(3, dtype=torch.float64)  # images, tokens, FLOPs since the last log line
        self._counting_since: float | None = None

    def get_train_dataloader(self) -> DataLoader:
        # The Trainer takes all micro-batches of a step before it begins with the first.
        return self._loader(self.train_dataset, self.batches, ahead=self.batches.accumulation)

    def get_eval_dataloader(self, eval_dataset: TrainingData | None = None) -> DataLoader:
        size = self.flags.batch_size_per_gpu
        rows = [(0, row) for row in range(len(self.eval_dataset))]
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        self._eval_batches = len(batches[rank() :: world_size()])
        if self.setup.zero_stage == 3:
            # All processes gather every layer's weights together: none may have a batch more than another.
            batches += [batches[-1]] * (-len(batches) % world_size())
        return self._loader(self.eval_dataset, batches[rank() :: world_size()])

    def _loader(self, data: TrainingData | StreamedData, batches: Any, ahead: int = 0) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return _PlannedLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            ahead=ahead,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Seeds of workers come from here: starting workers must not move the random numbers that dropout draws.
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
                if members:
                    groups.append({**group, "params": members, "lr": rates.get(name) or group["lr"]})
        optimizer.param_groups[:] = groups
        return optimizer

    def evaluate_before(self) -> None:
        """Score the model on the task before it is trained, into ``eval_before.json``; a run that resumes has done so."""
        path = self.flags.output_dir / "eval_before.json"
        if not broadcast(self.setup.checkpoint is not None and path.is_file()):
            before = self.evaluate_task(self.model)
            write_evaluation(path, before)
            say(f"before finetuning: {before}", sys.stdout)
            # At step 0, once those that --report_to names listen.
            self.add_callback(_LogAtBeginning(self, before.logs))

    def train(self) -> TrainOutput:
        """Train, from the checkpoint to resume from if there is one. SIGTERM ends the process once a checkpoint is saved."""
        self.result = super().train(resume_from_checkpoint=self.setup.checkpoint)
        if self.stop_on_signal.stopped:
            say(f"stopped by SIGTERM after step {self.state.global_step}; --resume_from_checkpoint auto goes on", sys.stdout)
            sys.exit(EXIT_AFTER_SIGTERM)
        return self.result

    def save_result(self) -> None:
        """Write the model or adapter, the processor, ``train_results.json`` and ``trainer_state.json``."""
        with saving():
            self.save_model(_internal_call=True)  # without pushing, which comes last
            self.save_metrics("train", self.result.metrics, combined=False)
            self.save_state()
        if self.stop_on_signal.end():
            say(f"stopped by SIGTERM after training; the result is in {self.flags.output_dir}, but not evaluated", sys.stdout)
            sys.exit(EXIT_AFTER_SIGTERM)

    def evaluate_after(self) -> None:
        """Score the trained model on the task, into ``eval_after.json``."""
        after = self.evaluate_task(self.model)
        write_evaluation(self.flags.output_dir / "eval_after.json", after)
        self.log(after.logs)
        say(f"after finetuning: {after}; results are in {self.flags.output_dir}", sys.stdout)

    def report(self) -> None:
        """Write the model card, push what was asked to be pushed, and write ``report.html``."""
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

    def _write_counters(self, directory: Path) -> None:
        """Write what the Trainer counts anew in every session into a checkpoint; all processes together."""
        running_loss = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        totals = {
            "loss": self._total_loss_scalar,
            "running_loss": running_loss,  # of each process, since the last log line
            "settings": run_settings(self.flags, self.setup.zero_stage, world_size()),
            "last_logged": self._globalstep_last_logged,
            "seconds": time.time() - self.began,
            "evaluation_due": self.stop_on_signal.evaluation_due,
        }
        if self.args.should_save:
            write_file(directory / TOTALS, totals)

    def continue_counting(self) -> None:
        """Go on with the checkpoint's counters, so that figures are the whole run's, and make up for a missed evaluation."""
        self.began = time.time()
        # A Trainer that resumes goes by the intervals of the checkpoint, whatever the flags say by now.
        self.state.compute_steps(self.args, self.state.max_steps)
        checkpoint = self.setup.checkpoint
        if not checkpoint or not (checkpoint / TOTALS).exists():
            return
        totals = json.loads((checkpoint / TOTALS).read_text())
        running = totals["running_loss"]
        self._tr_loss += running[rank()] if len(running) == world_size() else sum(running) / len(running)
        self._total_loss_scalar, self._globalstep_last_logged = totals["loss"], totals["last_logged"]
        self._initial_global_step = 0
        self.began -= totals["seconds"]
        if totals["evaluation_due"] and self._determine_best_metric(self._evaluate(None, None), None):
            self.state.best_model_checkpoint = str(checkpoint)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        # A resumed epoch's loader is accelerate's own.
        return super().get_batch_samples(raise_input_errors(epoch_iterator), *args, **kwargs)

    # Between the callbacks' beginning and the first batch there is no public seam to end a run that was done already.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:
            if self.args.dataloader_num_workers:
                wait_until_quiet()  # a resumed epoch's loader is accelerate's own, which does not
            super()._run_epoch(*args, **kwargs)

    # The only way to give train_results.json the time since the run began, and the last say on the best checkpoint.
    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if self.stop_on_signal.stopped:
            # The best checkpoint is for the end of the run; until then the last one is what it goes on from.
            self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        return super()._finalize_training(trial, num_train_samples, self.began)

    # The Trainer would move all tensors, and wait for each.
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Copy a batch while the device still computes the last one, but for what the model reads on the CPU."""
        stay = ("image_sizes", "answer_spans")
        return {
            name: value.to(self.args.device, non_blocking=True) if torch.is_tensor(value) and name not in stay else value
            for name, value in inputs.items()
        }

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._counting_since is None:
            self._counting_since = time.perf_counter()
        sizes = self.flops.sizes(inputs)
        images = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        self._done += torch.tensor([images, sizes.tokens, sum(self.flops.count(sizes))], dtype=torch.float64)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            done, now = self._done.to(self.args.device), time.perf_counter()
            images, tokens, flops = (sum_over_processes(done) / (now - self._counting_since)).tolist()
            logs |= {"images_per_second": round(images, 3), "tokens_per_second": round(tokens, 1)}
            if peak := peak_flops(self.args.device):
                logs["mfu"] = round(flops / (peak * self.args.world_size), 4)
            self._done.zero_()
            self._counting_since = now
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Loss by supervised token over all processes and, every ``--eval_metric_steps``, the task's metric."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        with autocast(self.model, self.flags.bf16):
            for number, inputs in enumerate(track(dataloader, "Evaluating the loss", "batches", self.flags.tqdm)):
                inputs = self._prepare_inputs(inputs)
                loss = self.model(**inputs, num_items_in_batch=1, skip_logits=True).loss
                if number < self._eval_batches:
                    totals += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()])
        totals = sum_over_processes(totals.float().to(self.args.device))
        metrics = {"eval_loss": (totals[0] / totals[1]).item()}
        every = self.flags.eval_metric_steps
        if every and (self.state.global_step % every == 0 or self.state.global_step >= self.state.max_steps):
            metrics |= self.evaluate_task(self.model).logs
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._not_counted():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        """Leave what takes place between two steps out of the speed of training."""
        began = time.perf_counter()
        yield
        if self._counting_since is not None:
            self._counting_since += time.perf_counter() - began

    # Public seams come before and after a checkpoint of one process, none before and after that of all.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._not_counted():
            self._save_complete_checkpoint(*args, **kwargs)

    def _save_complete_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Written over, a checkpoint is torn until it is complete again.
            (directory / MANIFEST).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        # Old checkpoints go only once this one is complete on every process.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving():
            super()._save_checkpoint(*args, **kwargs)
            self._write_counters(directory)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.is_deepspeed_enabled and not (directory / "latest").exists():
                    # DeepSpeed names the folder of its states on the first machine's disk alone.
                    (directory / "latest").write_text(f"global_step{self.state.global_step}")
                write_manifest(directory)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    # save_model gathers what DeepSpeed has shared out, then calls this to write it.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options, dtype = {}, None
        if hasattr(model, "peft_config"):
            # An adapter on lm_head makes PEFT store the base's whole head beside it unless told not to.
            options["save_embedding_layers"] = False
            write_base_description(directory, model)
        elif directory == Path(self.args.output_dir):
            # The result has the base's dtype; checkpoints keep the training's, to go on exactly.
            base = find_snapshot(self.flags.model_name_or_path, self.setup.revision)
            dtype = AutoConfig.from_pretrained(base).dtype or model.dtype
            state_dict = {name: tensor.to(dtype) for name, tensor in (state_dict or model.state_dict()).items()}
            # DeepSpeed casts what is frozen, too, and fp16 has not all of bf16's values: what did not train is the base's.
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            state_dict |= read_tensors(base, frozen)
        # transformers lets nobody but the first process of all machines write; who saves has been decided above.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(directory, state_dict=state_dict, **options)
        if dtype:
            # transformers has written that of the model that trained.
            model.config.dtype = dtype
            model.config.save_pretrained(directory)
        for path in directory.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets the owner alone read its files
        self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card to :mod:`common.report.model_card`, which the end of a run writes."""


class _Beginning(TrainerCallback):
    """Continues a resumed run's counters, and ends a run that was done already."""

    def __init__(self, trainer: FinetuningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.trainer.continue_counting()
        control.should_training_stop |= state.global_step >= state.max_steps
        return control


class _LogAtBeginning(TrainerCallback):
    def __init__(self, trainer: Trainer, logs: dict[str, float]) -> None:
        self.trainer, self.logs = trainer, logs

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.log(self.logs)


class _PlannedLoader(WorkerLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _training_arguments(args: argparse.Namespace, setup: Setup, accumulation: int) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    by_metric = args.eval_metric_steps is not None
    best = {"metric_for_best_model": f"eval_{args.metric}" if by_metric else "eval_loss", "greater_is_better": by_metric}
    return TrainingArguments(
        output_dir=str(args.output_dir),
        use_cpu=not on_gpu,  # without it, CPU processes train apart and nobody says so
        bf16=args.bf16,
        fp16=on_gpu and not args.bf16,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=accumulation,
        optim=args.optim,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        learning_rate=args.learning_rate,
        weight_decay=args.wd,
        max_grad_norm=1.0,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        logging_steps=args.logging_steps,
        # It waits for the device at every micro-batch; only with fp16, whose scaler skips steps, may a loss be none for once.
        logging_nan_inf_filter=on_gpu and not args.bf16,
        report_to=args.report_to,
        run_name=args.output_dir.name,
        disable_tqdm=True,  # FinetuningTrainer shows its own
        save_strategy=args.save_strategy,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        save_on_each_node=args.save_on_each_node,
        eval_strategy=args.eval_strategy,
        eval_steps=args.eval_steps,
        load_best_model_at_end=args.load_best_model_at_end,
        **(best if args.load_best_model_at_end else {}),
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_num_workers=args.dataloader_num_workers,
        ddp_find_unused_parameters=False,
        deepspeed=setup.deepspeed,
        push_to_hub=args.push_to_hub,
        hub_model_id=args.hub_model_id,
        hub_private_repo=args.hub_private_repo or None,
    )
