"""What the benchmarks share: interleaved timing, ratios with their spread, results with what they were measured on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from common.runtime import cpu_name, versions, write_file

RESULTS = Path(__file__).parent / "results"


def interleave(
    variants: dict[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
    uncounted: int = 1,
) -> dict[str, list[float]]:
    """Time variants in turn, after ``uncounted`` rounds, so that a machine's moods meet all of them.

    Returns
    -------
    dict of str to list of float
        Seconds of each repetition; those at one index were measured right after each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rounds = tqdm(range(uncounted + repetitions), desc="Measuring", leave=False, disable=None)
    for number in rounds:
        for name, function in variants.items():
            rounds.set_postfix_str(name)
            start = clock()
            function()
            if number >= uncounted:
                seconds[name].append(clock() - start)
    return seconds


def summarise(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster the second is, repetition by repetition."""
    return summarise([a / b for a, b in zip(slow, fast, strict=True)])


def describe_hardware() -> dict[str, Any]:
    """Processor, its cores that this process may use, memory in GiB, and the GPU."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return found


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write what was measured with hardware, versions, command and date; whole or not at all."""
    result = {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": describe_hardware(),
        "versions": versions(),
        **content,
    }
    write_file(path, result)
