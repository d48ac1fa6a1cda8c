"""Load: a data set of a million rows, or a run of ten thousand steps: python -m faults.load {rows,steps} [COUNT [MODEL]].

The times of rows depend on the tokenizer, which is the one of MODEL, or else of a small model with a token per character.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import psutil
from forked import be_process, run_script
from PIL import Image
from runs import flags, write_docvqa, write_random_model
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from common.data.batches import PlannedBatches, accumulation_for_budget
from common.data.collator import Collator
from common.data.loader import WorkerLoader, release_memory
from common.data.samples import TrainingData
from common.data.sources import load_conversations
from common.model.checkpoint import load_processor

MEGABYTE = 1e6
PICTURES = 1000
BATCH, TOKENS = 64, 8192
BATCHES = 500  # read before the memory of the worker is measured


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin, used = time.monotonic(), cpu_seconds()
    yield
    print(f"{what}: {time.monotonic() - begin:.1f} s, {cpu_seconds() - used:.1f} s of CPU", flush=True)


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


def measure_rows(count: int, model: str | None = None) -> None:
    """A first and a later run with this many rows, in processes of their own."""
    folder = Path(tempfile.mkdtemp())
    model, path = model or write_random_model(folder / "model"), write_rows(folder, count)
    for run in ("first", "later"):
        # Started anew, so that they share no memory with this process.
        process = multiprocessing.get_context("spawn").Process(
            target=measure_start, args=(f"{count:,} rows, {run} run", model, path)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{count:,} rows, {run} run: exit code {process.exitcode}")
    shutil.rmtree(folder)


def measure_start(name: str, model: str | Path, path: Path) -> None:
    """Times of a start, of an epoch's plan and of a resume, and the memory of a data worker."""
    datasets.config.HF_DATASETS_CACHE = path.parent / "cache"
    processor = load_processor(str(model), num_crops=1)
    with timed(f"{name}: start"):
        rows = load_conversations(path, path.parent, bar=False)
    rows.contents = None  # as build_trainer leaves it
    data = TrainingData(rows, as_it_is, processor, seed=0)
    with timed(f"{name}: lengths"):
        lengths = data.lengths(0, bar=False)
    with timed(f"{name}: plan within a token budget"):
        accumulation = accumulation_for_budget([lengths], BATCH, 0, 1, TOKENS)
    del lengths
    batches = PlannedBatches(len(rows), BATCH, 0, 0, 1, accumulation, measure=data.measure, max_tokens=TOKENS)
    batches.begin_at(len(batches) // accumulation // 2)
    with timed(f"{name}: resumed in the middle of an epoch, until the first batch"):
        next(batch for batch in batches if batch)
    batches.begin_at(0)
    measure_worker(name, data, batches)


def measure_worker(name: str, data: TrainingData, batches: PlannedBatches) -> None:
    """Memory of a data worker after the same number of batches, however many rows there are."""
    release_memory()  # as the trainer does
    collator = Collator(data.processor, packing=True)
    loader = WorkerLoader(data, collator, num_workers=1, batch_sampler=batches, persistent_workers=True)
    read = 0
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        for _ in iter(loader):
            read += 1
            if read == BATCHES:
                [worker] = psutil.Process().children()
                memory = worker.memory_full_info()
                shares = (
                    f"{memory.pss / MEGABYTE:.0f} MB (PSS, files included), {memory.uss / MEGABYTE:.0f} MB of it not shared"
                )
                print(f"{name}: a worker after {read} batches: {shares}", flush=True)
                return


def as_it_is(row: dict, rng: random.Random) -> dict:
    return row


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
    options = {
        "max_steps": count,
        "batch_size": 2,
        "batch_size_per_gpu": 1,
        "logging_steps": 50,
        "save_strategy": "steps",
        "save_steps": max(100, count // 10),
    }
    options |= {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 100, "max_new_tokens": 2}
    options |= {"model_name_or_path": write_random_model(folder / "model")}
    words = flags(write_docvqa(folder / "data"), folder / "run", **options)
    begin = time.monotonic()
    codes = run_script(words, folder / "log", target=be_watched, timeout=4 * 3600)
    lines = [line for line in (folder / "log").read_text().splitlines() if "file handles" in line]
    print("\n".join(lines), f"\n{count:,} steps: {time.monotonic() - begin:.0f} s, exit codes", *codes)
    if any(code != 0 for code in codes):
        sys.exit((folder / "log").read_text()[-5000:])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    what, number, model = [*sys.argv[1:], None, None][:3]
    if what == "rows":
        for count in (1000, int(number or 1_000_000)):
            measure_rows(count, model)
    else:
        measure_steps(int(number or 10_000))
