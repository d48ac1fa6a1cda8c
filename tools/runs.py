"""Run a task's script under torchrun, and read the results of a run."""

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
    """A run failed; its own output precedes this error."""


@dataclass(frozen=True)
class Usage:
    """Time and memory of a run.

    Attributes
    ----------
    seconds : float
        Wall time from start to end, including both evaluations.
    peak_memory_gb : float
        Peak resident memory of the largest process, in 10⁹ bytes; GPU memory is not included.
    """

    seconds: float
    peak_memory_gb: float


def torchrun_command(task: str, flags: Sequence[str], processes: int) -> list[str]:
    """Return the command that runs a task's script on this machine, from the root of the repository."""
    # --standalone uses a free port, so that two runs can share a machine.
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", f"finetune_hf_trainer_{task}.py", *flags]


def run_on_cpu(command: Sequence[str]) -> Usage:
    """Run a command with :func:`run_command`, without GPUs and without access to the Hub."""
    return run_command(command, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")


def run_command(command: Sequence[str], **environment: str) -> Usage:
    """Print a command and run it; on SIGTERM or Ctrl-C, wait until it has saved a checkpoint.

    Parameters
    ----------
    command : sequence of str
        Starts with ``torchrun`` or ``python``, which run with the current Python interpreter.
    **environment : str
        Environment variables to add.

    Raises
    ------
    RunFailed
        If the exit code is not 0.
    SystemExit
        After SIGTERM or Ctrl-C, once the command has ended.
    """
    print(shlex.join(command), flush=True)
    program = {"torchrun": [sys.executable, "-m", "torch.distributed.run"], "python": [sys.executable]}[command[0]]
    # torchrun warns if OMP_NUM_THREADS is not set. The timeout leaves time to save a full checkpoint after SIGTERM.
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}
    stopped_by = None

    def stop(number: int, _: Any) -> None:
        nonlocal stopped_by
        stopped_by = number
        if number == signal.SIGTERM:  # the terminal sends Ctrl-C to the run as well
            process.terminate()

    started = time.monotonic()
    process = subprocess.Popen([*program, *command[1:]], env=defaults | os.environ | environment)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # wait4 reports the usage of this process only, unlike getrusage(RUSAGE_CHILDREN).
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    if stopped_by:
        sys.exit(128 + stopped_by)
    if process.returncode:
        raise RunFailed(f"the run failed with exit code {process.returncode}; see its output above")
    return Usage(seconds=time.monotonic() - started, peak_memory_gb=usage.ru_maxrss * 1024 / 1e9)


def read_results(output_dir: Path) -> dict[str, Any]:
    """Read the results of a finished run, with what is needed to interpret them.

    Returns
    -------
    dict
        ``metric`` is the name of the main metric; ``before`` and ``after`` contain all metrics; ``samples`` is the
        number of evaluated samples; also ``train_seconds``, model, revision, data, command, date, hardware and versions.
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
    """Return the metrics of an evaluation by name, without the predictions."""
    return {name: value for name, value in evaluation.items() if isinstance(value, float)}
