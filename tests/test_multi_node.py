"""Several machines: two "nodes" on this one train as one machine with two processes does, and each prepares its own data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forked import finetune_forked
from runs import SCRIPT, flags, free_port, steps, weights, write_docvqa, write_random_model

pytestmark = pytest.mark.slow

# Loads data of the general format on every process, and writes down which of them converted it.
PREPARE = """
import os, sys
from pathlib import Path

import pyarrow as pa
from accelerate import PartialState

from common.data.sources import load_conversations

new_stream = pa.ipc.new_stream

def recorded(*args, **kwargs):
    with open(sys.argv[2], "a") as log:
        print(os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"], file=log)
    return new_stream(*args, **kwargs)

pa.ipc.new_stream = recorded
state = PartialState(cpu=True)
path = Path(sys.argv[1])
rows = load_conversations(path, path.parent)
print(f"process {state.process_index} of {state.num_processes}: {len(rows)} rows")
"""


def published_form(node: int, port: int) -> list[str]:
    return f"--master_addr=127.0.0.1 --master_port={port} --node_rank={node}".split()


def rendezvous_form(node: int, port: int) -> list[str]:
    return f"--rdzv_backend=c10d --rdzv_endpoint=localhost:{port} --rdzv_id=test".split()


def run_nodes(form, command: list, processes: int, directory: Path, environment=lambda node: {}) -> list[str]:
    """Start torchrun twice, as one would on each machine, and return what each printed.

    Node i works in directory/node{i}, so that relative paths are on a "disk" of its own.
    """
    port = free_port()
    shape = ["--nnodes=2", f"--nproc_per_node={processes}"]
    running, logs = [], [directory / f"node{node}.log" for node in range(2)]
    for node, log in enumerate(logs):
        (directory / f"node{node}").mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *shape, *form(node, port), *map(str, command)],
                    cwd=directory / f"node{node}",
                    env=os.environ
                    | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
                    | environment(node),
                    stdout=output,
                    stderr=output,
                )
            )
    try:
        for process, log in zip(running, logs, strict=True):
            assert process.wait(timeout=600) == 0, log.read_text()[-5000:]
    finally:
        for process in running:
            process.terminate()  # torchrun ends its own processes; killed, it would leave them
    return [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return {
        "model_name_or_path": write_random_model(tmp_path_factory.mktemp("model") / "random"),
        "data_dir": write_docvqa(tmp_path_factory.mktemp("docvqa"), val=1),
        "batch_size_per_gpu": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "steps",
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def one_node(options, tmp_path_factory) -> list[dict]:
    """Steps of one machine with two processes."""
    return finetune_forked(options["data_dir"], tmp_path_factory.mktemp("one") / "run", deepspeed="none", **options)


def assert_same_steps(found: list[dict], expected: list[dict]) -> None:
    # A process that has a machine of its own computes with more threads: sums come in another order.
    assert len(found) == len(expected) == 4
    for entry, other in zip(found, expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-4)


def test_published_form_on_a_shared_disk(options, one_node, tmp_path):
    words = flags(options["data_dir"], tmp_path / "run", deepspeed="none", **options)
    run_nodes(published_form, [ROOT / SCRIPT, *words], 1, tmp_path)
    assert_same_steps(steps(tmp_path / "run"), one_node)
    for name in ("model.safetensors", "eval_after.json", "README.md", "checkpoint-4/complete.json"):
        assert (tmp_path / "run" / name).is_file(), name


def test_rendezvous_form_with_a_disk_each(options, one_node, tmp_path):
    """With ZeRO-2, whose state is spread over the machines; what each saved is enough to go on from, exactly."""
    words = flags(options["data_dir"], "run", save_on_each_node=True, resume_from_checkpoint="auto", **options)
    run_nodes(rendezvous_form, [ROOT / SCRIPT, *words], 1, tmp_path / "straight")
    outputs = [tmp_path / "straight" / f"node{node}" / "run" for node in range(2)]
    log = steps(outputs[0])
    assert_same_steps(log, one_node)
    first, second = map(weights, outputs)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    for node, output in enumerate(outputs):
        for name in ("checkpoint-2", "checkpoint-4"):
            assert (output / name / "complete.json").is_file()
            shutil.copytree(output / name, tmp_path / "resumed" / f"node{node}" / "run" / name)
    # One machine was cut off just before it declared its part of the last checkpoint complete.
    (tmp_path / "resumed" / "node1" / "run" / "checkpoint-4" / "complete.json").unlink()
    printed = run_nodes(rendezvous_form, [ROOT / SCRIPT, *words], 1, tmp_path / "resumed")
    # Said once, by the first process of all, on whichever machine the rendezvous put it.
    assert "skipping checkpoint-4 (saving was interrupted)\nresuming from run/checkpoint-2" in "".join(printed)
    resumed = tmp_path / "resumed" / "node0" / "run"
    assert steps(resumed) == log
    assert all(tensor.equal(first[name]) for name, tensor in weights(resumed).items())


def test_one_process_a_node_prepares_data(tmp_path):
    row = {"conversations": [{"user": "Two and two?", "assistant": "Four"}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (tmp_path / "prepare.py").write_text(PREPARE)
    printed = run_nodes(
        rendezvous_form,
        [tmp_path / "prepare.py", tmp_path / "data.jsonl", tmp_path / "log"],
        2,
        tmp_path,
        environment=lambda node: {"HF_DATASETS_CACHE": str(tmp_path / f"cache{node}")},
    )
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["0 0", "1 0"]
    # Processes share a log, where one may begin in the middle of another's line.
    assert sorted(re.findall(r"process (\d) of 4: 3 rows", "".join(printed))) == ["0", "1", "2", "3"]
