"""What a figure was measured on: the processors or GPUs, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "pillow")
LIBRARIES += ("flash-attn", "liger-kernel")


def hardware() -> str:
    """What a run is computed on, over all processes: ``8 × NVIDIA A100-SXM4-80GB``, say."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if torch.cuda.is_available():
        return f"{world_size} × {torch.cuda.get_device_name()}"
    processes = f"{world_size} CPU process{'es' if world_size > 1 else ''}"
    return f"{processes} on {os.cpu_count()} cores of {cpu_name()}"


def cpu_name() -> str:
    """The processor's name and, where Linux tells them, its family and model: some clouds hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    name = names.get("model name", platform.machine())
    return f"{name}, family {names['cpu family']} model {names['model']}" if "cpu family" in names else name


def versions() -> dict[str, str]:
    """Versions of Python, of CUDA as torch was built for it, and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
