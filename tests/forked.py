"""Runs of a script without torchrun's start: processes forked from one that has imported everything already.

Starting Python and its libraries anew takes some ten times as long as a run of five steps. Runs through torchrun itself are in
test_training.py and test_multi_node.py.
"""

import multiprocessing
import os
import socket
import sys
import time
from functools import cache
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

from conftest import ROOT
from runs import SCRIPT, flags, steps

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}
PRELOAD = ["finetune_hf_trainer_docvqa", "deepspeed", "transformers.integrations.deepspeed", "common.report.page", "forked"]


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


def be_process(rank: int, processes: int, port: int, words: list[str], log: Path, script: str = SCRIPT) -> None:
    """Be one process of a run, as torchrun would have started it."""
    from common.training.start import _leave_process_group

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


def finetune_forked(
    data: Path, output: Path, processes: int = 2, script: str = SCRIPT, timeout: float = 600, **options: object
) -> list[dict]:
    """As :func:`runs.finetune`, some ten seconds faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = output.with_name(f"{output.name}.log")
    # Workers would be started as these processes are, which takes longer than such a run.
    words = flags(data, output, **({"dataloader_num_workers": 0} | options))
    arguments = (processes, port, words, log, script)
    members = [server().Process(target=be_process, args=(rank, *arguments)) for rank in range(processes)]
    for member in members:
        member.start()
    deadline = time.monotonic() + timeout
    while (running := [member.sentinel for member in members if member.is_alive()]) and time.monotonic() < deadline:
        wait(running, timeout=deadline - time.monotonic())
        if any(member.exitcode for member in members):
            break  # the others would wait for it for ever
    for member in members:
        member.kill()
        member.join()
    assert not any(member.exitcode for member in members), log.read_text()[-6000:]
    return steps(output)
