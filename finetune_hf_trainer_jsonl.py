"""Finetune Phi-3.5-vision (or Phi-3-vision) on your own data: images, questions and answers in JSON Lines, JSON or CSV files.

    torchrun --nproc_per_node=1 finetune_hf_trainer_jsonl.py --data_dir data/receipts --eval_fraction 0.1 \\
        --task_name receipts --metric anls exact --bf16 --use_lora --learning_rate 2e-4 --warmup_steps 0.1
    torchrun --nproc_per_node=8 finetune_hf_trainer_jsonl.py --train_file data/a.jsonl data/b.csv --train_weights 2 0.5 \\
        --eval_file data/val.jsonl --bf16 --use_flash_attention --batch_size 64      # several files, weighted
    torchrun --nproc_per_node=8 finetune_hf_trainer_jsonl.py --data_dir data/big --streaming \\
        --train_file "train-*.parquet" --eval_file val.jsonl                         # shards, read during training

The metrics compare the generated answer to the last turn with the expected one. docs/custom_dataset.md describes the formats.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

from common.arguments import training_parser
from common.evaluation.metrics import METRICS
from common.runtime.parser import check_inputs
from common.runtime.process import say


def parse_args():
    parser = training_parser(__doc__, task="own data", metric="exact")
    group = parser.add_argument_group("own data")
    group.add_argument("--task_name", dest="task", default="own data", help="name in report and model card")
    group.add_argument("--data_dir", type=Path, default=Path(), help="folder that the following names are relative to")
    group.add_argument("--train_file", nargs="+", help="training data (default: train.jsonl in --data_dir)")
    how_often = "occurrences of a file's rows per epoch; 0.5: one half, in the next epoch the other half (default: 1 for each)"
    group.add_argument("--train_weights", type=float, nargs="+", help=how_often)
    group.add_argument("--eval_file", help="evaluation data (default: val.jsonl)")
    group.add_argument("--eval_fraction", type=float, help="hold out this share of the rows instead, with all rows of an image")
    group.add_argument(
        "--metric",
        dest="metrics",
        nargs="+",
        choices=list(METRICS),
        default=["exact"],
        help="exact match, ANLS, relaxed accuracy (numbers within 5 %%), whether the answer is contained, F1 of the words; the "
        "first one is the main metric (default: exact)",
    )
    group.add_argument(
        "--image_dir",
        type=Path,
        help="folder that the images' names are relative to and must not leave; / allows all (default: the folder of the file "
        "or, if its first image is not there, images/ in it)",
    )
    parser.training_flags -= {"seed", "max_train_samples"}  # with --eval_fraction, they determine which rows are held out
    args = parser.parse_args()
    files, weights, fraction = args.train_file or ["train.jsonl"], args.train_weights, args.eval_fraction
    if fraction is not None and (args.eval_file or args.streaming or not 0 < fraction < 1):
        parser.error("--eval_fraction must be between 0 and 1, and excludes --eval_file and --streaming")
    if args.eval_only and not fraction and (args.max_train_samples or args.seed != parser.get_default("seed")):
        parser.error("--seed and --max_train_samples have no effect with --eval_only without --eval_fraction: remove them")
    if weights and (args.streaming or len(weights) != len(files) or not all(0 < weight < 1e6 for weight in weights)):
        parser.error("--train_weights takes one number above 0 for each --train_file, and excludes --streaming")
    if not (args.train_file or args.eval_only or (args.data_dir / "train.jsonl").is_file()):
        parser.error(f"there is no {args.data_dir / 'train.jsonl'} to train on: pass --train_file, or its folder as --data_dir")
    if not (fraction or args.eval_file or (args.data_dir / "val.jsonl").is_file()):
        parser.error(f"there is no {args.data_dir / 'val.jsonl'} to evaluate on: pass --eval_file, or --eval_fraction 0.1")
    return argparse.Namespace(**vars(args) | {"metric": args.metrics[0]})


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds, so that --help and wrong flags are answered at once
    check_inputs(args)
    say("Loading PyTorch and transformers")

from common.data.rows import Rows, join_rows
from common.data.shards import stream_conversations
from common.data.sources import find_image_dir, load_conversations
from common.data.splitting import split_by_picture
from common.data.streaming import Stream
from common.evaluation.generation import generate_answers
from common.evaluation.predictions import Evaluation, Prediction
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.script import run
from common.training.build import build_trainer
from common.training.evaluation import evaluate_only
from common.training.start import start


def load_rows(args) -> tuple[Rows | Stream, Rows]:
    """Return training and evaluation rows, checked with their images; streamed ones are checked when they are read."""
    files = [args.data_dir / name for name in args.train_file or ["train.jsonl"]]
    eval_file = args.data_dir / (args.eval_file or "val.jsonl")

    def load(file: Path, limit: int | None) -> Rows:
        return load_conversations(file, args.image_dir or find_image_dir(file), limit, args.tqdm, args.on_bad_sample == "skip")

    if args.eval_only and not args.eval_fraction:
        return Rows([], str), load(eval_file, args.max_eval_samples)
    if args.streaming:
        return stream_conversations(files, args.image_dir, args.max_train_samples), load(eval_file, args.max_eval_samples)
    parts = [load(file, args.max_train_samples) for file in files]
    if args.eval_fraction:
        parts, eval_rows = split_by_picture(parts, args.eval_fraction, args.seed, args.max_eval_samples, args.tqdm)
    else:
        eval_rows = load(eval_file, args.max_eval_samples)
    return join_rows(parts, args.train_weights, args.seed), eval_rows


def to_conversation(row: dict, rng: random.Random) -> dict:
    return row  # rows are already in the conversation format


def score_all(rows: Rows, answers: list[str], metrics: list[str]) -> list[Prediction]:
    """Compare the answer to each row's last turn with the expected one; the first metric is the score, others in ``more``."""
    predictions, seen = [], set()
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        # Rows may have no ids, or use the name of an image as the id of several questions. Files may have the same name.
        place = rows.place(number)
        name = Path(place).name  # "receipts.csv, line 15"
        names = [row["id"], f"{row['id']} ({name})"] if row["id"] else [name]
        identifier = next((candidate for candidate in names if candidate not in seen), place)
        seen.add(identifier)
        turn = row["conversations"][-1]
        scores = {name: METRICS[name](answer, [turn["assistant"]]) for name in metrics}
        main = scores.pop(metrics[0])
        predictions.append(Prediction(identifier, turn["user"], answer.strip(), [turn["assistant"]], main, scores))
    return predictions


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    predictions = score_all(rows, generate_answers(model, processor, rows, args), args.metrics)
    values = {name: fmean(entry.more.get(name, entry.score) for entry in predictions) for name in args.metrics}
    return Evaluation(args.metric, values, predictions)


def main(args) -> None:
    setup = start(args)
    train_rows, eval_rows = load_rows(args)
    if args.eval_only:
        return evaluate_only(args, setup, eval_rows, evaluate)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    model = load_model(args, setup, processor)
    source = str(args.data_dir) if args.data_dir != Path() else " ".join(args.train_file or ["train.jsonl"])
    trainer = build_trainer(args, setup, model, processor, train_rows, eval_rows, to_conversation, evaluate, source)
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
