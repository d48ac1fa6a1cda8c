"""The DeepSpeed configuration of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common.arguments import uses_adapters
from common.runtime import InputError, read_json

DIRECTORY = Path(__file__).parents[1] / "deepspeed"


def choose_deepspeed(args: argparse.Namespace) -> str | None:
    """The configuration file that ``--deepspeed`` means, None for plain DDP.

    Raises
    ------
    InputError
        If there is no such file, or its settings contradict other flags.
    """
    if args.deepspeed == "none" or (args.deepspeed == "auto" and uses_adapters(args)):
        return None
    path = DIRECTORY / "zero2.json" if args.deepspeed == "auto" else Path(args.deepspeed)
    if not path.is_file():
        shipped = ", ".join(f"common/deepspeed/{file.name}" for file in sorted(DIRECTORY.glob("*.json")))
        raise InputError(f"there is no such file; give one of {shipped}, or none for plain DDP", f"--deepspeed {path}")
    config = read_json(path, "see common/deepspeed/ for examples")
    if "optimizer" in config:
        raise InputError(
            f"--deepspeed {path} has an optimizer of its own, for which --optim, --learning_rate and the parts' rates "
            "would not count: take that section out"
        )
    if "offload_optimizer" in config.get("zero_optimization", {}) and not args.optim.startswith("adamw_torch"):
        raise InputError(
            f"--deepspeed {path} offloads the optimizer, which DeepSpeed then computes by its own AdamW on the CPU, whatever "
            f"--optim {args.optim} says: leave --optim out, or take a file without offload_optimizer"
        )
    if args.use_qlora and config.get("zero_optimization", {}).get("stage") == 3:
        raise InputError(f"--deepspeed {path} is ZeRO-3, which can't shard a 4-bit base; use ZeRO-2 or none with --use_qlora")
    return str(path)


def do_without_compiler() -> None:
    """Keep DeepSpeed from compiling on a CPU."""
    # It would compile an op that passes tensors between a machine's processes; gloo does that, too.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_stage(deepspeed: str | None) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration file, None without one."""
    return zero_settings(deepspeed).get("stage", 0) if deepspeed else None


def zero_settings(deepspeed: str) -> dict[str, Any]:
    """The section ``zero_optimization`` of a DeepSpeed configuration file."""
    return json.loads(Path(deepspeed).read_text()).get("zero_optimization", {})
