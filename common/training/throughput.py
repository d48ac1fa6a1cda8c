"""Training throughput: images and tokens per second, and the model FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.phi3v.flops import TrainingFlops, peak_flops
from common.runtime.collectives import sum_over_processes
from common.runtime.process import world_size


class Throughput:
    """What all processes have trained on since the last log entry, and in which time.

    Parameters
    ----------
    flops : TrainingFlops
        Counts the FLOPs of a batch.
    device : torch.device
        Device of this process.
    """

    def __init__(self, flops: TrainingFlops, device: torch.device) -> None:
        self.flops, self.device = flops, device
        self._processed = torch.zeros(3, dtype=torch.float64)  # images, tokens, FLOPs
        self._since: float | None = None

    def add(self, inputs: dict[str, Any]) -> None:
        """Count a micro-batch, before its forward pass."""
        if self._since is None:
            self._since = time.perf_counter()
        sizes = self.flops.sizes(inputs)
        images = len(inputs["image_sizes"]) if "image_sizes" in inputs else 0
        self._processed += torch.tensor([images, sizes.tokens, sum(self.flops.count(sizes))], dtype=torch.float64)

    def take(self) -> dict[str, float]:
        """Return the values for the log, and start again. Must be called on all processes."""
        now = time.perf_counter()
        processed = sum_over_processes(self._processed.to(self.device))
        images, tokens, flops = (processed / (now - (self._since or now))).tolist()
        self._processed.zero_()
        self._since = now
        logs = {"images_per_second": round(images, 3), "tokens_per_second": round(tokens, 1)}
        if peak := peak_flops(self.device):
            logs["mfu"] = round(flops / (peak * world_size()), 4)
        return logs

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the time that is spent here, between two steps."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start
