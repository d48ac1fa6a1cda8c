"""The course of a run: start, plan, evaluate, train, save, evaluate, report."""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from common.arguments import check_arguments, method_name
from common.data.conversations import pictures
from common.data.pictures import decode_picture
from common.data.samples import TrainingData
from common.data.streaming import StreamedData
from common.evaluation.predictions import Evaluation, write_evaluation
from common.model.checkpoint import fetch_checkpoint
from common.model.loading import choose_attention, training_precision
from common.phi3v import Phi3VProcessor
from common.report.run import write_run
from common.runtime import (
    InputError,
    broadcast,
    first_on_each_machine,
    is_main_process,
    limit_library_bars,
    local_world_size,
    say,
)

from .checkpoints import check_resumable, find_checkpoint, run_settings, saving
from .deepspeed import choose_deepspeed, do_without_compiler
from .trainer import build_trainer

NO_FLAGS = ("task", "metric", "base_revision")  # in args, but set by no flag: run.json has them elsewhere
PACKING_ATTENTION = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
DEVICES = Path("/dev")
TIMEOUT = timedelta(hours=3)  # that others wait while one process fetches the model and the data, on a slow line too
EXIT_AFTER_SIGTERM = 128 + 15


def _leave_process_group() -> None:
    """Leave the process group of a run that failed, without waiting for the other processes.

    Registered with :mod:`atexit`, so that the error is printed first: the other processes may be ended as soon as they notice.
    """
    if dist.is_initialized():
        time.sleep(1)  # the others may just be waking up from the collective that told them, too, what is wrong
        dist.group.WORLD.abort()
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> PartialState:
    """Check the flags, join the other processes, and settle what depends on the machine.

    Sets ``args.base_revision`` (commit of a hub model, or None), ``args.attention`` (implementation and reason),
    ``args.packing``, ``args.deepspeed`` (path or None) and ``args.resume_from_checkpoint`` (path or None).

    Returns
    -------
    accelerate.PartialState
        This process: ``device``, ``process_index``, ``num_processes``.

    Raises
    ------
    InputError
        For flags that this machine or model can't follow.
    """
    check_arguments(args)
    on_gpu = torch.cuda.is_available()
    _prepare_environment(on_gpu)
    _check_gpus()
    state = PartialState(cpu=not on_gpu, timeout=TIMEOUT)
    atexit.register(_leave_process_group)
    _quieten(args)
    _check_names(args, on_cpu=not on_gpu)
    args.base_revision = first_on_each_machine(lambda: fetch_checkpoint(args.model_name_or_path))
    training_precision(args, state.device)
    args.attention = choose_attention(args, state.device)
    args.packing = _choose_packing(args)
    args.deepspeed = choose_deepspeed(args)
    if args.deepspeed and not on_gpu:
        do_without_compiler()
    args.dataloader_num_workers = min(args.dataloader_num_workers, _cores_of_process())
    args.resume_from_checkpoint, torn = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    for checkpoint in torn:
        say(f"passing over {checkpoint}", sys.stdout)
    if args.resume_from_checkpoint:
        check_resumable(args.resume_from_checkpoint, run_settings(args, state.num_processes))
        say(f"going on from {args.resume_from_checkpoint}", sys.stdout)
    set_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return state


def finetune(
    args: argparse.Namespace,
    model: nn.Module,
    processor: Phi3VProcessor,
    train_data: TrainingData | StreamedData,
    eval_data: TrainingData,
    evaluate: Callable[[nn.Module], Evaluation],
    source: str,
) -> None:
    """Say what is going to happen, evaluate, train, save, evaluate again and report.

    Writes to ``--output_dir``: the model (or adapter) and the processor, ``eval_before.json``, ``eval_after.json``,
    ``train_results.json``, ``trainer_state.json``, ``run.json``, ``README.md`` (the model card) and ``report.html``.

    Parameters
    ----------
    args : argparse.Namespace
        As :func:`start` left them.
    evaluate : callable
        Answers the evaluation's questions with a model and scores them; its predictions are in the order of ``eval_data``.
    source : str
        Where the data comes from: hub ids, separated by blanks, or a directory.
    """
    write_run(
        args.output_dir,
        task=args.task,
        base_model=args.model_name_or_path,
        base_revision=args.base_revision,
        method=method_name(args),
        data=f"{source}: {len(train_data)} rows train, {len(eval_data)} evaluate",
        hyperparameters={name: value for name, value in vars(args).items() if name not in NO_FLAGS},
        datasets=[name for name in source.split() if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()],
    )
    if args.push_to_hub and is_main_process():
        # What is pushed holds no report: its pictures are the data set's, which not every licence lets pass on.
        _remove_report(args.output_dir)
    trainer = build_trainer(args, model, processor, train_data, eval_data, evaluate)
    before_path = args.output_dir / "eval_before.json"
    if not broadcast(args.resume_from_checkpoint is not None and before_path.is_file()):
        before = evaluate(model)
        write_evaluation(before_path, before)
        say(f"before finetuning: {before}", sys.stdout)
        trainer.log_at_beginning(before)
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.stop_on_signal.stopped:
        say(f"stopped by SIGTERM after step {trainer.state.global_step}; --resume_from_checkpoint auto goes on", sys.stdout)
        sys.exit(EXIT_AFTER_SIGTERM)
    with saving():
        trainer.save_model(_internal_call=True)  # without pushing, which comes last
        trainer.save_metrics("train", result.metrics, combined=False)
        trainer.save_state()
    if trainer.stop_on_signal.end():
        say(f"stopped by SIGTERM after training; the result is in {args.output_dir}, but not evaluated", sys.stdout)
        sys.exit(EXIT_AFTER_SIGTERM)

    after = evaluate(trainer.model)
    write_evaluation(args.output_dir / "eval_after.json", after)
    trainer.log(after.logs)
    say(f"after finetuning: {after}; results are in {args.output_dir}", sys.stdout)
    if is_main_process():
        from common.report.model_card import write_model_card

        write_model_card(args.output_dir, name=args.hub_model_id)
    try:
        if args.push_to_hub:
            trainer.push_to_hub()
    finally:
        if is_main_process():
            _report(args.output_dir, eval_data)


def _report(output_dir: Path, eval_data: TrainingData) -> None:
    try:
        from common.report.gallery import save_gallery_images, select_gallery
        from common.report.page import write_report

        before, after = (
            json.loads((output_dir / f"eval_{when}.json").read_text(encoding="utf-8")) for when in ("before", "after")
        )
        rows: dict[str, int] = {}
        for row, entry in enumerate(after["predictions"]):
            rows.setdefault(entry["id"], row)  # of rows of the same id the report shows the first, too

        def pictures_of(key: str) -> list[Any]:
            return [decode_picture(picture) for picture in pictures(eval_data.conversation(0, rows[key]))]

        chosen = select_gallery(before, after)
        save_gallery_images(output_dir, pictures_of, [key for keys in chosen.values() for key in keys])
        print(f"report: {write_report(output_dir)}")
    except Exception as error:  # the model is saved and scored; a report can be made again
        print(f"warning: no report.html ({error!r}); python -m tools.report {output_dir} makes it", file=sys.stderr)


def _remove_report(output_dir: Path) -> None:
    (output_dir / "report.html").unlink(missing_ok=True)
    shutil.rmtree(output_dir / "gallery", ignore_errors=True)


def _prepare_environment(on_gpu: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        # Started without torchrun: a group of one, so that DeepSpeed needs no launcher.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # torchrun sets OMP_NUM_THREADS to 1, on which DeepSpeed's optimizer for offloaded states would run, too.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(_cores_of_process())
    # DeepSpeed calls ninja by its name, which stands beside Python where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Else DDP moves to the GPU what the model reads on the CPU, and every forward pass waits for it.
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_gpus() -> None:
    processes, gpus = local_world_size(), torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not torch.cuda.is_available() and not hidden and any(DEVICES.glob("nvidia[0-9]*")):
        raise InputError(
            f"this machine has a GPU that PyTorch, built for CUDA {torch.version.cuda}, can't use: nvidia-smi says whether the "
            "driver works, and up to which CUDA; update it, or install PyTorch for an older CUDA. To train on the CPU all the "
            "same, set CUDA_VISIBLE_DEVICES to nothing"
        )
    if processes > gpus > 0:
        raise InputError(f"torchrun --nproc_per_node={processes}: this machine has {gpus} GPU(s), and each process takes one")


def _cores_of_process() -> int:
    # macOS has no affinities.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def _quieten(args: argparse.Namespace) -> None:
    # Notes to developers of these libraries; what concerns a user of the recipes is said by the recipes.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    limit_library_bars(args.tqdm)


def _check_names(args: argparse.Namespace, on_cpu: bool) -> None:
    names = [name.value for name in OptimizerNames]
    if args.optim not in names:
        raise InputError(f"there is no such optimizer; take one of {', '.join(names)}", f"--optim {args.optim}")
    try:
        # Some come from packages that are not here, or need settings that the recipes don't have.
        Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(args.output_dir, optim=args.optim, use_cpu=on_cpu))
    except (ValueError, ImportError) as error:
        raise InputError(f"{error}", f"--optim {args.optim}") from None
    try:
        for callback in get_reporting_integration_callbacks([] if args.report_to == "none" else [args.report_to]):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{error}", f"--report_to {args.report_to}") from None


def _choose_packing(args: argparse.Namespace) -> bool:
    possible = args.attention[0] in PACKING_ATTENTION
    if args.packing and not possible:
        raise InputError(
            f"--packing needs an attention kernel for samples of any length, not {args.attention[0]}: "
            "leave out --packing, or --attn_implementation"
        )
    if args.max_tokens_per_batch and not possible:
        raise InputError(f"--max_tokens_per_batch needs packing, which {args.attention[0]} attention can't do")
    return possible if args.packing is None else args.packing
