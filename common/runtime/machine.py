"""Hardware of a run and versions of its libraries."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .process import counted, local_world_size, world_size

LIBRARIES = (
    *("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "pillow"),
    *("flash-attn", "liger-kernel"),
)


def cores_per_process() -> int:
    """CPU cores available to this process: its share of the cores available on this machine."""
    # macOS does not support CPU affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())


def hardware() -> str:
    """Describe the hardware of all processes, for example ``8 × NVIDIA A100-SXM4-80GB``."""
    count = world_size()
    if torch.cuda.is_available():
        return f"{count} × {torch.cuda.get_device_name()}"
    cores = counted(os.cpu_count() or 1, "core")
    return f"{counted(count, 'CPU process', 'CPU processes')} on {cores} of {cpu_name()}"


def cpu_name() -> str:
    """Name of the CPU and, on Linux, its family and model, since some clouds hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    name = names.get("model name", platform.machine())
    return f"{name}, family {names['cpu family']} model {names['model']}" if "cpu family" in names else name


def versions() -> dict[str, str]:
    """Versions of Python, of the CUDA that PyTorch was built for, and of the installed libraries."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
