"""The summary that a run prints before training."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import nn

from common.arguments import Setup, method_name
from common.data.batches import Lengths, PlannedBatches
from common.data.streaming import StreamedBatches
from common.model.loading import count_parameters
from common.phi3v.flops import TrainingFlops
from common.phi3v.parts import PARTS
from common.runtime.process import counted, world_size

from .memory import Trial, mean_flops, state_bytes

GIB = 2**30
RECOMPUTATION = {
    "none": "none",
    "elementwise": "norms and activations",
    "vision": "all vision layers",
    "selective": "every second decoder layer, all vision layers",
    "full": "all layers",
}


def summarize(
    args: argparse.Namespace,
    setup: Setup,
    model: nn.Module,
    num_rows: int,
    batches: PlannedBatches | StreamedBatches,
    lengths: Lengths,
    recomputation: str,
    trial: Trial | None,
    flops: TrainingFlops,
) -> str:
    """Return the summary of a run: one line per entry, as ``name: value``.

    Memory and time are estimated from the trial and from ``lengths``, those of some or all samples.
    """
    processes = world_size()
    steps = number_of_steps(args.max_steps, args.num_train_epochs, batches)
    low, mean, high = lengths.tokens.min(), lengths.tokens.mean(), lengths.tokens.max()
    views = lengths.views.mean()
    counts = count_parameters(model)
    parts = [f"{trained / 1e6:,.1f} of {total / 1e6:,.1f} M of {part}" for part, (trained, total) in counts.items()]
    lora = f", rank {args.lora_rank}, alpha {round(args.lora_rank * args.lora_alpha_ratio)}, dropout {args.lora_dropout:g}"
    rates = [f"learning rate {args.learning_rate:g}"]
    rates += [f"{part} {rate:g}" for part in PARTS[1:] if (rate := getattr(args, f"{part}_learning_rate"))]
    kernels = [name for name, used in (("Liger", args.use_liger_kernel), ("torch.compile", args.torch_compile)) if used]
    kernels += [] if args.fused_layers else ["layers of transformers and PEFT"]
    wrapper = f"DeepSpeed {Path(setup.deepspeed).name}" if setup.deepspeed else "DDP" if processes > 1 else "single process"
    lines = {
        "model": f"{args.model_name_or_path}, {sum(total for _, total in counts.values()) / 1e6:,.1f} M parameters",
        "trainable": ", ".join(parts),
        "method": method_name(args) + (lora if args.use_lora or args.use_qlora else ""),
        "attention": f"{setup.attention} ({setup.attention_reason}), packing {'on' if setup.packing else 'off'}",
        "precision": ", ".join([f"{setup.precision} on {_device_name(setup.device)}", *kernels]),
        "optimizer": ", ".join([args.optim, *rates, wrapper]),
        "batch": _batch(args.batch_size, setup, processes, batches),
        "steps": f"{steps:,} on {counted(num_rows, 'row')}, {_schedule(args.lr_scheduler_type, args.warmup_steps, steps)}",
        "samples": f"{low:,} to {high:,} tokens (mean {mean:,.0f}), {views:.1f} crops and global views on average",
        "recompute": RECOMPUTATION[recomputation] + (" (auto)" if args.gradient_checkpointing == "auto" else ""),
    }
    if trial is not None:
        loaded = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        needed = loaded + trial.needed(recomputation, *batches.largest(lengths))
        lines["memory"] = f"about {needed / GIB:.1f} GiB per process, {(loaded + trial.free) / GIB:.1f} GiB available"
        forward, backward = (args.batch_size / processes * each for each in mean_flops(flops, lengths))
        seconds = steps * trial.seconds(recomputation, (forward, backward), batches.accumulation)
        lines["time"] = f"about {approximate_duration(seconds)}, without saving and evaluation"
    elif setup.zero_stage == 3:
        bytes_per_weight = torch.finfo(next(model.parameters()).dtype).bits / 8
        weights = bytes_per_weight * sum(total for _, total in counts.values()) / processes
        needed = (weights + state_bytes(model, args.optim, setup)) / GIB
        lines["memory"] = (
            f"about {needed:.1f} GiB per process for weights and states; activations cannot be measured under ZeRO-3"
        )
        lines["time"] = "not estimated: no trial is possible under ZeRO-3"
    else:
        lines["memory"] = lines["time"] = "not estimated: not even a small batch fits"
    return "\n".join(f"{name + ':':13}{text}" for name, text in lines.items())


def number_of_steps(max_steps: int, num_train_epochs: float, batches: PlannedBatches | StreamedBatches) -> int:
    """Return the number of optimizer steps of a run."""
    steps_per_epoch = len(batches) // batches.accumulation
    return max_steps if max_steps > 0 else math.ceil(num_train_epochs * steps_per_epoch)  # as transformers


def approximate_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, as text."""
    if seconds < 90:
        return counted(round(seconds), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _schedule(name: str, warmup_steps: float, steps: int) -> str:
    if name == "constant":
        return "constant learning rate, without warmup"
    warmup = int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * steps)  # as TrainingArguments
    if warmup < steps:
        return f"learning rate warmup for {warmup:,}, then {name.replace('_', ' ')}"
    return f"all of them warmup (--warmup_steps {warmup_steps:g}): the learning rate never reaches its peak"


def _batch(batch_size: int, setup: Setup, count: int, batches: PlannedBatches | StreamedBatches) -> str:
    if batches.max_tokens:
        share = f"{counted(batches.accumulation, 'micro-batch', 'micro-batches')} of up to {batches.max_tokens:,} tokens"
        share += " (auto)" if setup.max_tokens_per_batch == "auto" else ""
    else:
        share = f"{setup.batch_size_per_gpu} per micro-batch × {batches.accumulation} accumulation"
    return f"{counted(batch_size, 'sample')} per step = {counted(count, 'process', 'processes')} × {share}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} per process"
