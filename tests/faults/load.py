"""Load: a data set of a million rows, and a run of ten thousand steps: python -m faults.load {rows,steps} [COUNT]."""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import psutil
from forked import be_process, server
from PIL import Image
from runs import flags, free_port, write_docvqa, write_random_model
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from common.data.batches import PlannedBatches
from common.data.collator import Collator
from common.data.loader import WorkerLoader
from common.data.samples import TrainingData
from common.data.sources import load_conversations
from common.model.checkpoint import load_processor

MEGABYTE = 1e6
PICTURES = 1000
PLANNED = 20_000
BATCHES = 300  # read before the memory of the worker is measured


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begin:.1f} s", flush=True)


def write_rows(folder: Path, count: int) -> Path:
    """Conversations of two turns about 1,000 small pictures."""
    for number in range(min(PICTURES, count)):
        Image.new("RGB", (60, 50), (number % 256, 0, 0)).save(folder / f"{number}.png")
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        for number in range(count):
            turns = [{"user": f"Which number is row {number}?", "assistant": f"It is {number}."}]
            turns.append({"user": "And the next one?", "assistant": f"{number + 1}."})
            turns[0]["images"] = [f"{number % PICTURES}.png"]
            file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")
    return path


def measure_rows(count: int) -> None:
    """Times of a start, a plan and a resume, and the memory of a worker."""
    folder = Path(tempfile.mkdtemp())
    model, path = write_random_model(folder / "model"), write_rows(folder, count)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    processor = load_processor(str(model), num_crops=1)
    with timed(f"{count:,} rows, first start"):
        load_conversations(path, folder, bar=False)
    with timed(f"{count:,} rows, later start"):
        data = TrainingData(load_conversations(path, folder, bar=False), lambda row, rng: row, processor, seed=0)
        data.sample_lengths()
    half = count // 8 // 2

    def batches(begin_at: int = 0) -> PlannedBatches:
        planned = PlannedBatches(count, 8, 0, 0, 1, 1, measure=data.measure, max_tokens=4096)
        planned.begin_at(begin_at)
        return planned

    with timed(f"{count:,} rows, resumed in the middle of an epoch, until the first batch"):
        next(batch for batch in batches(half) if batch)
    loader = WorkerLoader(data, Collator(processor, packing=True), num_workers=1, batch_sampler=batches())
    for number, _ in enumerate(iter(loader)):
        if number == min(BATCHES, half):
            [worker] = psutil.Process().children()
            memory = dict(re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{worker.pid}/smaps_rollup").read_text()))
            own, private = int(memory["Pss_Anon"]), int(memory["Private_Dirty"])
            print(f"{count:,} rows, worker: {own / 1e3:.0f} MB without pages of files, {private / 1e3:.0f} MB of them its own")
            break
    begin, measured = time.process_time(), min(PLANNED, count)
    data.measure(0, np.arange(measured))
    print(f"{count:,} rows, plan with a token budget: {(time.process_time() - begin) / measured * 1e6:.0f} µs per row and core")
    with timed(f"{count:,} rows, plan without one"):
        for _ in PlannedBatches(count, 8, 0, 0, 1, 1):
            pass


class Watch(TrainerCallback):
    """Prints memory, file handles, threads and processes on the way."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in (10, 100) or state.global_step % 500 == 0:
            process = psutil.Process()
            numbers = process.num_fds(), process.num_threads(), len(process.children(recursive=True))
            said = "step {:,}: {:.1f} MB, {} file handles, {} threads, {} processes"
            print(said.format(state.global_step, process.memory_info().rss / MEGABYTE, *numbers), file=sys.stderr, flush=True)


def be_watched(rank: int, *arguments) -> None:
    if rank == 0:
        DEFAULT_CALLBACKS.append(Watch)
    be_process(rank, *arguments)


def measure_steps(count: int) -> None:
    """A run on two processes, with checkpoints and evaluations."""
    folder = Path(tempfile.mkdtemp())
    options = {"max_steps": count, "logging_steps": 50, "save_strategy": "steps", "save_steps": max(100, count // 10)}
    options |= {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 100, "max_new_tokens": 2}
    options |= {"model_name_or_path": write_random_model(folder / "model")}
    words = flags(write_docvqa(folder / "data"), folder / "run", **options)
    begin, port = time.monotonic(), free_port()
    members = [server().Process(target=be_watched, args=(rank, 2, port, words, folder / "log")) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    lines = [line for line in (folder / "log").read_text().splitlines() if "file handles" in line]
    print("\n".join(lines), f"\n{count:,} steps: {time.monotonic() - begin:.0f} s, exit codes", *(m.exitcode for m in members))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    what, *number = sys.argv[1:]
    if what == "rows":
        for count in (1000, int(number[0]) if number else 1_000_000):
            measure_rows(count)
    else:
        measure_steps(int(number[0]) if number else 10_000)
