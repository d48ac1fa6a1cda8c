"""Start a task's script under torchrun, and read what a run has left in its directory."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = ("docvqa", "hateful_memes", "nlvr2", "ucf101")
METHOD_FLAGS = {"full": [], "frozen": ["--freeze_vision_model"], "lora": ["--use_lora"], "qlora": ["--use_qlora"]}


class RunFailed(RuntimeError):
    """A run ended without success; what it said itself stands above."""


@dataclass(frozen=True)
class Usage:
    """What a run took.

    Attributes
    ----------
    seconds : float
        From start to end, both evaluations included.
    peak_memory_gb : float
        Peak resident memory of its largest process, in 10⁹ bytes; not that of a GPU.
    """

    seconds: float
    peak_memory_gb: float


def torchrun_command(task: str, flags: Sequence[str], processes: int) -> list[str]:
    """The command that runs a task's script on this machine, as it is typed in the repository's folder."""
    # --standalone takes a free port, so that two runs can share a machine.
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", f"finetune_hf_trainer_{task}.py", *flags]


def run_on_cpu(command: Sequence[str]) -> Usage:
    """Run a command as :func:`run_command` does, without GPUs and without the hub."""
    return run_command(command, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")


def run_command(command: Sequence[str], **environment: str) -> Usage:
    """Print a command and run it; when it is to stop, wait until it has saved where it is.

    Parameters
    ----------
    command : sequence of str
        Starts with ``torchrun`` or ``python``, which are taken from this environment.
    **environment : str
        Added to the environment.

    Raises
    ------
    RunFailed
        If it ends with another exit code than 0.
    SystemExit
        Once it has ended after SIGTERM or Ctrl-C.
    """
    print(shlex.join(command), flush=True)
    program = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}[command[0]]
    # Without the first, torchrun warns that it sets it; the second is time to save a checkpoint of all states after SIGTERM.
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}
    stopped_by = None

    def stop(number: int, _: Any) -> None:
        nonlocal stopped_by
        stopped_by = number
        if number == signal.SIGTERM:  # Ctrl-C reaches the run by itself
            process.terminate()

    started = time.monotonic()
    process = subprocess.Popen([*program, *command[1:]], env=defaults | os.environ | environment)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # Unlike the usage of all children, wait4's is this run's alone.
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    if stopped_by:
        sys.exit(128 + stopped_by)
    if process.returncode:
        raise RunFailed(f"the run ended with exit code {process.returncode}; why stands above")
    return Usage(seconds=time.monotonic() - started, peak_memory_gb=usage.ru_maxrss * 1024 / 1e9)


def read_results(output_dir: Path) -> dict[str, Any]:
    """What a finished run found, and all that is needed to judge it.

    Returns
    -------
    dict
        ``metric`` names the main figure; ``before`` and ``after`` hold all figures; ``samples`` evaluated;
        ``train_seconds``; model, revision, data, command, date, hardware and versions.
    """
    names = ("run", "eval_before", "eval_after", "train_results")
    run, before, after, training = (json.loads((output_dir / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    described = ("base_model", "base_revision", "method", "data", "command", "date", "hardware", "versions")
    return {
        "metric": after["metric"],
        "before": metrics_of(before),
        "after": metrics_of(after),
        "samples": after["samples"],
        "train_seconds": training["train_runtime"],
        **{name: run[name] for name in described},
    }


def metrics_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation by name, the predictions left out."""
    return {name: value for name, value in evaluation.items() if isinstance(value, float)}
