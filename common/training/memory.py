"""Estimate of the memory that training needs: gradients and optimizer states, and the activations of a batch.

Activation memory grows linearly with tokens and with views (crops and global views). The slopes depend on precision, attention,
adapters, kernels and recomputation, so they are measured on the device, with small batches of one and two images.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from common.arguments import Setup, trained_parts
from common.data.batches import Lengths
from common.model.loading import autocast, base_model, set_gradient_checkpointing
from common.phi3v.flops import BatchSizes, TrainingFlops
from common.phi3v.fused import recompute_elementwise
from common.phi3v.image_processing import CROP_SIZE, TOKENS_PER_SIDE, num_image_tokens
from common.runtime.collectives import gather
from common.runtime.process import local_world_size, world_size

from .deepspeed import zero_settings

# Recomputation, from the fastest to the one that needs the least memory, and the share of a forward pass that it repeats.
REPEATED = {"none": 0.0, "elementwise": 0.1, "vision": 0.3, "selective": 0.6, "full": 1.0}
MODES = tuple(REPEATED)
# Fraction of the free memory that is planned for; the rest is for temporary tensors, communication and fragmentation.
USABLE_SHARE = 0.85
SHORT_TEXT, LONG_TEXT = 32, 160  # text tokens of the samples that are measured
BACKWARD_LAUNCHES = 2  # kernels of a backward pass for each of a forward pass, as benchmarks.roofline counts them
# An assumption: the answers are not tokenized for the estimates, and their share of the cost is small.
SUPERVISED_TOKENS_PER_SAMPLE = 16


@dataclass(frozen=True)
class Footprint:
    """Bytes that the forward pass stores for the backward pass: ``fixed + per_token × tokens + per_view × views``."""

    fixed: float
    per_token: float
    per_view: float

    def bytes(self, tokens: float, views: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_view * views


@dataclass(frozen=True)
class Trial:
    """Measured memory and speed of a model on a device."""

    keeping: Footprint  # without recomputation
    elementwise: Footprint  # with recomputation of norms and activations
    recomputing: Footprint  # with recomputation of all layers
    num_layers: int  # of the decoder
    states: float  # bytes of gradients, optimizer states and master weights, in addition to the loaded model
    step: float  # temporary bytes of an optimizer step, when the activations have been freed
    free: float  # bytes that are free on the device for this process
    flops_per_second: float  # of the forward pass of a large batch
    launching: float  # seconds of the forward pass of a small batch, most of which the CPU needs to launch it

    def needed(self, mode: str, tokens: float, views: float) -> float:
        """Bytes that training needs in addition to the loaded model, for a mode and the size of the largest micro-batch."""
        return self.states + max(self.step, self._activations(mode, tokens, views))

    def _activations(self, mode: str, tokens: float, views: float) -> float:
        kept, recomputed = self.keeping.bytes(tokens, views), self.recomputing.bytes(tokens, views)
        # The backward pass holds all activations of one layer at a time.
        one_layer = (kept - recomputed) / self.num_layers
        tower_kept = (self.keeping.per_view - self.recomputing.per_view) * views
        return {
            "none": kept,
            "elementwise": self.elementwise.bytes(tokens, views) + one_layer,
            "vision": kept - tower_kept + tower_kept / self.num_layers,
            "selective": (kept - tower_kept + recomputed) / 2 + one_layer,
            "full": recomputed + one_layer,
        }[mode]

    def most_tokens(self, mode: str, lengths: Lengths) -> int:
        """Tokens of the largest batch of such samples that fits into the free memory; 0 if none does."""
        room = USABLE_SHARE * self.free - self.states
        empty = self._activations(mode, 0, 1)  # the number of views is rounded up
        per_token = self._activations(mode, 1, 1 + (lengths.views / lengths.tokens).max()) - empty
        return max(0, int((room - empty) / per_token)) if room >= self.step else 0

    def seconds(self, mode: str, flops: tuple[float, float], micro_batches: int) -> float:
        """Time of a step without the optimizer: that of its FLOPs, or of launching its kernels if this takes longer.

        ``flops`` are those of the forward passes and of the backward passes of this process.
        """
        forward, backward = flops
        computing = ((1 + REPEATED[mode]) * forward + backward) / self.flops_per_second
        return max(computing, micro_batches * (1 + REPEATED[mode] + BACKWARD_LAUNCHES) * self.launching)


def recomputation_modes(args: argparse.Namespace) -> tuple[str, ...]:
    """The modes of ``--gradient_checkpointing`` from which a run chooses, or the one that is set."""
    if args.gradient_checkpointing != "auto":
        return (args.gradient_checkpointing,)
    # Layers of transformers have no operations to recompute, and torch.compile decides itself what to recompute in a layer.
    without = set() if args.fused_layers and not args.torch_compile else {"elementwise"}
    if "vision" not in trained_parts(args.train_only, args.train_fully, args.freeze_vision_model):
        without.add("vision")  # a frozen tower stores nothing
    return tuple(mode for mode in MODES if mode not in without)


def least_recomputation(trial: Trial | None, tokens: int, views: int, modes: tuple[str, ...] = MODES) -> str:
    """Return the fastest mode that fits into the free memory with the largest micro-batch, or the last mode if none does."""
    fitting = [mode for mode in modes if trial and trial.needed(mode, tokens, views) <= USABLE_SHARE * trial.free]
    return fitting[0] if fitting else modes[-1]


def fastest_budget(
    trial: Trial,
    modes: tuple[str, ...],
    lengths: Lengths,
    flops: tuple[float, float],
    micro_batches: Callable[[int], int],
) -> int | None:
    """Tokens per micro-batch with which a step is predicted to take the least time, in the best of the modes.

    More recomputation leaves room for larger micro-batches, of which a step needs fewer.

    Parameters
    ----------
    trial : Trial
    modes : tuple of str
    lengths : Lengths
        Of all samples.
    flops : (float, float)
        Of the forward passes and of the backward passes of a process in a step.
    micro_batches : callable
        Returns how many micro-batches of at most so many tokens a process needs for a step.

    Returns
    -------
    int or None
        None if the largest sample fits in none of the modes.
    """
    found = []
    for mode in modes:
        budget = trial.most_tokens(mode, lengths)
        if budget >= lengths.tokens.max():
            found.append((trial.seconds(mode, flops, micro_batches(budget)), budget))
    return min(found)[1] if found else None


def mean_flops(flops: TrainingFlops, lengths: Lengths) -> tuple[float, float]:
    """Mean FLOPs of the forward pass and of the backward pass of a sample, without recomputation."""
    tokens = lengths.tokens.astype(np.float64)
    views = lengths.views.sum()
    sizes = BatchSizes(
        tokens=tokens.sum(),
        pairs=(tokens * (tokens + 1) / 2).sum(),
        views=views,
        image_tokens=TOKENS_PER_SIDE**2 * views,
        supervised=SUPERVISED_TOKENS_PER_SAMPLE * len(tokens),
    )
    forward, backward = flops.count(sizes)
    return forward / len(tokens), backward / len(tokens)


def estimate_memory(model: nn.Module, setup: Setup, optim: str, flops: TrainingFlops) -> Trial | None:
    """Measure activation memory and speed with a few small forward passes. Must be called on all processes.

    Parameters
    ----------
    model : torch.nn.Module
        On the device, not yet wrapped by DeepSpeed or DDP; it is not changed.
    setup, optim, flops
        Optimizer by its name in TrainingArguments; the FLOPs of a batch.

    Returns
    -------
    Trial or None
        That of the process with the least free memory, the same on all processes. None if nothing can be measured: ZeRO-3
        partitions the weights, or not even a small batch fits on one of the processes.
    """
    own = None if setup.zero_stage == 3 else _measure(model, setup, optim, flops)
    trials = [trial for trial in gather(own) if trial]
    return min(trials, key=lambda trial: trial.free) if len(trials) == world_size() else None


def _measure(model: nn.Module, setup: Setup, optim: str, flops: TrainingFlops) -> Trial | None:
    device = setup.device
    footprints, training = {}, model.training
    model.train()
    # DeepSpeed trains without autocast, in bf16 or fp16 weights; adapters are still fp32 here.
    plain = setup.deepspeed is not None and base_model(model) is model
    precision = nullcontext() if plain else autocast(model, setup.precision == "bf16")
    # Dropout must not change the random state of the run.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), precision:
        try:
            for mode in ("none", "elementwise", "full"):
                set_gradient_checkpointing(model, mode)
                sizes = ((1, SHORT_TEXT), (1, LONG_TEXT), (2, SHORT_TEXT))
                batches = [_batch(images, text, setup.packing, device) for images, text in sizes]
                short, long, double = (kept_bytes(model, batch) for batch in batches)
                tokens, views = ([vars(flops.sizes(batch))[unit] for batch in batches] for unit in ("tokens", "views"))
                per_token = (long - short) / (tokens[1] - tokens[0])
                per_view = (double - short - per_token * (tokens[2] - tokens[0])) / (views[2] - views[0])
                footprints[mode] = Footprint(short - per_token * tokens[0] - per_view * views[0], per_token, per_view)
            # A GPU reaches its speed with large batches only; with full recomputation they need little memory.
            timed = _batch(8, 2000, setup.packing, device) if device.type == "cuda" else batches[1]
            launching, seconds = (_seconds_forward(model, batch, device) for batch in (batches[0], timed))
        except torch.OutOfMemoryError:
            return None
        finally:
            model.train(training)
            # torch.utils.checkpoint leaves reference cycles that hold the inputs of recomputed layers.
            gc.collect()
    return Trial(
        keeping=footprints["none"],
        elementwise=footprints["elementwise"],
        recomputing=footprints["full"],
        num_layers=base_model(model).config.num_hidden_layers,
        states=state_bytes(model, optim, setup),
        step=step_bytes(model, setup),
        free=free_bytes(device),
        flops_per_second=flops.count(flops.sizes(timed))[0] / seconds,
        launching=launching,
    )


def kept_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that a forward pass stores for the backward pass, without the weights and buffers of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def observe(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device == batch["input_ids"].device and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        observe(tensor)
        # The graph keeps the storage alive, so no other tensor gets its address. Without detach, an operation that saves its
        # own output would keep itself alive, and everything else that it saved.
        return tensor.detach()

    elementwise = base_model(model).recompute_elementwise
    with recompute_elementwise(observe) if elementwise else saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, skip_logits=True).loss
    del loss
    return sum(kept.values())


def state_bytes(model: nn.Module, optim: str, setup: Setup) -> float:
    """Bytes of gradients, optimizer states and master weights on this process's device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)  # ZeRO-3 keeps them elsewhere
    processes = world_size()
    moments = 0 if "paged" in optim or optim in ("adafactor", "sgd") else 2 if "8bit" in optim else 8
    if setup.deepspeed is None:
        return sum(parameter.nbytes for parameter in trained) + 4 * _count_bf16(trained) + moments * count
    zero, halves = zero_settings(setup.deepspeed), setup.precision != "fp32"
    size, stage = 2 if halves else 4, zero.get("stage", 0)
    bucket = zero.get("reduce_bucket_size", 5e8)
    if bucket == "auto":
        bucket = base_model(model).config.hidden_size ** 2  # as transformers fills it in
    masters_and_moments = (4 + moments if halves else moments) * count / (processes if stage >= 1 else 1)
    gradients = size * count / (processes if stage >= 2 else 1)
    return (0 if "offload_optimizer" in zero else masters_and_moments) + gradients + 2 * size * min(bucket, count)


def step_bytes(model: nn.Module, setup: Setup) -> float:
    """Temporary bytes of an optimizer step: the fp32 copy of the gradients for which a process has master weights."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if setup.deepspeed is None:
        return 4 * _count_bf16(trained)
    if setup.precision == "fp32":
        return 0
    zero = zero_settings(setup.deepspeed)
    if zero.get("stage", 0) not in (1, 2) or "offload_optimizer" in zero:
        return 0
    return 4 * sum(parameter.numel() for parameter in trained) / world_size()


def _count_bf16(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.dtype == torch.bfloat16)


def free_bytes(device: torch.device) -> float:
    """Free bytes for this process: of its GPU, or its share of the free memory of a CPU machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available / local_world_size()


def _batch(images: int, text: int, packing: bool, device: torch.device) -> dict[str, Any]:
    """One sample of blank images with two crops each, and text."""
    image_tokens = num_image_tokens(CROP_SIZE, 2 * CROP_SIZE)
    ids = [-1 - image for image in range(images) for _ in range(image_tokens)] + [1] * text
    input_ids = torch.tensor([ids], device=device)
    labels = torch.full_like(input_ids, -100)
    labels[:, -16:] = 1
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": torch.zeros(2 * images, 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8, device=device),
        "image_sizes": torch.tensor([(CROP_SIZE, 2 * CROP_SIZE)] * images),
    }
    if packing:
        boundaries = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        return batch | {"cu_seq_lens_q": boundaries, "max_length_q": len(ids)}
    return batch | {"attention_mask": torch.ones_like(input_ids)}


def _seconds_forward(model: nn.Module, batch: dict[str, Any], device: torch.device) -> float:
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        model(**batch, skip_logits=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begin
