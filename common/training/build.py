"""From loaded data and model to a Trainer that can start: the plan, run.json, the memory estimate, the summary."""

from __future__ import annotations

import argparse
import functools
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from common.arguments import LOGGING_STEPS, Setup, method_name, steps_between_evaluations
from common.data.batches import PlannedBatches
from common.data.collator import Collator
from common.data.conversations import Conversation
from common.data.review import longest_evaluation_answer, review_data
from common.data.rows import Rows, skipped_rows
from common.data.samples import TrainingData
from common.data.streaming import Stream, StreamedBatches, training_data
from common.evaluation.generation import answer_limit
from common.evaluation.predictions import Evaluation
from common.model.loading import base_model, compile_layers, set_gradient_checkpointing
from common.phi3v import Phi3VProcessor
from common.phi3v.flops import TrainingFlops
from common.report.run import remove_report, write_run
from common.runtime.collectives import on_main_process, set_timeout
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, counted, is_main_process, say

from .callbacks import find_nonfinite
from .memory import estimate_memory, least_recomputation, recomputation_modes
from .output import is_checkpoint_of, note_skipped_rows, remove_outputs
from .plan import plan_batches, training_arguments
from .resuming import check_plan, data_fingerprint
from .summary import number_of_steps, summarize
from .trainer import FinetuningTrainer

NOT_FLAGS = ("task", "metric")  # in args, but not set by a flag; run.json has separate entries for them


def build_trainer(
    args: argparse.Namespace,
    setup: Setup,
    model: nn.Module,
    processor: Phi3VProcessor,
    train_rows: Rows | Stream,
    eval_rows: Rows,
    to_conversation: Callable[[Any, random.Random], Conversation],
    evaluate: Callable[[nn.Module, Phi3VProcessor, Rows, argparse.Namespace], Evaluation],
    source: str,
    eval_set: dict[str, str] | None = None,
) -> FinetuningTrainer:
    """Prepare the Trainer of a run and print its summary. Must be called on all processes.

    Checks that the weights are finite and, on resume, that data and steps are those of the checkpoint; deletes earlier outputs
    with ``--overwrite_output_dir``; plans the batches; writes ``run.json``; reviews the data; chooses the recomputation.

    Parameters
    ----------
    args, setup
        The script's flags, and what :func:`common.training.start.start` determined from them.
    model, processor
        As returned by :func:`common.model.loading.load_model` and :func:`common.model.checkpoint.load_processor`.
    train_rows : Rows or Stream
    eval_rows : Rows
    to_conversation : callable
        Converts a row to a conversation; random choices use the given generator.
    evaluate : callable
        Evaluates a model on rows. The predictions are in the order of the rows.
    source : str
        Origin of the training data: a Hub id, a directory or files.
    eval_set : dict of str, optional
        Origin of the evaluation data for the model card: its ``split`` and, if it is on the Hub, id (``type``) and ``config``.

    Raises
    ------
    InputError
        If a weight is not finite, a row is longer than the model's context, or the data is not the checkpoint's.
    """
    # The data is ready: from now on, a process that does not respond ends the run.
    set_timeout(args.ddp_timeout)
    if name := find_nonfinite(model):
        raise InputError(f"{name} is not finite: copy the files again", f"--model_name_or_path {args.model_name_or_path}")
    if setup.zero_stage == 3:
        # ZeRO-3 gathers weights in every forward pass, so all processes must run the same modules.
        base_model(model).run_same_modules_always()
    train_data = training_data(train_rows, to_conversation, processor, args.seed)
    eval_data = TrainingData(eval_rows, to_conversation, processor, args.seed)

    flops = TrainingFlops(base_model(model))
    estimate = functools.cache(lambda: estimate_memory(model, setup, args.optim, flops))
    batches, lengths = plan_batches(args, setup, train_data, flops, estimate)
    steps = number_of_steps(args.max_steps, args.num_train_epochs, batches)
    # By default, at least 20 entries, so that a short run also has curves.
    logging_steps = args.logging_steps or max(1, min(LOGGING_STEPS, steps // 20))
    longest = longest_evaluation_answer(eval_data)

    plan = {"data": data_fingerprint(train_data), "steps": steps}
    if setup.checkpoint and (change := check_plan(setup.checkpoint, plan, args.accept_changes)):
        say(change, sys.stdout)
    if args.overwrite_output_dir and not is_checkpoint_of(args.output_dir, setup.checkpoint):
        on_main_process(lambda: remove_outputs(args.output_dir))
    on_main_process(lambda: note_skipped_rows(args.output_dir, skipped_rows))
    settings = _settings(args, setup, batches, logging_steps, longest)
    write_run(
        args.output_dir,
        task=args.task,
        base_model=setup.base,
        base_revision=setup.revision,
        method=method_name(args),
        data=f"{source}: {counted(len(train_data), 'training row')}, {counted(len(eval_data), 'evaluation row')}"
        + (f" ({' '.join(eval_set.values())})" if eval_set else ""),
        hyperparameters=settings,
        datasets=[source] if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else [],
        eval_set=eval_set or {},
        question=eval_data.conversation(0, 0)["conversations"][0]["user"],
    )
    if args.push_to_hub and is_main_process():
        # The report is not pushed: it contains images from the dataset, whose license may not allow redistribution.
        remove_report(args.output_dir)
    warnings = review_data(train_data, eval_data, lengths, longest, args.max_new_tokens, args.tqdm)
    # Only for the review; of a million rows, it would count as memory of every worker.
    train_rows.contents = eval_rows.contents = None

    say("Estimating memory and time")
    trial = estimate()  # cached if plan_batches needed it
    recomputation = least_recomputation(trial, *batches.largest(lengths), recomputation_modes(args))
    set_gradient_checkpointing(model, recomputation)
    if args.torch_compile:
        compile_layers(model)
    trainer = FinetuningTrainer(
        flags=args,
        setup=setup,
        identity=setup.identity | plan | {"max_tokens_per_batch": settings["max_tokens_per_batch"]},
        batches=batches,
        flops=flops,
        evaluate_task=lambda model: evaluate(model, processor, eval_rows, args),
        recomputation=recomputation,
        model=model,
        args=training_arguments(args, setup, batches.accumulation, logging_steps),
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor, packing=setup.packing),
        processing_class=processor,
    )
    say(summarize(args, setup, model, len(train_data), batches, lengths, recomputation, trial, flops), sys.stdout)
    for warning in warnings:
        say(f"{'warning:':13}{warning}", sys.stdout)
    return trainer


def _settings(
    args: argparse.Namespace,
    setup: Setup,
    batches: PlannedBatches | StreamedBatches,
    logging_steps: int,
    longest: int,
) -> dict[str, Any]:
    """Return the flags for ``run.json``, with automatic values replaced by those chosen."""
    return {name: value for name, value in vars(args).items() if name not in NOT_FLAGS} | {
        "packing": setup.packing,
        "deepspeed": setup.deepspeed,
        "attention": (setup.attention, setup.attention_reason),
        "resume_from_checkpoint": setup.checkpoint,
        "use_lora": args.use_lora or args.use_qlora,
        "eval_steps": steps_between_evaluations(args.eval_steps, args.logging_steps),
        "logging_steps": logging_steps,
        "max_tokens_per_batch": batches.max_tokens,
        "batch_size_per_gpu": None if batches.max_tokens else setup.batch_size_per_gpu,
        "dataloader_num_workers": min(args.dataloader_num_workers, cores_per_process()),
        "max_new_tokens": args.max_new_tokens or answer_limit(longest),
    }
