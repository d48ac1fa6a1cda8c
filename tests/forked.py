"""Programs without starting Python: processes forked from one that has already imported everything.

Starting Python and importing the libraries takes ten times as long as a run of five steps. test_bad_input.py,
test_multi_node.py and `make demo` in test_readme.py use torchrun itself.
"""

import atexit
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

import torch
from conftest import ROOT
from runs import SCRIPT, flags, free_port, steps

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


@cache
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_processes(target: Callable, arguments: Sequence[tuple], timeout: float = 600, patience: float = 30) -> list[int | None]:
    """Call ``target`` in a process per tuple of arguments and return the exit codes.

    When one process fails, the others have ``patience`` seconds to end by themselves. None is the code of a process that was
    killed here.
    """
    members = [server().Process(target=target, args=each) for each in arguments]
    for member in members:
        member.start()
    deadline = time.monotonic() + timeout
    while (running := [member.sentinel for member in members if member.is_alive()]) and time.monotonic() < deadline:
        wait(running, timeout=deadline - time.monotonic())
        if any(member.exitcode for member in members):
            deadline = min(deadline, time.monotonic() + patience)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()
        member.join()
    return codes


def member_of_group(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment variables with which torchrun starts a process on a single machine."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {name: str(value) for name, value in (group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()}


def print_to(log: Path) -> None:
    """Let this process print to a file, to which others may print too."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)


def leave_out_memory_trial() -> None:
    """Let memory be ample instead of measuring what a run needs, which takes longer than a few steps."""
    from common.training import memory

    footprints = [memory.Footprint(0, 1, 1)] * 3
    ample = memory.Trial(*footprints, num_layers=3, states=0, step=0, free=1e12, flops_per_second=1e9, launching=1e-3)
    memory._measure = lambda *_: ample


def be_program(words: Sequence[str], folder: Path, log: Path, variables: dict[str, str]) -> None:
    """Be ``python script.py …`` or ``python -m module …`` in a folder, in one thread and without the memory trial."""
    print_to(log)
    leave_out_memory_trial()
    torch.set_num_threads = lambda count: None  # programs that run at the same time would wait for each other's threads
    atexit._clear()  # what belongs to the process that this one was forked from
    multiprocessing.set_start_method("fork", force=True)  # the default of a program
    os.environ.update(variables)
    os.chdir(folder)
    module, sys.argv = (words[1], words[1:]) if words[0] == "-m" else (Path(words[0]).stem, words)
    sys.path.insert(0, str(folder if words[0] == "-m" else (folder / words[0]).parent))
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def run_program(
    *words: object, folder: Path = ROOT, variables: Sequence[dict[str, str]] = ({},)
) -> subprocess.CompletedProcess:
    """Run ``script.py …`` or ``-m module …`` in a process per set of environment variables. A failure raises no exception."""
    file, log = tempfile.mkstemp(suffix=".log")
    os.close(file)
    codes = run_processes(be_program, [(list(map(str, words)), folder, Path(log), own) for own in variables])
    output = Path(log).read_text()
    os.remove(log)
    return subprocess.CompletedProcess(words, int(any(code != 0 for code in codes)), output)


@contextmanager
def running_demo(*words: str, folder: Path, log: Path, **environment: str) -> Iterator[str]:
    """Run ``tools.demo`` with these flags, and yield the address that it prints."""
    demo = server().Process(target=be_program, args=(["-m", "tools.demo", *words], folder, log, environment))
    demo.start()
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text() if log.exists() else "")):
            assert demo.is_alive(), log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        demo.kill()
        demo.join()


def torchrun(*command: object, processes: int = 2, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a script on CPU processes, as torchrun would. A failure raises no exception."""
    port = free_port()
    variables = [member_of_group(rank, processes, port) | environment for rank in range(processes)]
    return run_program(*command, folder=folder, variables=variables)


def be_process(
    rank: int, processes: int, port: int, words: list[str], log: Path, script: str = SCRIPT, whole: bool = False
) -> None:
    """One process of a run, as torchrun would start it.

    By default without what takes seconds: the HTML report and the memory trial.
    """
    import common.report.page
    from common.training import start

    start.cores_per_process = lambda: 1  # other tests run at the same time
    if not whole:
        common.report.page.report_run = lambda *_: None
        leave_out_memory_trial()
    print_to(log)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, the default of a program
    os.environ.update(member_of_group(rank, processes, port))
    os.chdir(ROOT)
    sys.argv = [script, *words]
    module = import_module(script.removesuffix(".py"))
    try:
        module.run(module.main, module.parse_args())
    except SystemExit:
        start._leave_process_group()  # multiprocessing leaves out what is registered with atexit
        raise


def run_script(
    words: list[str], log: Path, processes: int = 2, script: str = SCRIPT, target: Callable = be_process, **limits: float
) -> list[int | None]:
    """Run a script in forked processes, which print to ``log``, and return their exit codes, as :func:`run_processes`."""
    port = free_port()
    return run_processes(target, [(rank, processes, port, words, log, script) for rank in range(processes)], **limits)


def finetune_forked(
    data: Path, output: Path, processes: int = 2, script: str = SCRIPT, target: Callable = be_process, **options: object
) -> list[dict]:
    """Run a script, which must succeed, and return what it logged for each step; ``options`` are its flags."""
    log = output.with_name(f"{output.name}.log")
    # A worker takes longer to start than these few rows to read.
    words = flags(data, output, **({"dataloader_num_workers": 0} | options))
    assert run_script(words, log, processes, script, target) == [0] * processes, log.read_text()[-6000:]
    return steps(output)
