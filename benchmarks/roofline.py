"""Predict time and memory of training on a GPU, without one.

    python -m benchmarks.roofline --gpu H100 --method lora --gradient_checkpointing none --samples_at_once 4
    python -m benchmarks.roofline --method full --table    # the best settings on every GPU, into the result file

Forward and backward pass of a packed micro-batch of pages in DocVQA's shapes run on tensors without data (PyTorch's fake
tensors), with the code of training, while `benchmarks.meter` counts kernels and bytes. Between two points where the CPU waits
for the GPU, the time is that of the kernels, or that of launching them if the CPU takes longer. Memory is the peak over the
lifetimes of all tensors. Communication and data loading are not included.
"""

import argparse

from common.runtime.parser import Parser
from common.runtime.process import say

from . import METHOD_FLAGS, RESULTS

# As in .meter and common.training.memory, which import PyTorch.
GPU_NAMES = ("T4", "RTX 4090", "V100", "L40S", "A100", "H100", "H200")
MODES = ("none", "elementwise", "vision", "selective", "full")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--gpu", choices=GPU_NAMES, default="H100", help="default: H100")
    parser.add_argument("--gpus", type=int, default=1, help="full training on several GPUs uses ZeRO-2 (default: 1)")
    parser.add_argument("--method", choices=METHOD_FLAGS, default="lora", help="adapters have rank 32 (default: lora)")
    parser.add_argument("--gradient_checkpointing", choices=MODES, default="none", help="default: none")
    parser.add_argument(
        "--layers", choices=("fused", "plain"), default="fused", help="plain: --no-fused_layers (default: fused)"
    )
    parser.add_argument("--samples_at_once", type=int, default=4, help="pages in a micro-batch (default: 4)")
    parser.add_argument("--num_crops", type=int, default=16, help="maximum number of crops per page (default: 16)")
    parser.add_argument("--launch_us", type=float, default=110, help="of a kernel, by the CPU (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="the best settings of --method on every GPU, into the result file")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    say("Loading PyTorch and transformers")

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.arguments import Setup
from common.model import lora
from common.model.loading import base_model, set_gradient_checkpointing
from common.phi3v import Phi3VConfig, attention, fused, layers
from common.phi3v.flops import TrainingFlops
from common.phi3v.image_processing import CROP_SIZE, crop_grid_size, num_image_tokens
from common.phi3v.parts import unquantized_modules
from common.training import memory
from common.training.deepspeed import DIRECTORY

from .measure import write_result
from .meter import GPUS, Gpu, Kernel, Meter
from .micro_batch import build_model
from .pages import SHAPES
from .train import random_config

RESULT = RESULTS / "roofline.json"
BATCH_SIZE = 64  # samples of a step
SAMPLES = (1, 2, 3, 4, 8)  # at once, from which --table chooses
TEXT_TOKENS, ANSWER_TOKENS = 30, 8  # of a sample, as published for DocVQA
USABLE = 0.95  # of a GPU's memory; the rest is for CUDA itself and for fragmentation


class QuantizedLinear(nn.Module):
    """A linear layer with a 4-bit weight, which is dequantized before each product, like that of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        # Half a byte per weight, and four bytes per 64 weights for their scale.
        size = round(linear.weight.numel() * (1 / 2 + 4 / 64))
        self.weight = nn.Parameter(linear.weight.new_empty(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The plain product with the dequantized weight."""
        return _QuantizedProduct.apply(states, self.weight, self.bias, self.out_features)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_features: int
    ) -> torch.Tensor:
        ctx.weight, ctx.shape = weight, (out_features, states.shape[-1])
        return nn.functional.linear(states, dequantize(weight, *ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        return gradient @ dequantize(ctx.weight, *ctx.shape), None, None, None


def dequantize(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A bf16 weight from a 4-bit one."""
    return weight.new_empty(rows, columns, dtype=torch.bfloat16)


@contextmanager
def as_on_a_gpu(meter: Meter) -> Iterator[None]:
    """Take the ways that the code takes on a GPU: flash attention, compiled functions, norms in the weights' dtype."""
    plain_weight = lora._weight

    def weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(base, QuantizedLinear):
            return dequantize(base.weight, base.out_features, base.in_features)
        return plain_weight(base, dtype)

    own = globals()
    with ExitStack() as stack:
        for name, function in vars(fused).copy().items():
            if hasattr(function, "__wrapped__") and name != "can_compile":
                whole = meter.whole(function.__wrapped__, "norms, activations, rotary")
                stack.enter_context(patch.object(fused, name, whole))
        stack.enter_context(patch.object(attention, "has_varlen_kernel", lambda device: True))
        stack.enter_context(patch.object(layers, "_leave_dtype", lambda norm, states: states.dtype == norm.weight.dtype))
        stack.enter_context(patch.object(lora, "_product", meter.whole(lora._product, "matrix products", product=True)))
        stack.enter_context(patch.object(lora, "_weight", weight))
        stack.enter_context(patch.dict(own, dequantize=meter.whole(dequantize, "dequantization")))
        yield


def fake_model(method: str, config: Phi3VConfig, dtype: torch.dtype, mode: FakeTensorMode, layers: str) -> nn.Module:
    """The model of a method on fake CPU tensors; a CPU-only PyTorch has no backward pass on fake CUDA tensors."""
    model = build_model("lora" if method == "qlora" else method, config, torch.device("meta"), dtype, layers)
    if method == "qlora":
        kept = tuple(unquantized_modules(config, vision=True))
        for name, module in base_model(model).named_modules():
            linear = getattr(module, "base_layer", None)
            if isinstance(linear, nn.Linear) and not name.startswith(kept):
                module.base_layer = QuantizedLinear(linear)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    tensors[name] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return model


def fake_batch(samples: int, num_crops: int, mode: FakeTensorMode) -> dict[str, Any]:
    """A packed micro-batch of pages in DocVQA's shapes, with pixels on fake tensors and everything else real."""
    sizes = [crop_grid_size(*SHAPES[number % len(SHAPES)], num_crops) for number in range(samples)]
    ids, labels = [], []
    for number, size in enumerate(sizes):
        ids += [-1 - number] * num_image_tokens(*size) + [1] * TEXT_TOKENS
        labels.append(torch.full((num_image_tokens(*size) + TEXT_TOKENS,), -100))
        labels[-1][-ANSWER_TOKENS:] = 1
    lengths = [len(sample) for sample in labels]
    crops = sum(height * width // CROP_SIZE**2 for height, width in sizes)
    with mode:
        pixels = torch.empty(crops, 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.cat(labels)[None],
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
        "cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_length_q": max(lengths),
    }


class MicroBatch(NamedTuple):
    """What a micro-batch runs, and the bytes that training holds on one GPU.

    Attributes
    ----------
    phases : list of Counter of Kernel
        Launches of each kind: of the vision tower, of the decoder's forward pass, and of the backward pass.
    samples, tokens : int
    flops : float
        Model FLOPs, as for the MFU.
    weights, states, activations, step : float
        Bytes: of all weights; of gradients, optimizer states and master weights; of everything else at the peak of the
        micro-batch; and temporary ones of the optimizer's step.
    optimizer : float
        Bytes that the optimizer's step reads and writes.
    """

    phases: list[Counter[Kernel]]
    samples: int
    tokens: int
    flops: float
    weights: float
    states: float
    activations: float
    step: float
    optimizer: float

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return self.weights + self.states + max(self.activations, self.step)

    def seconds(self, gpu: Gpu) -> float:
        """Time of the micro-batch: in each phase, of its kernels or of launching them."""
        return sum(
            max(sum(count * kernel.seconds(gpu) for kernel, count in phase.items()), phase.total() * gpu.to_launch)
            for phase in self.phases
        )

    def images_per_second(self, gpu: Gpu, gpus: int = 1) -> float:
        """Pages per second on all GPUs, over a step with its optimizer."""
        micro_batches = BATCH_SIZE / gpus / self.samples
        return BATCH_SIZE / (micro_batches * self.seconds(gpu) + self.optimizer / gpu.bandwidth / 1e12)

    def mfu(self, gpu: Gpu) -> float:
        """Model FLOPs utilization of the micro-batch."""
        return self.flops / self.seconds(gpu) / gpu.peak / 1e12

    def fits(self, gpu: Gpu) -> bool:
        """Whether a GPU's memory is enough."""
        return self.peak <= USABLE * gpu.gigabytes * 1e9


class Predictor:
    """Predicts micro-batches of one method, for a number of GPUs.

    Full training, also with a frozen vision tower, runs with DeepSpeed ZeRO-2, on one GPU with 8-bit optimizer states; LoRA and
    QLoRA of rank 32 run with DDP. ``layers`` are ``"fused"``, or ``"plain"`` as with ``--no-fused_layers``.
    """

    def __init__(self, method: str, gpus: int = 1, config: Phi3VConfig | None = None, layers: str = "fused") -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        adapters = method in ("lora", "qlora")
        deepspeed = None if adapters else str(DIRECTORY / "zero2.json")
        self.autocast = not deepspeed  # DeepSpeed has bf16 weights, and runs without autocast
        self.model = fake_model(method, config or random_config("real"), torch.bfloat16, self.mode, layers)
        setup = Setup(torch.device("cpu"), "bf16", "varlen", "", True, deepspeed, 2 if deepspeed else None)
        optim = "adamw_torch_fused" if adapters or gpus > 1 else "adamw_bnb_8bit"
        with patch.object(memory, "world_size", lambda: gpus):
            self.states, self.step = memory.state_bytes(self.model, optim, setup), memory.step_bytes(self.model, setup)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        # Clipping reads gradients twice and writes them; the update reads everything, and writes weights and moments.
        self.optimizer = (12 + (16 if "8bit" in optim else 28)) * trained / (gpus if deepspeed else 1)

    def predict(self, checkpointing: str, samples: int, num_crops: int = 16) -> MicroBatch:
        """Run a micro-batch that recomputes as ``--gradient_checkpointing`` says, after others of the same step."""
        set_gradient_checkpointing(self.model, checkpointing)
        batch = fake_batch(samples, num_crops, self.mode)
        parameters = list(self.model.parameters())
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        meter = Meter([*parameters, *self.model.buffers(), *(each.grad for each in parameters if each.grad is not None)])
        with as_on_a_gpu(meter), meter:
            with torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext():
                loss = self.model(**batch).loss
            loss.backward()
        flops, weights = TrainingFlops(base_model(self.model)), sum(tensor.nbytes for tensor in parameters)
        sizes = flops.sizes(batch)
        counted = (meter.phases, samples, sizes.tokens, sum(flops.count(sizes)))
        return MicroBatch(*counted, weights, self.states, meter.peak, self.step, self.optimizer)


def best_rows(method: str, gpus: int) -> list[dict[str, Any]]:
    """The fastest recomputation and number of samples that fit, for every GPU."""
    predictor, found = Predictor(method, gpus), []
    for mode in memory.MODES:
        for samples in SAMPLES:
            found.append((mode, predictor.predict(mode, samples)))
            print(f"{method}, {mode}, {samples}: {found[-1][1].peak / 1e9:.1f} GB", flush=True)
            if not found[-1][1].fits(GPUS["H200"]):
                break
    rows = []
    for name, gpu in GPUS.items():
        rows.append({"method": method, "gpus": gpus, "gpu": name})
        fitting = [(each.images_per_second(gpu, gpus), mode, each) for mode, each in found if each.fits(gpu)]
        if fitting:
            speed, mode, best = max(fitting, key=lambda each: each[0])
            rows[-1] |= {"checkpointing": mode, "samples_at_once": best.samples, "peak_gb": round(best.peak / 1e9, 1)}
            rows[-1] |= {
                "ms": round(1e3 * best.seconds(gpu)),
                "mfu": round(best.mfu(gpu), 3),
                "images_per_second": round(speed, 2),
            }
    return rows


def report(found: MicroBatch, gpu: Gpu, gpus: int) -> str:
    """Describe a prediction."""
    kernels = sum(found.phases, Counter())
    groups = sorted({kernel.group for kernel in kernels})
    lines = [f"predicted, not measured: {found.samples} pages, {found.tokens} tokens"]
    for name, wanted in [*((group, [group]) for group in groups), ("all kernels", groups)]:
        mine = [(kernel, count) for kernel, count in kernels.items() if kernel.group in wanted]
        busy = 1e3 * sum(count * kernel.seconds(gpu) for kernel, count in mine)
        moved = sum(count * kernel.bytes for kernel, count in mine) / 1e9
        lines += [f"  {name:27} {busy:7.1f} ms {sum(count for _, count in mine):6} launches {moved:7.1f} GB moved"]
    lines += [f"  {'launching them, on the CPU':27} {1e3 * kernels.total() * gpu.to_launch:7.1f} ms"]
    speed = found.images_per_second(gpu, gpus)
    lines += [f"micro-batch: {1e3 * found.seconds(gpu):.0f} ms, {100 * found.mfu(gpu):.1f} % MFU"]
    lines += [f"step of {BATCH_SIZE}: {BATCH_SIZE / speed:.1f} s, {speed:.2f} images/s"]
    parts = {"weights": found.weights, "gradients and states": found.states, "activations": found.activations}
    lines += [
        f"peak: {found.peak / 1e9:.1f} GB (" + ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items()) + ")"
    ]
    lines += [f"{'fits' if found.fits(gpu) else 'does not fit'} into {USABLE:.0%} of {gpu.gigabytes:.0f} GB"]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    if args.table:
        rows = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
        mine = (args.method, args.gpus)
        rows = [row for row in rows if (row["method"], row["gpus"]) != mine] + best_rows(*mine)
        write_result(RESULT, {"benchmark": "roofline", "rows": rows})
        return
    predictor = Predictor(args.method, args.gpus, layers=args.layers)
    found = predictor.predict(args.gradient_checkpointing, args.samples_at_once, args.num_crops)
    print(report(found, GPUS[args.gpu]._replace(to_launch=args.launch_us / 1e6), args.gpus))


if __name__ == "__main__":
    main(args)
