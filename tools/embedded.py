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

from assets.draw_samples import draw_samples

from .runs import METHOD_FLAGS, TASKS, RunFailed, read_results, run_on_cpu, torchrun_command

MODEL = "assets/tiny_phi3v"
PROCESSES = 2

# Flags of each task, which override those of all tasks. A dict gives the value by method; other methods omit the flag.
ALL_TASKS = {"num_crops": 1, "batch_size": 8, "batch_size_per_gpu": 4, "warmup_steps": 10, "logging_steps": 10}
ALL_TASKS |= {"max_new_tokens": 16}
SETTINGS = {
    "docvqa": {"num_train_epochs": 1, "learning_rate": {"full": 3e-4, "frozen": 3e-4, "lora": 5e-4, "qlora": 5e-4}},
    "hateful_memes": {"num_train_epochs": 1, "learning_rate": 5e-4},
    "nlvr2": {"num_train_epochs": 1, "learning_rate": {"full": 3e-4, "frozen": 3e-4, "lora": 7e-4, "qlora": 7e-4}}
    | {f"{part}_learning_rate": {"full": 3e-5, "lora": 3e-5, "qlora": 3e-5} for part in ("vision", "projector")}
    | {"warmup_steps": 15},
    "ucf101": {"num_train_epochs": 2, "learning_rate": {"full": 4e-4, "frozen": 4e-4, "lora": 7e-4, "qlora": 7e-4}}
    | {f"{part}_learning_rate": {"full": 4e-5, "lora": 4e-5, "qlora": 4e-5} for part in ("vision", "projector")}
    | {"batch_size": 4, "batch_size_per_gpu": 2},
}
NUM_FRAMES = 4  # per clip: half of the default, to finish in minutes
SMOKE_SETTINGS = {"batch_size": 4, "batch_size_per_gpu": 2, "num_train_epochs": 1, "warmup_steps": 1, "max_new_tokens": 4}
SMOKE_SETTINGS |= {"logging_steps": 1}
# Training and evaluation samples, in the units of draw_samples: documents, memes, sentences, and clips per class.
SMOKE_COUNTS = {"docvqa": (4, 2), "hateful_memes": (12, 8), "nlvr2": (3, 2), "ucf101": (1, 1)}


def prepare_data(task: str, output_dir: Path, smoke: bool = False) -> None:
    """Generate a task's sample data in a folder next to ``output_dir``; for UCF-101, also convert the clips."""
    drawn = drawn_dir(output_dir)
    shutil.rmtree(drawn, ignore_errors=True)
    draw_samples(task, drawn, *(SMOKE_COUNTS[task] if smoke else ()))
    if task == "ucf101":
        paths = [
            "--source",
            str(drawn / "UCF101_subset"),
            "--out_dir",
            str(drawn / "converted"),
            "--num_frames",
            str(NUM_FRAMES),
        ]
        run_on_cpu(["python", "convert_ucf101.py", *paths, "--no-tqdm"])


def drawn_dir(output_dir: Path) -> Path:
    """Return the folder of the sample data for the run in ``output_dir``."""
    return output_dir.with_name(f"{output_dir.name}-data")


def embedded_command(task: str, method: str, output_dir: Path, flags: list[str], smoke: bool = False) -> list[str]:
    """Return the command that runs a task's script with the tiny checkpoint on the data of :func:`prepare_data`.

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
    data_dir = drawn_dir(output_dir) / ("converted" if task == "ucf101" else "")
    paths = ["--model_name_or_path", MODEL, "--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    settings = []
    for name, value in (ALL_TASKS | SETTINGS[task] | (SMOKE_SETTINGS if smoke else {})).items():
        value = value.get(method) if isinstance(value, dict) else value
        settings += [f"--{name}", str(value)] if value is not None else []
    return torchrun_command(task, [*paths, *flags, *settings], PROCESSES)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--smoke`` and ``--no-tqdm`` (as ``run_flags``), shared by the tools that run on sample data."""
    parser.add_argument("--smoke", action="store_true", help="smoke test with a few samples and steps")
    parser.add_argument(
        "--no-tqdm",
        dest="run_flags",
        action="store_const",
        const=["--no-tqdm"],
        default=[],
        help="print plain lines instead of progress bars",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, help="task to finetune on")
    parser.add_argument("--method", choices=METHOD_FLAGS, default="full", help="finetuning method (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="output directory (default: output/demo-TASK)")
    add_run_flags(parser)
    args = parser.parse_args()
    output_dir = args.output_dir or Path("output") / f"demo-{args.task}"
    flags = METHOD_FLAGS[args.method]
    try:
        prepare_data(args.task, output_dir, args.smoke)
        usage = run_on_cpu(embedded_command(args.task, args.method, output_dir, [*flags, *args.run_flags], args.smoke))
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
