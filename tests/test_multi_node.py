"""Two "nodes" on this machine train as one machine with two processes does, and each prepares its own data."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import forked
import pyarrow as pa
import pytest
import torch.distributed as dist
from accelerate import PartialState
from conftest import ROOT
from forked import be_process, finetune_forked, member_of_group, run_processes, run_script
from runs import SCRIPT, flags, free_port, steps, weights

from common.data.sources import load_conversations
from common.training.output import note_bad_sample

pytestmark = pytest.mark.slow


def be_node(directory: Path, rank: int, *arguments: object) -> None:
    """The process of a machine. It works in directory/node{i}, so that relative paths are on a "disk" of its own."""
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    forked.member_of_group = lambda *group: member_of_group(*group) | alone
    forked.ROOT = directory / f"node{rank}"
    forked.ROOT.mkdir(parents=True, exist_ok=True)
    be_process(rank, *arguments)


def run_nodes(words: list[str], directory: Path) -> None:
    """Run the script on two machines, with one process each."""
    directory.mkdir(exist_ok=True)
    codes = run_script(words, directory / "log", target=partial(be_node, directory))
    assert codes == [0, 0], (directory / "log").read_text()[-5000:]


def run_nodes_with_torchrun(words: list[str], directory: Path) -> list[str]:
    """The same, started by torchrun, which assigns the ranks; return what the machines, of one core each, printed."""
    cores = sorted(os.sched_getaffinity(0))
    port, running, logs = free_port(), [], [directory / f"node{node}.log" for node in range(2)]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    launcher += [f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    for node, log in enumerate(logs):
        with log.open("w") as output:
            options = {"cwd": directory / f"node{node}", "env": os.environ | environment, "stdout": output, "stderr": output}
            options["preexec_fn"] = partial(os.sched_setaffinity, 0, {cores[node % len(cores)]})
            running.append(subprocess.Popen([*launcher, str(ROOT / SCRIPT), *words], **options))
    try:
        for process, log in zip(running, logs, strict=True):
            assert process.wait(timeout=600) == 0, log.read_text()[-5000:]
    finally:
        for process in running:
            process.terminate()  # torchrun ends its processes; SIGKILL would leave them running
    return [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def options(random_model, docvqa_data) -> dict:
    return {
        "model_name_or_path": random_model,
        "data_dir": docvqa_data,
        "batch_size_per_gpu": 1,
        "dataloader_num_workers": 0,
        "max_new_tokens": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
    }


@pytest.fixture(scope="module")
def one_node(options, tmp_path_factory) -> list[dict]:
    """The log of one machine with two processes."""
    return finetune_forked(options["data_dir"], tmp_path_factory.mktemp("one") / "run", deepspeed="none", **options)


def assert_same_steps(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == 3
    for entry, other in zip(found, expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-4)


def test_a_shared_disk(options, one_node, tmp_path):
    words = flags(options["data_dir"], tmp_path / "run", deepspeed="none", **options)
    run_nodes(words, tmp_path)
    assert_same_steps(steps(tmp_path / "run"), one_node)
    for name in ("model.safetensors", "eval_after.json", "README.md", "checkpoint-3/complete.json"):
        assert (tmp_path / "run" / name).is_file(), name


def test_a_disk_each(options, one_node, tmp_path):
    """With ZeRO-2, whose state is sharded over the machines: the run resumes exactly from what each of them saved."""
    words = flags(options["data_dir"], "run", save_on_each_node=True, resume_from_checkpoint="auto", **options)
    run_nodes(words, tmp_path / "straight")
    outputs = [tmp_path / "straight" / f"node{node}" / "run" for node in range(2)]
    log = steps(outputs[0])
    assert_same_steps(log, one_node)
    first, second = map(weights, outputs)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    for node, output in enumerate(outputs):
        for name in ("checkpoint-2", "checkpoint-3"):
            assert (output / name / "complete.json").is_file()
            shutil.copytree(output / name, tmp_path / "resumed" / f"node{node}" / "run" / name)
        note_bad_sample(tmp_path / "resumed" / f"node{node}" / "run", 1, f"an image on machine {node}")
    # One machine failed just before it marked its part of the last checkpoint as complete.
    (tmp_path / "resumed" / "node1" / "run" / "checkpoint-3" / "complete.json").unlink()
    printed = run_nodes_with_torchrun(words, tmp_path / "resumed")
    # Printed once, by process 0, which may be on either machine.
    assert "".join(printed).count("skipping checkpoint-3 (saving was interrupted)\nresuming from run/checkpoint-2") == 1
    resumed = tmp_path / "resumed" / "node0" / "run"
    assert json.loads((resumed / "train_results.json").read_text())["skipped_samples"] == 2
    assert steps(resumed) == log
    assert all(tensor.equal(first[name]) for name, tensor in weights(resumed).items())


def prepare_data(rank, port, folder):
    """Load data on a process, two of which share a machine, and record which one converts it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    datasets.config.HF_DATASETS_CACHE = folder / f"cache{rank // 2}"
    new_file = pa.ipc.new_file

    def recorded(*args, **kwargs):
        (folder / f"converted by {rank}").touch()
        return new_file(*args, **kwargs)

    pa.ipc.new_file = recorded
    PartialState(cpu=True)
    assert len(load_conversations(folder / "data.jsonl", folder)) == 3
    dist.barrier()


def test_one_process_per_node_prepares_data(tmp_path):
    row = {"conversations": [{"user": "Two and two?", "assistant": "Four"}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    port = free_port()
    assert run_processes(prepare_data, [(rank, port, tmp_path) for rank in range(4)]) == [0] * 4
    assert {path.name for path in tmp_path.glob("converted*")} == {"converted by 0", "converted by 2"}
