"""The Trainer: planned micro-batches, complete checkpoints, learning rates by part, speed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from .adapter_base import write_base_description
from .checkpoints import StopOnSignal, saving, write_manifest
from .collator import Collator
from .data import TrainingData
from .evaluation import Evaluation, autocast
from .model import count_parameters, part_of, set_gradient_checkpointing, training_precision
from .phi3v import Phi3VProcessor
from .planning import PlannedBatches, accumulation_for_budget


def build_trainer(
    args: argparse.Namespace,
    model: nn.Module,
    processor: Phi3VProcessor,
    train_data: TrainingData,
    eval_data: TrainingData,
    evaluate: Callable[[nn.Module], Evaluation],
) -> FinetuningTrainer:
    """Plan the batches and set up the Trainer; prints what is going to happen. Parameters as for :func:`finetune`."""
    state = PartialState()
    accumulation = args.batch_size // (state.num_processes * args.batch_size_per_gpu)
    if args.max_tokens_per_batch:
        accumulation = accumulation_for_budget(
            train_data.lengths(0, args.tqdm),
            args.batch_size,
            args.seed,
            args.num_train_epochs,
            state.num_processes,
            args.max_tokens_per_batch,
        )
    batches = PlannedBatches(
        num_rows=len(train_data),
        batch_size=args.batch_size,
        seed=args.seed,
        rank=state.process_index,
        world_size=state.num_processes,
        accumulation=accumulation,
        measure=(lambda epoch: train_data.lengths(epoch, args.tqdm)) if args.packing else None,
        max_tokens=args.max_tokens_per_batch,
    )
    checkpointing = args.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = "full" if state.device.type == "cuda" else "none"
    set_gradient_checkpointing(model, checkpointing)
    trainer = FinetuningTrainer(
        flags=args,
        batches=batches,
        evaluate_task=evaluate,
        model=model,
        args=_training_arguments(args, accumulation),
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor, packing=args.packing),
        processing_class=processor,
    )
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(batches) // accumulation
    trainable, total = count_parameters(model)
    attention, reason = args.attention
    state.print(
        f"model: {args.model_name_or_path}, {trainable:,} of {total:,} parameters train\n"
        f"attention: {attention} ({reason}); packing {'on' if args.packing else 'off'}\n"
        f"precision: {training_precision(args, state.device)} on {state.device.type}; "
        f"{'DeepSpeed ' + Path(args.deepspeed).name if args.deepspeed else 'DDP'}; recomputation: {checkpointing}\n"
        f"batch: {args.batch_size} samples a step over {state.num_processes} process(es), {accumulation} "
        f"micro-batch(es) each; {steps} steps on {len(train_data)} rows"
    )
    return trainer


class FinetuningTrainer(Trainer):
    """A Trainer whose micro-batches come from a plan, whose checkpoints are complete or passed over, and which logs its speed.

    Parameters
    ----------
    flags : argparse.Namespace
        The script's flags.
    batches : PlannedBatches
        Micro-batches of this process.
    evaluate_task : callable
        Scores a model on the task.
    """

    def __init__(
        self,
        *args: Any,
        flags: argparse.Namespace,
        batches: PlannedBatches,
        evaluate_task: Callable[[nn.Module], Evaluation],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.flags = flags
        self.batches = batches
        self.evaluate_task = evaluate_task
        self.stop_on_signal = StopOnSignal()
        self.add_callback(self.stop_on_signal)
        if flags.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(flags.early_stopping_patience))
        self._images_and_tokens = torch.zeros(2)
        self._counting_since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.batches)

    def get_eval_dataloader(self, eval_dataset: TrainingData | None = None) -> DataLoader:
        state, size = PartialState(), self.flags.batch_size_per_gpu
        rows = [(0, row) for row in range(len(self.eval_dataset))]
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        return self._loader(self.eval_dataset, batches[state.process_index :: state.num_processes])

    def _loader(self, data: TrainingData, batches: Any) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return _PlannedLoader(
            data,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=torch.cuda.is_available(),
            # Seeds of workers come from here: starting workers must not move the random numbers that dropout draws.
            generator=torch.Generator(),
            worker_init_fn=_leave_process_group,
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        images = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._images_and_tokens += torch.tensor([images, int(tokens)])
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            counts, now = self._images_and_tokens.to(self.args.device), time.perf_counter()
            if dist.is_initialized():
                dist.all_reduce(counts)
            images, tokens = (counts / (now - self._counting_since)).tolist()
            logs |= {"images_per_second": round(images, 3), "tokens_per_second": round(tokens, 1)}
            self._images_and_tokens.zero_()
            self._counting_since = now
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Loss by supervised token over all processes and, every ``--eval_metric_steps``, the task's metric."""
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        with autocast(self.model, self.flags):
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                loss = self.model(**inputs, num_items_in_batch=1, skip_logits=True).loss
                totals += torch.tensor([loss.item(), (inputs["labels"] != -100).sum().item()])
        totals = totals.float().to(self.args.device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        every = self.flags.eval_metric_steps
        if every and (self.state.global_step % every == 0 or self.state.global_step >= self.state.max_steps):
            evaluation = self.evaluate_task(self.model)
            metrics |= {
                f"{metric_key_prefix}_{name}": value for name, value in evaluation.values.items() if not isinstance(value, dict)
            }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # Old checkpoints go only once this one is complete on every process.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with saving():
            super()._save_checkpoint(*args, **kwargs)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        options: dict[str, Any] = {}
        if hasattr(model, "peft_config"):
            # An adapter on lm_head makes PEFT store the base's whole head beside it unless told not to.
            options["save_embedding_layers"] = False
            write_base_description(directory, model)
        elif directory == Path(self.args.output_dir):
            # The result has the base's dtype; checkpoints keep the training's, to go on exactly.
            dtype = AutoConfig.from_pretrained(self.flags.model_name_or_path).dtype or model.dtype
            state_dict = {name: tensor.to(dtype) for name, tensor in (state_dict or model.state_dict()).items()}
            model.config.dtype = dtype
        model.save_pretrained(directory, state_dict=state_dict, **options)
        for path in directory.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets the owner alone read its files
        self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card to :mod:`common.model_card`, which the end of a run writes."""


def _leave_process_group(_: int) -> None:
    # SIGTERM is sent to the whole group; the process that these workers serve saves first, and ends them itself.
    os.setsid()


class _PlannedLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def _training_arguments(args: argparse.Namespace, accumulation: int) -> TrainingArguments:
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
        lr_scheduler_type="linear",
        warmup_steps=args.warmup_steps,
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        disable_tqdm=not args.tqdm,
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
        deepspeed=args.deepspeed,
        push_to_hub=args.push_to_hub,
        hub_model_id=args.hub_model_id,
    )
