"""Time and memory of one training micro-batch: forward and backward pass, without data loading, optimizer and Trainer.

    python -m benchmarks.micro_batch                                             # the real configuration on one GPU
    python -m benchmarks.micro_batch --methods lora --layers plain fused --recompute selective elementwise none
    python -m benchmarks.micro_batch --config tiny --samples 1 --num_crops 1     # anywhere

Weights are random, and images are pages in DocVQA's shapes. A combination that does not fit into the GPU's memory is reported
as such. ``--layers plain`` runs the layers of transformers and PEFT instead of the fused ones.
"""

import argparse
from pathlib import Path

from common.arguments import training_parser
from common.runtime.parser import Parser
from common.runtime.process import say

from . import METHOD_FLAGS, RESULTS

METHODS = ("lora", "full", "frozen")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--samples", nargs="+", type=int, default=[4], help="samples per micro-batch (default: 4)")
    parser.add_argument("--layers", nargs="+", choices=("fused", "plain"), default=["fused"], help="default: fused")
    modes = ("none", "elementwise", "vision", "selective", "full")
    parser.add_argument("--recompute", nargs="+", choices=modes, default=["elementwise"], help="default: elementwise")
    parser.add_argument("--torch_compile", action="store_true", help="compile the layers")
    parser.add_argument("--config", choices=("real", "tiny"), default="real", help="default: real, 4.1 B parameters")
    parser.add_argument("--num_crops", type=int, default=16, help="maximum number of crops per image (default: 16)")
    parser.add_argument("--repetitions", type=int, default=5, help="measured micro-batches (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "micro_batch.json", help="default: benchmarks/results/micro_batch.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    say("Loading PyTorch and transformers")

import gc
import itertools
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.model.loading import base_model, compile_layers, freeze, set_gradient_checkpointing
from common.model.lora import add_lora
from common.phi3v.flops import TrainingFlops, peak_flops
from common.phi3v.layers import use_plain_layers
from common.phi3v.parts import PARTS

from .measure import write_result
from .pages import draw_pages
from .train import TOKENIZER, draw_rows, random_config


def build_model(method, config, device, dtype=torch.bfloat16, layers="fused"):
    """A model with random weights, of which those of the method train; adapters are fp32."""
    words = METHOD_FLAGS[method] + (["--no-fused_layers"] if layers == "plain" else [])
    flags = training_parser(__doc__, task="benchmark", metric="none").parse_args(words)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="varlen")
    if layers == "plain":
        use_plain_layers(model)
    freeze(model, ("decoder",) if method == "frozen" else PARTS)
    if method == "lora":
        model = add_lora(model, flags, None).to(device)
    return model.train()


def make_batch(samples, num_crops, pages, device):
    """A packed micro-batch on the device, as the Trainer passes it on."""
    processor = AutoProcessor.from_pretrained(TOKENIZER, num_crops=num_crops)
    rows = draw_rows(pages, samples, np.random.default_rng(0))
    batch = Collator(processor, packing=True)([encode_conversation(row, processor) for row in rows])
    return {
        name: value.to(device) if torch.is_tensor(value) and name != "image_sizes" else value for name, value in batch.items()
    }


def measure(model, batch, method, repetitions, device):
    """Seconds, memory and model FLOPs of a micro-batch; ``issue_seconds`` is when the CPU has launched all of it."""
    on_gpu = device.type == "cuda"

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    def step():
        # LoRA trains under autocast; full training as with DeepSpeed, in bf16 weights.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=method == "lora"):
            loss = model(**batch).loss
        loss.backward()

    for _ in range(2):
        step()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(repetitions):
        step()
    issued = (time.perf_counter() - begin) / repetitions
    wait()
    seconds = (time.perf_counter() - begin) / repetitions
    flops = TrainingFlops(base_model(model))
    peak = peak_flops(device)
    return {
        "seconds": seconds,
        "issue_seconds": issued,
        "images_per_second": len(batch["image_sizes"]) / seconds,
        "tokens": flops.sizes(batch).tokens,
        "tflops": flops(batch) / seconds / 1e12,
        "mfu": flops(batch) / seconds / peak if peak else None,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def describe(row):
    """One line for people."""
    name = f"{row['method']}, {row['samples']} samples, {row['layers']} layers, recompute {row['recompute']}"
    if "error" in row:
        return f"{name}: failed: {row['error']}"
    mfu = f", {100 * row['mfu']:.1f} % MFU, {row['peak_memory_gb']:.1f} GB" if row["mfu"] else ""
    time_taken = f"{1e3 * row['seconds']:.0f} ms ({1e3 * row['issue_seconds']:.0f} ms to launch)"
    return f"{name}: {time_taken}, {row['tflops']:.3g} TFLOP/s{mfu}"


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pages = draw_pages(Path(folder), max(args.samples))
        for method, layers in itertools.product(args.methods, args.layers):
            model = build_model(method, random_config(args.config), device, layers=layers)
            if args.torch_compile:
                compile_layers(model)
            for samples, recompute in itertools.product(args.samples, args.recompute):
                set_gradient_checkpointing(model, recompute)
                row = {"method": method, "samples": samples, "layers": layers, "recompute": recompute}
                try:
                    batch = make_batch(samples, args.num_crops, pages, device)
                    rows.append(row | measure(model, batch, method, args.repetitions, device))
                except torch.OutOfMemoryError as error:
                    rows.append(row | {"error": str(error).splitlines()[0]})
                print(describe(rows[-1]), flush=True)
                model.zero_grad(set_to_none=True)
                gc.collect()
            del model
            gc.collect()
    write_result(args.out, {"benchmark": "micro_batch", "config": args.config, "compiled": args.torch_compile, "rows": rows})


if __name__ == "__main__":
    main(args)
