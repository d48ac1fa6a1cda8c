"""The start of a run: join the other processes, and determine the settings that depend on the machine."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from accelerate import PartialState
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from common.arguments import Setup
from common.model.adapters import adapter_to_continue, base_fault, find_base
from common.model.checkpoint import fetch_checkpoint
from common.model.checks import read_config
from common.model.loading import choose_attention, training_precision
from common.model.quantization import quantization_scheme
from common.runtime.collectives import first_on_each_machine, on_main_process
from common.runtime.heartbeat import Heartbeat
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, counted, local_world_size, rank, say, world_size
from common.runtime.progress import limit_library_bars

from .deepspeed import allow_deepspeed_states, choose_deepspeed, disable_shm_op, zero_stage
from .output import check_output_dir_unused, is_checkpoint_of, lock_output_dir
from .resuming import find_checkpoint, run_identity

PACKING_ATTENTION = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
DEVICES = Path("/dev")
TIMEOUT = timedelta(hours=3)  # one process may download model and data over a slow connection while the others wait


def _leave_process_group() -> None:
    """Leave the process group of a failed run without waiting for the other processes.

    Registered with :mod:`atexit` so that the error is printed first: the other processes may be killed as soon as they notice.
    """
    if dist.group.WORLD is not None:
        time.sleep(1)  # the others may still be finishing the collective that reported the error to them
        dist.group.WORLD.abort()
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> Setup:
    """Join the other processes, and determine the settings that depend on the machine and the model.

    Raises
    ------
    InputError
        If a flag is invalid, or not supported by this machine or model.
    """
    on_gpu = torch.cuda.is_available()
    _prepare_environment(on_gpu)
    _check_gpus()
    if world_size() > local_world_size():
        say(f"Connecting {world_size()} processes on several machines")
    device = PartialState(cpu=not on_gpu, timeout=TIMEOUT).device
    atexit.register(_leave_process_group)
    if world_size() > 1:
        store = c10d._get_default_store().clone()  # type: ignore[attr-defined]  # not in PyTorch's annotations
        heartbeat = Heartbeat(store, rank(), world_size(), args.ddp_timeout)
        heartbeat.start()
        atexit.register(heartbeat.end)
    _silence_libraries(args.tqdm)
    _check_integrations(args.optim, args.report_to, on_cpu=not on_gpu)
    precision = training_precision(args.bf16, device)
    if args.eval_only:
        on_main_process(lambda: lock_output_dir(args.output_dir))
        return Setup(device, precision, attention="sdpa")  # evaluate_only chooses its own
    adapter = adapter_to_continue(args)
    base, revision = find_base(adapter) if adapter else (args.model_name_or_path, None)
    revision = first_on_each_machine(lambda: fetch_checkpoint(base, revision=revision))
    if quantization_scheme(read_config(base, revision)):
        raise InputError(
            "quantized checkpoints can only be evaluated: pass the original model (for 4-bit weights with --use_qlora)",
            f"--model_name_or_path {base}",
        )
    if adapter and (fault := base_fault(adapter, base, revision)[0]):
        raise InputError(f"{fault}: restore the model that the adapter was trained on", f"--model_name_or_path {adapter}")
    attention, reason = choose_attention(args.attn_implementation, args.use_flash_attention, device)
    packing = _choose_packing(args.packing, args.max_tokens_per_batch, attention)
    deepspeed = choose_deepspeed(args)
    stage = zero_stage(deepspeed)
    samples, max_tokens = _limit_micro_batches(
        args.batch_size_per_gpu, args.max_tokens_per_batch, may_choose=on_gpu and packing and not args.streaming, stage=stage
    )
    if deepspeed:
        allow_deepspeed_states()
    if deepspeed and not on_gpu:
        disable_shm_op()
    identity = run_identity(args, base, revision, adapter, deepspeed, precision, world_size())
    on_main_process(lambda: lock_output_dir(args.output_dir))
    checkpoint, skipped = find_checkpoint(args.resume_from_checkpoint, args.output_dir, identity, args.accept_changes)
    for name in skipped:
        say(f"skipping {name}", sys.stdout)
    if checkpoint:
        say(f"resuming from {checkpoint}", sys.stdout)
    if not is_checkpoint_of(args.output_dir, checkpoint):
        auto = args.resume_from_checkpoint == "auto"
        models = [args.model_name_or_path, base]
        on_main_process(lambda: check_output_dir_unused(args.output_dir, args.overwrite_output_dir, auto, models))
    set_seed(args.seed)
    return Setup(
        device=device,
        precision=precision,
        attention=attention,
        attention_reason=reason,
        packing=packing,
        deepspeed=deepspeed,
        zero_stage=stage,
        batch_size_per_gpu=samples,
        max_tokens_per_batch=max_tokens,
        revision=revision,
        base=base,
        adapter=adapter,
        checkpoint=checkpoint,
        identity=identity,
    )


def _prepare_environment(on_gpu: bool) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch.load never runs code from a file, even if a library asks for it, as DeepSpeed does.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if "RANK" not in os.environ:
        # Started without torchrun: a process group of size 1, so that DeepSpeed needs no launcher.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # torchrun sets OMP_NUM_THREADS to 1, which would also limit DeepSpeed's CPU optimizer for offloaded states.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cores_per_process())
    # DeepSpeed runs ninja by name. It is installed next to Python, which is not on PATH if the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Otherwise DDP moves inputs to the GPU that the model reads on the CPU, and every forward pass waits for the copy.
    os.environ.setdefault("ACCELERATE_BYPASS_DEVICE_MAP", "true")
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_gpus() -> None:
    processes, gpus = local_world_size(), torch.cuda.device_count()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not torch.cuda.is_available() and not hidden and any(DEVICES.glob("nvidia[0-9]*")):
        raise InputError(
            f"this machine has a GPU, but PyTorch, built for CUDA {torch.version.cuda}, cannot use it. Run nvidia-smi to check "
            "the driver and the newest CUDA version it supports; update the driver, or install a PyTorch build for an older "
            "CUDA version. To train on the CPU anyway, set CUDA_VISIBLE_DEVICES to an empty string"
        )
    if processes > gpus > 0:
        raise InputError(
            f"torchrun --nproc_per_node={processes}: this machine has {counted(gpus, 'GPU')}, and each process requires one"
        )


def _silence_libraries(bars: bool) -> None:
    # These messages address developers of the libraries, not users of the recipes.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    limit_library_bars(bars)


def _check_integrations(optim: str, report_to: list[str], on_cpu: bool) -> None:
    names = [name.value for name in OptimizerNames]
    if optim not in names:
        raise InputError(f"invalid optimizer; expected one of {', '.join(names)}", f"--optim {optim}")
    try:
        # Some optimizers require packages that are not installed, or settings that the recipes do not have.
        Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=optim, use_cpu=on_cpu))
    except (ValueError, ImportError) as error:
        raise InputError(f"{error}", f"--optim {optim}") from None
    try:
        for callback in get_reporting_integration_callbacks([] if report_to == ["none"] else report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{error}", f"--report_to {' '.join(report_to)}") from None


def _choose_packing(requested: bool | None, max_tokens: int | None, attention: str) -> bool:
    supported = attention in PACKING_ATTENTION
    if requested and not supported:
        raise InputError(
            f"--packing requires a variable-length attention kernel, got {attention}: remove --packing or --attn_implementation"
        )
    if max_tokens and not supported:
        raise InputError(f"--max_tokens_per_batch requires packing, which {attention} attention does not support")
    return supported if requested is None else requested


def _limit_micro_batches(
    samples: int | None, max_tokens: int | str | None, may_choose: bool, stage: int | None
) -> tuple[int, int | str | None]:
    """Return ``--batch_size_per_gpu`` and ``--max_tokens_per_batch``, or their defaults if they are None."""
    if max_tokens == "auto" and stage == 3:
        raise InputError("memory cannot be measured under ZeRO-3: pass a number of tokens", "--max_tokens_per_batch auto")
    if max_tokens is None and samples is None and may_choose and stage != 3:
        max_tokens = "auto"
    return samples or 1, max_tokens
