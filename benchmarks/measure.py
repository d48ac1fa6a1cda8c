"""Shared by the benchmarks: interleaved timing, ratios with their spread, and result files with hardware and versions."""

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

from common.runtime.files import write_file
from common.runtime.machine import cpu_name, versions


def interleave(
    variants: dict[str, Callable[[], Any]],
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time variants alternately, so that other load on the machine affects all of them equally.

    Parameters
    ----------
    variants : dict of str to callable
    repetitions : int
        Number of measured rounds, after one for warmup.
    clock : callable
        Returns seconds.

    Returns
    -------
    dict of str to list of float
        Seconds of each repetition; values with the same index were measured directly after each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rounds = tqdm(range(1 + repetitions), desc="Measuring", leave=False, disable=None)
    for number in rounds:
        for name, function in variants.items():
            rounds.set_postfix_str(name)
            start = clock()
            function()
            if number > 0:
                seconds[name].append(clock() - start)
    return seconds


def summarise(values: list[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest value."""
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Summarize the speedup of the second variant over the first, computed per repetition."""
    return summarise([a / b for a, b in zip(slow, fast, strict=True)])


def describe_hardware() -> dict[str, Any]:
    """Return the CPU, the number of cores available to this process, the memory in GiB, and the GPU."""
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
    """Write a result with command, date, hardware and versions, atomically."""
    result = {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": describe_hardware(),
        "versions": versions(),
        **content,
    }
    write_file(path, result)
