"""Run a task's script under torchrun, read the results of a run, and put results into a page."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "results"
TASKS = {"docvqa": "DocVQA", "hateful_memes": "Hateful Memes", "nlvr2": "NLVR2", "ucf101": "UCF-101"}
METHOD_FLAGS = {"full": [], "frozen": ["--freeze_vision_model"], "lora": ["--use_lora"], "qlora": ["--use_qlora"]}
METHOD_TITLES = {"full": "full", "frozen": "full, frozen vision", "lora": "LoRA", "qlora": "QLoRA"}


class RunFailed(RuntimeError):
    """A run failed; its own output precedes this error."""


class Usage(NamedTuple):
    """Wall time of a run, and peak resident memory of its largest process in 10⁹ bytes, without GPU memory."""

    seconds: float
    peak_memory_gb: float


def torchrun_command(task: str, flags: Sequence[str], processes: int) -> list[str]:
    """Return the command that runs a task's script on this machine, from the root of the repository."""
    # --standalone uses a free port, so that two runs can share a machine.
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", f"finetune_hf_trainer_{task}.py", *flags]


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
    program = {"torchrun": ["-m", "torch.distributed.run"], "python": []}[command[0]]
    # torchrun warns if OMP_NUM_THREADS is not set. The timeout leaves time to save a full checkpoint after SIGTERM.
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "900"}
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *program, *command[1:]], env=defaults | os.environ | environment)

    def stop(number: int, _: Any) -> None:
        if number == signal.SIGTERM:  # the terminal sends Ctrl-C to the run as well
            process.terminate()
        with suppress(ChildProcessError):  # it has ended
            os.waitpid(process.pid, 0)  # a second signal would block forever in process.wait(), on its lock
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # wait4 reports the usage of this process only, unlike getrusage(RUSAGE_CHILDREN).
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RunFailed(f"the run failed with exit code {process.returncode}; see its output above")
    return Usage(time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9)


def read_results(output_dir: Path) -> dict[str, Any]:
    """Read the results of a finished run, with what is needed to interpret them.

    Returns
    -------
    dict
        ``metric`` is the name of the main metric; ``before`` and ``after`` contain all metrics; ``samples`` is the
        number of evaluated samples; also ``train_seconds``, model, revision, data, command, date, hardware and versions.
    """
    from common.runtime.files import read_json

    names = ("run", "eval_before", "eval_after", "train_results")
    run, before, after, training = (read_json(output_dir / f"{name}.json", "run it again") for name in names)
    metrics = [{key: value for key, value in found.items() if isinstance(value, float)} for found in (before, after)]
    described = ("base_model", "base_revision", "method", "data", "command", "date", "hardware", "versions")
    return {
        "metric": after["metric"],
        **dict(zip(("before", "after"), metrics, strict=True)),
        "samples": after["samples"],
        "train_seconds": training["train_runtime"],
        **{name: run[name] for name in described},
    }


def load_published() -> dict[str, Any]:
    """Load the published tables from ``results/published.json``."""
    return json.loads((RESULTS / "published.json").read_text(encoding="utf-8"))


def markdown_table(titles: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Render a Markdown table; cells are converted with ``str``."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def write_page(results_dir: Path, name: str, tables: str) -> None:
    """Write a page of ``results/``, with ``tables`` between its markers, to ``results_dir``."""
    from common.runtime.files import write_file

    head, _, rest = (RESULTS / name).read_text(encoding="utf-8").partition("<!-- generated: begin -->\n")
    _, _, tail = rest.partition("<!-- generated: end -->\n")
    write_file(results_dir / name, f"{head}<!-- generated: begin -->\n{tables}\n<!-- generated: end -->\n{tail}")
