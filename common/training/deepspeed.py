"""The DeepSpeed configuration of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.runtime.files import read_json
from common.runtime.process import InputError

DIRECTORY = Path(__file__).parents[1] / "deepspeed"
REMEDY = "see common/deepspeed/ for examples"
# What the flags determine.
AUTOMATIC = (
    *("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16.enabled", "fp16.enabled"),
)


def choose_deepspeed(args: argparse.Namespace) -> str | None:
    """Return the configuration file that ``--deepspeed`` selects, or None for plain DDP.

    Raises
    ------
    InputError
        If the file does not exist or conflicts with other flags.
    """
    if args.deepspeed == "none" or (args.deepspeed == "auto" and (args.use_lora or args.use_qlora)):
        return None
    path = DIRECTORY / "zero2.json" if args.deepspeed == "auto" else Path(args.deepspeed)
    if not path.is_file():
        shipped = ", ".join(f"common/deepspeed/{file.name}" for file in sorted(DIRECTORY.glob("*.json")))
        raise InputError(f"no such file; use one of {shipped}, or none for plain DDP", f"--deepspeed {path}")
    config = read_json(path, REMEDY)
    for section, flags in (("optimizer", "--optim and all learning rates"), ("scheduler", "--lr_scheduler_type")):
        if section in config:
            raise InputError(f'--deepspeed {path} has the section "{section}", which would override {flags}: remove it')
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise InputError(f'--deepspeed {path}: "zero_optimization" must be an object with a "stage" from 0 to 3; {REMEDY}')
    for entry in AUTOMATIC:
        value: Any = config
        for key in entry.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value != "auto":
            raise InputError(f'--deepspeed {path}: {entry} must be "auto", because the flags determine it; {REMEDY}')
    offload = zero.get("offload_optimizer", {"device": "cpu"})
    if not isinstance(offload, dict) or offload.get("device", "none") == "none":
        raise InputError(f'--deepspeed {path}: "offload_optimizer" without a "device" does nothing: remove it')
    if "offload_optimizer" in zero and not args.optim.startswith("adamw_torch"):
        raise InputError(
            f"--deepspeed {path} offloads the optimizer. DeepSpeed then runs its own AdamW on the CPU and ignores "
            f"--optim {args.optim}: remove --optim, or use a file without offload_optimizer"
        )
    if args.use_qlora and stage == 3:
        raise InputError(f"--deepspeed {path} is ZeRO-3, which cannot shard a 4-bit base model: use ZeRO-2 or none")
    if args.torch_compile and stage == 3:
        raise InputError(
            f"--deepspeed {path} is ZeRO-3, whose sharded weights cannot be compiled: remove --torch_compile, or use ZeRO-2"
        )
    return str(path)


def allow_deepspeed_states() -> None:
    """Let ``torch.load(weights_only=True)`` read DeepSpeed's checkpoints, which contain these plain classes."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def disable_shm_op() -> None:
    """Prevent DeepSpeed from compiling its CPU communication op."""
    # The op exchanges tensors between processes on one node, which gloo also does without a compiler.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_stage(deepspeed: str | None) -> int | None:
    """Return the ZeRO stage of a DeepSpeed configuration file, or None without a file."""
    return zero_settings(deepspeed).get("stage", 0) if deepspeed else None


def zero_settings(deepspeed: str) -> dict[str, Any]:
    """Return the ``zero_optimization`` section of a DeepSpeed configuration file."""
    return read_json(Path(deepspeed), REMEDY).get("zero_optimization", {})
