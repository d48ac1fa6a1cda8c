"""The plan of a run: its micro-batches, and its settings as transformers' Trainer takes them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import TrainingArguments

from common.arguments import Setup, steps_between_evaluations, trained_parts
from common.data.batches import Lengths, PlannedBatches, accumulation_for_budget
from common.data.samples import TrainingData
from common.data.streaming import StreamedBatches, StreamedData
from common.phi3v.flops import TrainingFlops
from common.runtime.process import InputError, rank, world_size

from .checkpoints import read_state, read_totals
from .memory import Trial, fastest_budget, mean_flops, recomputation_modes


def plan_batches(
    args: argparse.Namespace,
    setup: Setup,
    data: TrainingData | StreamedData,
    flops: TrainingFlops,
    estimate: Callable[[], Trial | None],
) -> tuple[PlannedBatches | StreamedBatches, Lengths]:
    """Return the micro-batches of this process, and the lengths of some or all samples for the estimates of memory and time.

    Parameters
    ----------
    args, setup
        The script's flags, and what :func:`common.training.start.start` determined from them.
    data : TrainingData or StreamedData
    flops : TrainingFlops
    estimate : callable
        Returns the trial on the device; called on all processes, if ``--max_tokens_per_batch auto`` requires it.
    """
    steps_done = read_state(setup.checkpoint).global_step if setup.checkpoint else 0
    order = {"seed": args.seed, "rank": rank(), "world_size": world_size()}
    if isinstance(data, StreamedData):
        streamed = StreamedBatches(data.rows, args.batch_size, setup.batch_size_per_gpu, **order)
        streamed.begin_at(steps_done)
        return streamed, data.sample_lengths()
    if args.streaming:
        raise InputError("this script does not support streaming; remove the flag", "--streaming")
    accumulation = args.batch_size // (world_size() * setup.batch_size_per_gpu)
    max_tokens: int | None = None
    mixture = data.rows.mixture
    if setup.max_tokens_per_batch:
        steps_per_epoch = -(-(len(mixture) if mixture else len(data)) // args.batch_size)
        epochs = -(-args.max_steps // steps_per_epoch) if args.max_steps > 0 else math.ceil(args.num_train_epochs)
        by_epoch = [data.lengths(epoch, args.tqdm) for epoch in range(epochs)]
        lengths = Lengths(*np.hstack([(epoch.tokens, epoch.views) for epoch in by_epoch]))
        count = partial(accumulation_for_budget, by_epoch, args.batch_size, args.seed, world_size(), mixture=mixture)
        if isinstance(setup.max_tokens_per_batch, int):
            max_tokens = setup.max_tokens_per_batch
        else:
            max_tokens = _choose_budget(setup, args.batch_size, recomputation_modes(args), lengths, flops, estimate(), count)
        accumulation = count(max_tokens) if max_tokens else accumulation
    else:
        lengths = data.sample_lengths()
    batches = PlannedBatches(
        mixture or len(data),
        args.batch_size,
        **order,
        accumulation=accumulation,
        measure=partial(data.measure, skip_bad=args.on_bad_sample == "skip") if setup.packing else None,
        max_tokens=max_tokens,
        vision_trains="vision" in trained_parts(args.train_only, args.train_fully, args.freeze_vision_model),
    )
    batches.begin_at(steps_done)
    return batches, lengths


def _choose_budget(
    setup: Setup,
    batch_size: int,
    modes: tuple[str, ...],
    lengths: Lengths,
    flops: TrainingFlops,
    trial: Trial | None,
    count: Callable[[int], int],
) -> int | None:
    """Tokens per micro-batch: those of the checkpoint if they fit, else the fastest; None for one sample at a time."""
    if trial is None:
        return None
    if setup.checkpoint:
        saved = read_totals(setup.checkpoint)["settings"].get("max_tokens_per_batch")
        if isinstance(saved, int) and saved <= trial.most_tokens(modes[-1], lengths):
            return saved
    forward, backward = (batch_size / world_size() * each for each in mean_flops(flops, lengths))
    return fastest_budget(trial, modes, lengths, (forward, backward), count)


def training_arguments(args: argparse.Namespace, setup: Setup, accumulation: int, logging_steps: int) -> TrainingArguments:
    """Return the settings of transformers' Trainer, for ``accumulation`` micro-batches per process and optimizer step."""
    on_gpu = torch.cuda.is_available()
    by_metric = args.eval_metric_steps is not None
    best = f"eval_{args.metric}" if by_metric else "eval_loss"
    return TrainingArguments(
        output_dir=str(args.output_dir),
        use_cpu=not on_gpu,  # without it, CPU processes silently train independently
        bf16=args.bf16,
        fp16=on_gpu and not args.bf16,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=setup.batch_size_per_gpu,
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
        logging_steps=logging_steps,
        # The filter waits for the device at every micro-batch. Only fp16 needs it: its loss may overflow in skipped steps.
        logging_nan_inf_filter=on_gpu and not args.bf16,
        report_to=args.report_to,
        run_name=args.output_dir.name,
        disable_tqdm=True,  # FinetuningTrainer shows its own
        save_strategy=args.save_strategy,
        save_steps=args.save_steps,
        save_on_each_node=args.save_on_each_node,
        eval_strategy=args.eval_strategy,
        eval_steps=steps_between_evaluations(args.eval_steps, args.logging_steps),
        load_best_model_at_end=args.load_best_model_at_end,
        metric_for_best_model=best if args.load_best_model_at_end else None,
        greater_is_better=by_metric if args.load_best_model_at_end else None,
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_num_workers=args.dataloader_num_workers,
        ddp_find_unused_parameters=False,
        deepspeed=setup.deepspeed,
        push_to_hub=args.push_to_hub,
        hub_strategy="end",  # pushing a checkpoint would first copy its weights to the output directory
        hub_model_id=args.hub_model_id,
        hub_private_repo=args.hub_private_repo or None,
    )
