"""Generate sample data for a task, in the layout of the dataset's official release.

    python -m assets.draw_samples docvqa --out_dir output/sample-docvqa

The script of the task reads the folder with `--data_dir` (UCF-101 after `convert_ucf101.py --source DIR/UCF101_subset`).
"""

import argparse
from pathlib import Path

import numpy as np

from .samples import docvqa, memes, nlvr2, ucf101

# The units that --train and --val count, and their defaults.
DEFAULT_COUNTS = {
    "docvqa": ("documents with four questions each, the average of DocVQA", 260, 55),
    "hateful_memes": ("memes", 1200, 200),
    "nlvr2": ("sentences with four image pairs each", 200, 50),
    "ucf101": ("clips per class", 16, 10),
}


def draw_samples(task: str, out_dir: Path, train: int | None = None, val: int | None = None, seed: int = 0) -> None:
    """Generate the training and evaluation data of a task.

    Parameters
    ----------
    task
        One of DEFAULT_COUNTS.
    out_dir
        Output folder; created if missing.
    train, val
        Number of samples in the units of DEFAULT_COUNTS; by default as many as the demo uses.
    seed
        Random seed; the same seed gives the same data.
    """
    _, default_train, default_val = DEFAULT_COUNTS[task]
    train = default_train if train is None else train
    val = default_val if val is None else val
    train_rng, val_rng, test_rng = (np.random.default_rng([seed, part]) for part in range(3))
    if task == "docvqa":
        docvqa.draw_split(out_dir, "train", train, train_rng)
        docvqa.draw_split(out_dir, "val", val, val_rng)
    elif task == "hateful_memes":
        memes.draw_split(out_dir, "train", train, 0, train_rng)
        memes.draw_split(out_dir, "dev_seen", val, train, val_rng)
    elif task == "nlvr2":
        nlvr2.draw_split(out_dir, "train", train, train_rng)
        nlvr2.draw_split(out_dir, "dev", val, val_rng)
    else:
        ucf101.draw_split(out_dir, "train", train, train_rng)
        ucf101.draw_split(out_dir, "val", val, val_rng)
        ucf101.draw_split(out_dir, "test", -(-val // 5), test_rng)


def main() -> None:
    counts = "; ".join(f"{task}: {unit} ({train}, {val})" for task, (unit, train, val) in DEFAULT_COUNTS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=DEFAULT_COUNTS, help="task to generate data for")
    parser.add_argument("--out_dir", type=Path, required=True, help="output folder")
    parser.add_argument("--train", type=int, help=f"number of training samples (defaults of --train and --val: {counts})")
    parser.add_argument("--val", type=int, help="number of evaluation samples")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args()
    draw_samples(args.task, args.out_dir, args.train, args.val, args.seed)
    print(f"Wrote {args.task} sample data to {args.out_dir}")


if __name__ == "__main__":
    main()
