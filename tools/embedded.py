"""Finetune the embedded tiny checkpoint on drawn sample data: a task from its files to its report, on a CPU, in minutes.

    python -m tools.embedded docvqa
    python -m tools.embedded nlvr2 --method lora
    python -m tools.embedded ucf101 --smoke                # a dozen samples: does it run at all?

Two processes, no GPU, nothing downloaded. The task's script is the one that finetunes the real model.
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

# Flags by task, over those for all; a value by method where methods need different ones, or have none.
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
NUM_FRAMES = 4  # of a clip: half of the default, to be done in minutes
SMOKE_SETTINGS = {"batch_size": 4, "batch_size_per_gpu": 2, "num_train_epochs": 1, "warmup_steps": 1, "max_new_tokens": 4}
SMOKE_SETTINGS |= {"logging_steps": 1}
# Documents, memes, sentences and clips a class, as draw_samples counts: to train and to evaluate.
SMOKE_COUNTS = {"docvqa": (4, 2), "hateful_memes": (12, 8), "nlvr2": (3, 2), "ucf101": (1, 1)}


def prepare_data(task: str, output_dir: Path, smoke: bool = False) -> None:
    """Draw a task's sample data for the run in ``output_dir``, beside it, and convert what needs it."""
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
    """The folder that the sample data of the run in ``output_dir`` is drawn to."""
    return output_dir.with_name(f"{output_dir.name}-data")


def embedded_command(task: str, method: str, output_dir: Path, flags: list[str], smoke: bool = False) -> list[str]:
    """The command that runs a task's script on the tiny checkpoint and on what :func:`prepare_data` drew.

    Parameters
    ----------
    task, method : str
        Of ``TASKS`` and ``METHOD_FLAGS``.
    output_dir : Path
        Where results go.
    flags : list of str
        The method's flags, and any other that SETTINGS doesn't set.
    smoke : bool
        As few steps as there can be.
    """
    data_dir = drawn_dir(output_dir) / ("converted" if task == "ucf101" else "")
    paths = ["--model_name_or_path", MODEL, "--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    settings = []
    for name, value in (ALL_TASKS | SETTINGS[task] | (SMOKE_SETTINGS if smoke else {})).items():
        value = value.get(method) if isinstance(value, dict) else value
        settings += [f"--{name}", str(value)] if value is not None else []
    return torchrun_command(task, [*paths, *flags, *settings], PROCESSES)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--smoke`` and ``--no-tqdm`` (as ``run_flags``), which all tools that run on the sample data take."""
    parser.add_argument("--smoke", action="store_true", help="a dozen samples and a few steps: only whether it runs")
    parser.add_argument(
        "--no-tqdm",
        dest="run_flags",
        action="store_const",
        const=["--no-tqdm"],
        default=[],
        help="plain lines instead of progress bars",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--method", choices=METHOD_FLAGS, default="full", help="(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="where results go (default: output/demo-TASK)")
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
        f"\nFinetuned the tiny checkpoint {MODEL} ({found['method']}) on drawn samples in {usage.seconds:.0f} seconds:\n"
        f"  {metric} {found['before'][metric]:.4f} -> {found['after'][metric]:.4f} on {found['samples']} samples\n"
        f"Results are in {output_dir}; open {output_dir}/report.html in a browser.\n"
        f"The same for the real model, on 8 GPUs:\n  {shlex.join(real)}"
    )
    if data:
        print("after\n  python convert_ucf101.py --out_dir data/ucf101")


if __name__ == "__main__":
    main()
