"""TrainingArguments, Trainer and checkpoints. The only module that knows DeepSpeed."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from .arguments import check_arguments
from .collator import Collator
from .data import TrainingData
from .model import check_checkpoint, choose_attention, count_parameters, training_precision
from .phi3v import Phi3VProcessor
from .planning import PlannedBatches, accumulation_for_budget

DEEPSPEED_DIRECTORY = Path(__file__).parent / "deepspeed"
PACKING_ATTENTION = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def run(main: Callable[[], None]) -> None:
    """Run a script's ``main``; bad input ends it with its message and exit code 1, on every process."""
    try:
        main()
    except ValueError as error:
        if os.environ.get("RECIPES_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(args: argparse.Namespace) -> PartialState:
    """Check the flags, join the other processes, and settle what depends on the machine.

    Sets ``args.attention`` (implementation and reason), ``args.packing`` and ``args.deepspeed`` (path or None).

    Returns
    -------
    accelerate.PartialState
        This process: ``device``, ``process_index``, ``num_processes``.

    Raises
    ------
    ValueError
        For flags that this machine or model can't follow.
    """
    check_arguments(args)
    check_checkpoint(args.model_name_or_path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        # Started without torchrun: a group of one, so that DeepSpeed needs no launcher.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    state = PartialState(cpu=not on_gpu)
    training_precision(args, state.device)
    args.attention = choose_attention(args, state.device)
    args.packing = _choose_packing(args)
    args.deepspeed = _choose_deepspeed(args)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return state


def training_arguments(args: argparse.Namespace, accumulation: int) -> TrainingArguments:
    """The Trainer's arguments, with the published recipe's optimizer, schedule and clipping."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(args.output_dir),
        use_cpu=not on_gpu,  # without it, CPU processes train apart and nobody says so
        bf16=args.bf16,
        fp16=on_gpu and not args.bf16,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size_per_gpu,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=on_gpu,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adamw_torch",
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
        save_strategy="no",
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_num_workers=args.dataloader_num_workers,
        ddp_find_unused_parameters=False,
        deepspeed=args.deepspeed,
    )


class FinetuningTrainer(Trainer):
    """A Trainer whose micro-batches come from a plan, and which logs its speed.

    Parameters
    ----------
    batches : PlannedBatches
        Micro-batches of this process.
    """

    def __init__(self, *args: Any, batches: PlannedBatches, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = batches
        self._seen = torch.zeros(2, dtype=torch.float64)
        self._seen_since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return _PlannedLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes = inputs.get("image_sizes")
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self._seen += torch.tensor([0 if sizes is None else len(sizes), int(tokens)])
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            seen, now = self._seen.to(self.args.device, torch.float32), time.perf_counter()
            if dist.is_initialized():
                dist.all_reduce(seen)
            elapsed = now - self._seen_since
            logs["images_per_second"] = round(seen[0].item() / elapsed, 3)
            logs["tokens_per_second"] = round(seen[1].item() / elapsed, 1)
            self._seen.zero_()
            self._seen_since = now
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # An adapter on lm_head makes PEFT store the base's whole head beside it unless told not to.
        options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
        model.save_pretrained(directory, state_dict=state_dict, **options)
        self.processing_class.save_pretrained(directory)
        torch.save(self.args, directory / "training_args.bin")


class _PlannedLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def build_trainer(
    args: argparse.Namespace, model: nn.Module, processor: Phi3VProcessor, train_data: TrainingData
) -> FinetuningTrainer:
    """Plan the batches and set up the Trainer; prints what is going to happen.

    Parameters
    ----------
    args : argparse.Namespace
        As :func:`start` left them.
    """
    state = PartialState()
    accumulation = args.batch_size // (state.num_processes * args.batch_size_per_gpu)
    if args.max_tokens_per_batch:
        lengths = train_data.lengths(0, args.tqdm)
        accumulation = accumulation_for_budget(
            lengths, args.batch_size, args.seed, args.num_train_epochs, state.num_processes, args.max_tokens_per_batch
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
    trainable, total = count_parameters(model)
    if state.is_main_process:
        steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(batches) // accumulation
        attention, reason = args.attention
        print(
            f"model: {args.model_name_or_path}, {trainable:,} of {total:,} parameters train\n"
            f"attention: {attention} ({reason}); packing {'on' if args.packing else 'off'}\n"
            f"precision: {training_precision(args, state.device)} on {state.device.type}; "
            f"{'DeepSpeed ' + Path(args.deepspeed).name if args.deepspeed else 'DDP'}\n"
            f"batch: {args.batch_size} samples a step over {state.num_processes} process(es), {accumulation} "
            f"micro-batch(es) each; {steps} steps on {len(train_data)} rows",
            flush=True,
        )
    return FinetuningTrainer(
        model=model,
        args=training_arguments(args, accumulation),
        train_dataset=train_data,
        data_collator=Collator(processor, packing=args.packing),
        processing_class=processor,
        batches=batches,
    )


def train_and_save(trainer: FinetuningTrainer) -> None:
    """Train, and write the model (or adapter), the processor, ``train_results.json`` and ``trainer_state.json``."""
    result = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", result.metrics, combined=False)
    trainer.save_state()


def _choose_packing(args: argparse.Namespace) -> bool:
    possible = args.attention[0] in PACKING_ATTENTION
    if args.packing and not possible:
        raise ValueError(
            f"--packing needs an attention kernel for samples of any length, not {args.attention[0]}: "
            "leave out --packing, or --attn_implementation"
        )
    if args.max_tokens_per_batch and not possible:
        raise ValueError(f"--max_tokens_per_batch needs packing, which {args.attention[0]} attention can't do")
    return possible if args.packing is None else args.packing


def _choose_deepspeed(args: argparse.Namespace) -> str | None:
    if args.deepspeed == "none" or (args.deepspeed == "auto" and args.use_lora):
        return None
    path = DEEPSPEED_DIRECTORY / "zero2.json" if args.deepspeed == "auto" else Path(args.deepspeed)
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(f"common/deepspeed/{file.name}" for file in sorted(DEEPSPEED_DIRECTORY.glob("*.json")))
        raise ValueError(
            f"--deepspeed {path}: there is no such file; give one, {shipped} say, or none for plain DDP"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed {path} is no valid JSON ({error})") from None
    return str(path)
