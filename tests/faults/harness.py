"""Runs a fault on two processes, and checks that nothing is lost, left over, torn or hidden by it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from forked import run_script
from runs import flags, weights, write_docvqa, write_random_model
from safetensors.torch import load_file

from .struck import Strike, be_struck

METHODS: dict[str, dict[str, object]] = {
    "ZeRO-2": {},
    "LoRA": {"use_lora": True, "lora_rank": 8},
    "ZeRO-3": {"deepspeed": "common/deepspeed/zero3.json"},
}
# Six steps, four an epoch, with an evaluation after step 3. A checkpoint after steps 2, 4 and 6 replaces the one before.
OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "dataloader_num_workers": 0}
OPTIONS |= {"eval_strategy": "steps", "eval_steps": 3, "max_new_tokens": 2, "eval_batch_size": 2}
SECONDS = 120  # for a run that takes five


@dataclass(frozen=True)
class Fault:
    """A fault and what has to come of it."""

    name: str
    expected: str  # regular expression of what the run says
    methods: tuple[str, ...] = ("LoRA",)  # those of METHODS where the fault takes another course
    strike: Strike | None = None  # what happens to a process of the run
    launcher: Callable[[subprocess.Popen], None] | None = None  # what happens to torchrun, which then starts the run
    damage: Callable[[Path], None] | None = None  # done to a run directory with checkpoints 2 and 4, from which the run resumes
    finishes: bool = False  # whether the run ends as if nothing had happened; if not, it must fail, and then resume
    repair: Callable[[Path, Path], None] | None = None  # what the message asks for, done to run directory and data
    options: dict[str, Any] = field(default_factory=dict)  # further flags
    codes: tuple[int, int] | None = None  # exit code of each process
    frozen: bool = False  # whether a process is left that does not run, and has to be killed
    check: Callable[[Path], None] | None = None  # further check of the run directory, after the fault
    same: bool = True  # whether the weights are those of an undisturbed run; if not, of another run with the same fault
    fast: bool = False  # whether it belongs to make test


@cache
def prepared() -> tuple[Path, Path]:
    """A random model, and data."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    return write_random_model(folder / "model"), write_docvqa(folder / "data", val=2)


@cache
def undisturbed(method: str) -> Path:
    """Directory of a run without faults, which keeps all checkpoints."""
    model, data = prepared()
    output = model.parent / method / "run"
    output.parent.mkdir()
    codes, said = run(output, data, METHODS[method] | {"save_total_limit": None})
    assert codes == (0, 0), said[-5000:]
    return output


def run(output: Path, data: Path, options: dict, fault: Fault | None = None) -> tuple[tuple[int | None, ...], str]:
    """Exit codes of the processes of a run, and what they said."""
    log = output.parent / "log"
    log.unlink(missing_ok=True)
    words = flags(data, output, **({"model_name_or_path": prepared()[0]} | OPTIONS | options))
    if fault and fault.launcher:
        codes: tuple[int | None, ...] = (launch(output, data, words, log, fault.launcher),)
    else:
        target = partial(be_struck, fault.strike if fault else None, output, data)
        patience = 0 if fault and fault.frozen else SECONDS
        codes = tuple(run_script(words, log, target=target, timeout=SECONDS, patience=patience))
    said = log.read_text(errors="replace")
    assert None not in codes or (fault and fault.frozen), f"hangs: {codes}\n{said[-5000:]}"
    deadline = time.monotonic() + 3
    while (left := processes_writing_to(log)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"processes are left: {left}\n{said[-3000:]}"
    return codes, said


def launch(output: Path, data: Path, words: list[str], log: Path, act: Callable[[subprocess.Popen], None]) -> int:
    """Start the run by torchrun, act on it while its processes wait in step 3, and return its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "faults.struck"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with log.open("w") as file:
        arguments = [*command, str(output), str(data), *words]
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + SECONDS
    while len(list(output.parent.glob("reached-*"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    act(process)
    (output.parent / "sent").touch()
    try:
        return process.wait(SECONDS)
    finally:
        process.kill()


def processes_writing_to(log: Path) -> list[int]:
    """Processes, also workers of workers, whose standard output is a run's log."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(directory / "fd/1") == str(log) and "zombie" not in (directory / "status").read_text():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def check_files(output: Path) -> None:
    """No torn file stands under a final name."""
    for path in output.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    for path in output.glob("*.safetensors"):
        load_file(path)
    page = output / "report.html"
    assert not page.exists() or page.read_text(encoding="utf-8").rstrip().endswith("</html>")


def same_weights(first: Path, second: Path) -> bool:
    found, wanted = weights(first), weights(second)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def run_fault(fault: Fault, method: str, folder: Path) -> str:
    """Run a fault; return what the run said about it.

    Raises
    ------
    AssertionError
        If the outcome is not as described.
    """
    output, data = folder / "run", folder / "data"
    shutil.copytree(prepared()[1], data)
    options = METHODS[method] | fault.options
    reference = undisturbed(method)
    if fault.damage:
        output.mkdir()
        for name in ("eval_before.json", "checkpoint-2", "checkpoint-4"):
            (shutil.copytree if (reference / name).is_dir() else shutil.copy)(reference / name, output / name)
        fault.damage(output)
        options |= {"resume_from_checkpoint": "auto"}
    codes, said = run(output, data, options, fault)
    if fault.finishes:
        assert set(codes) == {0}, f"exit codes {codes}\n{said[-5000:]}"
    else:
        assert any(codes), f"exit codes {codes}\n{said[-5000:]}"
    assert fault.codes in (None, codes), f"exit codes {codes}\n{said[-5000:]}"
    found = re.search(fault.expected, said)
    assert found, f"not said: {fault.expected}\n{said[-5000:]}"
    tracebacks = said.split("Traceback (most recent call last)")[1:]
    # torchrun ends with its own.
    assert all(fault.launcher and "torch/distributed/run.py" in text for text in tracebacks), said[-8000:]
    check_files(output)
    if fault.check:
        fault.check(output)
    if not fault.finishes:
        if fault.repair:
            fault.repair(output, data)
        codes, resumed = run(output, data, options | {"resume_from_checkpoint": "auto"})
        assert codes == (0, 0), f"does not resume: {codes}\n{resumed[-5000:]}"
        check_files(output)
    if not fault.same:
        (folder / "again").mkdir()
        reference = folder / "again/run"
        shutil.rmtree(data)
        shutil.copytree(prepared()[1], data)
        codes, said = run(reference, data, options, fault)
    assert same_weights(output, reference), "ends at other weights"
    line = found.group().strip().replace(f"{folder}/", "").replace("\n", "; ")
    return line if len(line) <= 110 else f"{line[:107]}…"
