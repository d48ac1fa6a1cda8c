"""Speed of training, by method, attention, packing, recomputation and samples at once, on pages in DocVQA's shapes.

    python -m benchmarks.train --random_weights --bf16           # four methods, one and four samples at once, on one GPU
    python -m benchmarks.train --random_weights --bf16 --methods lora qlora --attention varlen sdpa --packing on off \\
        --checkpointing none selective full --samples_at_once 1 4
    python -m benchmarks.train --random_weights --config tiny --batch_size 2 --steps 2   # anywhere

It runs the recipes' own path: pages are decoded by the workers, planned and collated, the model is loaded and trained as by
the task scripts. Weights are random unless --model_name_or_path is given; speed doesn't depend on them. Every combination
runs in a process of its own, and one that fails (for memory, say) is reported as such.
"""

import argparse
from pathlib import Path

from common.arguments import training_parser
from common.runtime.parser import Parser, check_inputs
from common.runtime.process import say

from . import METHOD_FLAGS, RESULTS

KERNEL_FLAGS = {
    "plain": [],
    "liger": ["--use_liger_kernel"],
    "compile": ["--torch_compile"],
    "both": ["--use_liger_kernel", "--torch_compile"],
}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to measure: every combination")
    group.add_argument("--methods", nargs="+", choices=METHOD_FLAGS, default=list(METHOD_FLAGS), help="default: all")
    group.add_argument("--attention", nargs="+", default=["auto"], help="by name, as the scripts take it (default: auto)")
    group.add_argument("--packing", nargs="+", choices=("on", "off"), default=["on"], help="default: on")
    checkpointing = ("auto", "full", "selective", "vision", "elementwise", "none")
    recomputation = "default: auto, and full for LoRA and QLoRA, one sample at once"
    group.add_argument("--checkpointing", nargs="+", choices=checkpointing, help=recomputation)
    group.add_argument("--samples_at_once", nargs="+", type=int, default=[1, 4], help="of a micro-batch (default: 1 and 4)")
    kernels = "Liger's, compiled layers, or both (default: plain)"
    group.add_argument("--kernels", nargs="+", choices=KERNEL_FLAGS, default=["plain"], help=kernels)
    group = parser.add_argument_group("model and data")
    group.add_argument("--model_name_or_path", help="checkpoint; or --random_weights")
    group.add_argument("--random_weights", action="store_true", help="of --config, drawn on the device")
    group.add_argument("--config", choices=("real", "tiny"), default="real", help="default: real, 4.1 G parameters")
    group.add_argument("--bf16", action="store_true", help="as the scripts take it")
    group.add_argument("--image_dir", type=Path, help="folder of pages (default: drawn ones)")
    group.add_argument("--num_images", type=int, default=48, help="pages to draw (default: 48)")
    group.add_argument("--num_crops", type=int, default=16, help="most crops of a page (default: 16)")
    group = parser.add_argument_group("how")
    group.add_argument("--batch_size", type=int, default=64, help="samples a step (default: 64, as published)")
    group.add_argument("--warmup", type=int, default=1, help="steps before measuring (default: 1)")
    group.add_argument("--steps", type=int, default=3, help="measured steps (default: 3)")
    group.add_argument("--optim", help="default: 8-bit AdamW on a GPU if decoder weights train, so that one GPU holds them")
    group.add_argument("--dataloader_num_workers", type=int, default=8, help="default: 8, at most the cores")
    group.add_argument("--seed", type=int, default=0, help="draws weights and questions")
    group.add_argument("--out", type=Path, default=RESULTS / "train.json", help="where the result goes (default: %(default)s)")
    args = parser.parse_args()
    if (args.model_name_or_path is None) != args.random_weights:
        parser.error("give either --model_name_or_path or --random_weights")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, TrainerCallback

from assets.samples.docvqa import FIELDS, draw_value
from common.data.rows import Rows
from common.model.checkpoint import load_processor
from common.model.loading import base_model, load_model
from common.phi3v import Phi3VConfig
from common.phi3v.flops import TrainingFlops, peak_flops
from common.runtime.files import read_json
from common.training.build import build_trainer
from common.training.start import start

from .measure import write_result
from .pages import draw_pages, find_pages

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny_phi3v"
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"image_size": 336, "patch_size": 14},
}
DIMENSIONS = ("methods", "attention", "packing", "checkpointing", "samples_at_once", "kernels")


def random_config(name):
    """The published configuration (``"real"``), or a tiny one."""
    factors = [1.0] * (16 if name == "tiny" else 48)
    rope = {"type": "su", "short_factor": factors, "long_factor": factors}
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "pad_token_id": 3}
    return Phi3VConfig(**(TINY if name == "tiny" else {}), **sizes, rope_scaling=rope)


def write_random_checkpoint(directory, name):
    """Write a checkpoint of the published configuration (or a tiny one) with random weights, drawn on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(random_config(name), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(TOKENIZER).save_pretrained(directory)


def draw_rows(pages, count, rng):
    """Questions and answers about pages, as conversations; so short that the tiny tokenizer makes about 30 tokens of them."""
    rows = []
    for number in range(count):
        field = FIELDS[int(rng.integers(len(FIELDS)))]
        user = f"The {field.label.lower()}?"
        turn = {"images": [str(pages[number % len(pages)])], "user": user, "assistant": draw_value(field.kind, rng, False)}
        rows.append({"conversations": [turn]})
    return rows


class Watch(TrainerCallback):
    """Times the phases of a run's steps after the first ones, on the device's own clock, and counts what they did."""

    def __init__(self, trainer, warmup, steps):
        self.first, self.last = warmup, warmup + steps
        self.flops = TrainingFlops(base_model(trainer.model))
        self.on_gpu = torch.cuda.is_available()
        trainer.training_step = self._timed_step(trainer.training_step)
        trainer.get_batch_samples = self._timed_data(trainer.get_batch_samples)
        for phase, module in (
            ("tower", base_model(trainer.model).model.vision_embed_tokens),
            ("forward", trainer.model),
        ):
            module.register_forward_pre_hook(lambda *_, phase=phase: self.begin(phase))
            module.register_forward_hook(lambda *_, phase=phase: self.end(phase))
        self._reset()

    def _reset(self):
        self.begun, self.spans = {}, defaultdict(list)
        self.counts = defaultdict(float)
        self.data_wait = 0.0
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, phase):
        self.begun[phase] = self._now()

    def end(self, phase):
        self.spans[phase].append((self.begun.pop(phase), self._now()))

    def _timed_step(self, training_step):
        def timed(model, inputs, *args, **kwargs):
            self.counts["images"] += len(inputs["image_sizes"])
            self.counts["samples"] += len(inputs["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in inputs else len(inputs["labels"])
            self.counts["flops"] += self.flops(inputs)
            self.counts["tokens"] += self.flops.sizes(inputs).tokens
            self.begin("step")
            loss = training_step(model, inputs, *args, **kwargs)
            self.end("step")
            return loss

        return timed

    def _timed_data(self, get_batch_samples):
        def timed(*args, **kwargs):
            begun = time.perf_counter()
            batches = get_batch_samples(*args, **kwargs)
            self.data_wait += time.perf_counter() - begun
            return batches

        return timed

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.begin("optimizer")

    def on_optimizer_step(self, *args, **kwargs):
        self.end("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self._reset()
        elif state.global_step == self.last:
            self.result = self._result()

    def _result(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - self.start
        phases = {phase: sum(self._length(*span) for span in spans) for phase, spans in self.spans.items()}
        steps = self.last - self.first
        seconds = {
            "data": self.data_wait,
            "tower": phases["tower"],
            "decoder forward": phases["forward"] - phases["tower"],
            "backward": phases["step"] - phases["forward"],
            "optimizer": phases["optimizer"],
        }
        peak = peak_flops(torch.device("cuda" if self.on_gpu else "cpu"))
        return {
            "images_per_second": self.counts["images"] / wall,
            "tokens_per_second": self.counts["tokens"] / wall,
            "tokens_a_sample": self.counts["tokens"] / self.counts["samples"],
            "tflops": self.counts["flops"] / wall / 1e12,
            "mfu": self.counts["flops"] / wall / peak if peak else None,
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None,
            "data_wait_share": self.data_wait / wall,
            "seconds_a_step": {phase: value / steps for phase, value in (seconds | {"all": wall}).items()},
        }

    def _length(self, begin, end):
        return begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin


def combinations(args):
    """All that is to be measured; by default also what the targets of memory are for, LoRA and QLoRA recomputing everything."""
    asked = vars(args) | {"checkpointing": args.checkpointing or ["auto"]}
    adapters = [method for method in args.methods if method in ("lora", "qlora")]
    memory = asked | {"methods": adapters, "checkpointing": ["full"], "samples_at_once": [1]}
    wanted = [asked] if args.checkpointing else [asked, memory]
    return [values for each in wanted for values in itertools.product(*(each[name] for name in DIMENSIONS))]


def measure(args, values, directory):
    """Train one combination and return what was measured."""
    method, attention, packing, checkpointing, samples_at_once, kernels = values
    eight_bit = torch.cuda.is_available() and method in ("full", "frozen")
    optim = args.optim or ("adamw_bnb_8bit" if eight_bit else "adamw_torch_fused")
    command = [
        *METHOD_FLAGS[method],
        *KERNEL_FLAGS[kernels],
        *("--packing" if packing == "on" else "--no-packing", "--gradient_checkpointing", checkpointing),
        *("--model_name_or_path", args.model_name_or_path, "--output_dir", directory / "output"),
        *("--batch_size", args.batch_size, "--batch_size_per_gpu", samples_at_once, "--num_crops", args.num_crops),
        *("--max_steps", args.warmup + args.steps, "--logging_steps", args.warmup + args.steps, "--learning_rate", "1e-6"),
        *("--dataloader_num_workers", args.dataloader_num_workers, "--optim", optim, "--no-tqdm"),
        *(["--bf16"] if args.bf16 else []),
        *([] if attention == "auto" else ["--attn_implementation", attention]),
    ]
    flags = training_parser(__doc__, task="benchmark", metric="none").parse_args([str(part) for part in command])
    setup = start(flags)
    processor = load_processor(flags.model_name_or_path, setup.revision, flags.num_crops)
    pages = find_pages(args.image_dir) if args.image_dir else draw_pages(directory / "pages", args.num_images)
    drawn = draw_rows(pages, args.batch_size * (args.warmup + args.steps), np.random.default_rng(args.seed))
    rows = Rows(drawn, place="drawn row {}".format)
    model = load_model(flags, setup, processor)
    trainer = build_trainer(flags, setup, model, processor, rows, rows, lambda row, _: row, evaluate=None, source="drawn pages")
    watch = Watch(trainer, args.warmup, args.steps)
    trainer.add_callback(watch)
    trainer.train()
    return {
        "method": method,
        "attention": setup.attention,
        "packing": packing,
        "checkpointing": trainer.recomputation,
        "samples_at_once": samples_at_once,
        "kernels": kernels,
        "optim": optim,
        **watch.result,
    }


def find_error(output):
    """The exception that ended a program, from what it printed; after it there may be warnings. None if there is none."""
    errors = re.findall(
        r"^(?:\[rank\d+\]: )?(?:[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b|error:).*", output, re.MULTILINE
    )
    return errors[-1] if errors else None


def measure_apart(args, values, checkpoint, out):
    """Measure one combination in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train"]
    for name, value in (vars(args) | dict(zip(DIMENSIONS, values, strict=True))).items():
        value = {"out": out, "model_name_or_path": checkpoint}.get(name, value)
        if name in ("random_weights", "config") or value is None or value is False:
            continue
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        reason = find_error(run.stdout) or f"exit code {run.returncode}"
        return dict(zip(("method", *DIMENSIONS[1:]), values, strict=True)) | {"error": reason[:300]}
    return read_json(out, "measure it again")["rows"][0]


def main(args: argparse.Namespace) -> None:
    wanted = combinations(args)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.manual_seed(args.seed)
        checkpoint = args.model_name_or_path
        if args.random_weights:
            checkpoint = directory / "checkpoint"
            write_random_checkpoint(checkpoint, args.config)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(wanted) == 1 and not args.random_weights:
            rows = [measure(args, wanted[0], directory)]
        else:
            rows = []
            for values in wanted:
                rows.append(measure_apart(args, values, checkpoint, directory / "row.json"))
                print(describe(rows[-1]), flush=True)
    content = {
        "benchmark": "train",
        "config": args.config if args.random_weights else str(args.model_name_or_path),
        "precision": "bf16" if args.bf16 else "fp16" if torch.cuda.is_available() else "fp32",
        "num_crops": args.num_crops,
        "batch_size": args.batch_size,
        "rows": rows,
    }
    write_result(args.out, content)
    print(f"written to {args.out}")


def describe(row):
    """One line for people."""
    name = f"{row['method']}, {row['attention']}, packing {row['packing']}, recomputation {row['checkpointing']}"
    name += f", {row['samples_at_once']} at once, {row['kernels']} kernels"
    if "error" in row:
        return f"{name}: failed: {row['error']}"
    mfu = f"{100 * row['mfu']:.1f} % MFU" if row["mfu"] is not None else "MFU unknown"
    memory = f"{row['peak_memory_gb']:.1f} GB" if row["peak_memory_gb"] is not None else "memory not measured"
    return (
        f"{name}: {row['images_per_second']:.2f} images/s, {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['tflops']:.3g} TFLOP/s, {mfu}, {memory}, {100 * row['data_wait_share']:.1f} % waiting for data"
    )


if __name__ == "__main__":
    main(args)
