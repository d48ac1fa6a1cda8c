"""Runs without torchrun: processes forked from one that has already imported everything.

Starting Python and importing the libraries takes ten times as long as a run of five steps. test_training.py, test_multi_node.py
and the tests of the tasks use torchrun itself.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

from conftest import ROOT
from runs import SCRIPT, flags, free_port, steps

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}
PRELOAD = ["finetune_hf_trainer_docvqa", "deepspeed", "transformers.integrations.deepspeed", "forked"]
PRELOAD += ["common.report.page", "common.report.model_card"]


@cache
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_processes(target: Callable, arguments: Sequence[tuple], timeout: float = 600) -> list[int | None]:
    """Call ``target`` in a process per tuple of arguments and return the exit codes.

    When one process fails, the others have 30 seconds to end by themselves. None is the code of a process that was killed here.
    """
    members = [server().Process(target=target, args=each) for each in arguments]
    for member in members:
        member.start()
    deadline = time.monotonic() + timeout
    while (running := [member.sentinel for member in members if member.is_alive()]) and time.monotonic() < deadline:
        wait(running, timeout=deadline - time.monotonic())
        if any(member.exitcode for member in members):
            deadline = min(deadline, time.monotonic() + 30)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()
        member.join()
    return codes


def be_process(
    rank: int, processes: int, port: int, words: list[str], log: Path, script: str = SCRIPT, report: bool = False
) -> None:
    """One process of a run, as torchrun would start it. The HTML report, which takes seconds, is left out by default."""
    import common.report.page
    from common.training.start import _leave_process_group

    if not report:
        common.report.page.report_run = lambda *_: None
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(ROOT)
    sys.argv = [script, *words]
    module = import_module(script.removesuffix(".py"))
    try:
        module.run(module.main, module.parse_args())
    except SystemExit:
        _leave_process_group()  # multiprocessing leaves out what is registered with atexit
        raise


def run_script(
    words: list[str], log: Path, processes: int = 2, script: str = SCRIPT, target: Callable = be_process, timeout: float = 600
) -> list[int | None]:
    """Run a script in forked processes, which print to ``log``, and return their exit codes."""
    port = free_port()
    return run_processes(target, [(rank, processes, port, words, log, script) for rank in range(processes)], timeout)


def finetune_forked(
    data: Path, output: Path, processes: int = 2, script: str = SCRIPT, target: Callable = be_process, **options: object
) -> list[dict]:
    """Run a script, which must succeed, and return what it logged for each step; ``options`` are its flags."""
    log = output.with_name(f"{output.name}.log")
    # Workers would not be forked, so that their start would take longer than the run.
    words = flags(data, output, **({"dataloader_num_workers": 0} | options))
    assert run_script(words, log, processes, script, target) == [0] * processes, log.read_text()[-6000:]
    return steps(output)
