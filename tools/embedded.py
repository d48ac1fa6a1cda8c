"""Finetune the tiny checkpoint on generated sample data, from the data files to the report, on a CPU in a few minutes.

    python -m tools.embedded docvqa
    python -m tools.embedded nlvr2 --method lora
    python -m tools.embedded ucf101 --smoke                # a few samples and steps, as a smoke test

Uses two processes, no GPU and no downloads. The script of the task is the same one that finetunes the real model.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from assets.draw_samples import draw_samples
from common.runtime.parser import Parser
from common.runtime.process import say

from .runs import METHOD_FLAGS, TASKS, RunFailed, Usage, read_results, run_command, torchrun_command

MODEL = "assets/tiny_phi3v"
PROCESSES = 2

# Flags of each task, which override those of all tasks. A dict gives the value by method; other methods omit the flag.
ALL_TASKS = {"num_crops": 1, "batch_size": 8, "batch_size_per_gpu": 4, "num_train_epochs": 1, "warmup_steps": 10}
ALL_TASKS |= {"max_new_tokens": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "docvqa": {"learning_rate": {"full": 3e-4, "frozen": 3e-4, "lora": 5e-4, "qlora": 5e-4}},
    "hateful_memes": {"learning_rate": 5e-4},
    "nlvr2": {"learning_rate": {"full": 3e-4, "frozen": 3e-4, "lora": 7e-4, "qlora": 7e-4}, "warmup_steps": 15}
    | {f"{part}_learning_rate": {"full": 3e-5, "lora": 3e-5, "qlora": 3e-5} for part in ("vision", "projector")},
    "ucf101": {"learning_rate": {"full": 4e-4, "frozen": 4e-4, "lora": 7e-4, "qlora": 7e-4}, "num_train_epochs": 2}
    | {f"{part}_learning_rate": {"full": 4e-5, "lora": 4e-5, "qlora": 4e-5} for part in ("vision", "projector")}
    | {"batch_size": 4, "batch_size_per_gpu": 2},
}
NUM_FRAMES = 4  # per clip: half of the default, to finish in minutes
SMOKE_SETTINGS = {"batch_size": 4, "batch_size_per_gpu": 2, "num_train_epochs": 1, "warmup_steps": 1, "max_new_tokens": 4}
# Training and evaluation samples, in the units of draw_samples: documents, memes, sentences, and clips per class.
SMOKE_COUNTS = {"docvqa": (4, 2), "hateful_memes": (12, 8), "nlvr2": (3, 2), "ucf101": (1, 1)}


def run_embedded(task: str, method: str, output_dir: Path, flags: list[str], smoke: bool = False) -> Usage:
    """Generate a task's sample data in a folder next to ``output_dir``, and run :func:`embedded_command` on it."""
    drawn = output_dir.with_name(f"{output_dir.name}-data")
    say(f"Drawing the sample data in {drawn}")
    shutil.rmtree(drawn, ignore_errors=True)
    draw_samples(task, drawn, *(SMOKE_COUNTS[task] if smoke else ()))
    if task == "ucf101":
        paths = ["--source", str(drawn / "UCF101_subset"), "--out_dir", str(drawn / "converted")]
        run_command(["python", "convert_ucf101.py", *paths, "--num_frames", str(NUM_FRAMES), "--no-tqdm"])
    command = embedded_command(task, method, output_dir, flags, smoke)
    return run_command(command, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")


def embedded_command(task: str, method: str, output_dir: Path, flags: list[str], smoke: bool = False) -> list[str]:
    """Return the command that runs a task's script with the tiny checkpoint on sample data.

    Parameters
    ----------
    task, method : str
        One of ``TASKS`` and one of ``METHOD_FLAGS``.
    output_dir : Path
        Output directory of the run.
    flags : list of str
        Flags of the method, and others that SETTINGS does not set.
    smoke : bool
        Use as few steps as possible.
    """
    data_dir = output_dir.with_name(f"{output_dir.name}-data") / ("converted" if task == "ucf101" else "")
    words = ["--model_name_or_path", MODEL, "--data_dir", str(data_dir), "--output_dir", str(output_dir), *flags]
    words += ["--overwrite_output_dir"]
    for name, value in (ALL_TASKS | SETTINGS[task] | (SMOKE_SETTINGS if smoke else {})).items():
        value = value.get(method) if isinstance(value, dict) else value
        words += [f"--{name}", str(value)] if value is not None else []
    return torchrun_command(task, words, PROCESSES)


def add_run_flags(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    """Add the flags that the tools for several runs share: ``--smoke``, ``--no-tqdm`` (as ``run_flags``) and the folders."""
    parser.add_argument("--smoke", action="store_true", help="smoke test with a few samples and steps")
    what = "print plain lines instead of progress bars"
    parser.add_argument("--no-tqdm", dest="run_flags", action="store_const", const=["--no-tqdm"], default=[], help=what)
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="parent of the runs (default: %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="results folder (default: %(default)s)")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("task", choices=TASKS, help="task to finetune on")
    parser.add_argument("--method", choices=METHOD_FLAGS, default="full", help="finetuning method (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="output directory (default: output/demo-TASK)")
    parser.add_argument("--smoke", action="store_true", help="smoke test with a few samples and steps")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    args = parser.parse_args()
    output_dir = args.output_dir or Path("output") / f"demo-{args.task}"
    if not output_dir.name:
        parser.error(f"--output_dir {output_dir} must be a folder of its own, with the data beside it")
    flags = METHOD_FLAGS[args.method]
    try:
        usage = run_embedded(args.task, args.method, output_dir, flags + ["--no-tqdm"] * (not args.tqdm), args.smoke)
    except RunFailed as error:
        sys.exit(f"error: {error}")
    found = read_results(output_dir)
    metric = found["metric"]
    data = ["--data_dir", "data/ucf101"] if args.task == "ucf101" else []
    real = ["torchrun", "--nproc_per_node=8", f"finetune_hf_trainer_{args.task}.py", *data, "--bf16", *flags]
    print(
        f"\nFinetuned the tiny checkpoint {MODEL} ({found['method']}) on generated samples in {usage.seconds:.0f} seconds:\n"
        f"  {metric} {found['before'][metric]:.4f} -> {found['after'][metric]:.4f} on {found['samples']} samples\n"
        f"Results were written to {output_dir}; open {output_dir}/report.html in a browser.\n"
        f"To finetune the real model on 8 GPUs, run\n  {shlex.join(real)}"
    )
    if data:
        print("after converting the clips with\n  python convert_ucf101.py --out_dir data/ucf101")


if __name__ == "__main__":
    main()
