"""Finetune Phi-3.5-vision (or Phi-3-vision) on UCF-101: which activity do the frames of a video show?

    python convert_ucf101.py --out_dir data/ucf101                                # once: clips to images and JSONL files
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir data/ucf101 --bf16 --use_flash_attention \\
        --learning_rate 4e-5 --warmup_steps 0.1 --num_train_epochs 2              # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir data/ucf101 --bf16 --use_lora

Metrics: accuracy of the generated class name, over all clips and per class.
"""

import random
from pathlib import Path

from common.arguments import training_parser
from common.runtime.parser import check_inputs
from common.runtime.process import say


def parse_args():
    parser = training_parser(__doc__, task="UCF-101", metric="accuracy")
    # A clip has eight images. With four crops each, it has about as many tokens as one document page with the default.
    parser.set_defaults(num_crops=4)
    group = parser.add_argument_group("UCF-101")
    group.add_argument(
        "--data_dir", type=Path, required=True, help="output of convert_ucf101.py: ucf101_{train,val,test}.jsonl and images/"
    )
    group.add_argument(
        "--eval_split",
        choices=("val", "test"),
        default="val",
        help="split to evaluate on (default: val)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds, so that --help and wrong flags are answered at once
    check_inputs(args)
    say("Loading PyTorch and transformers")

from common.data.rows import Rows
from common.data.sources import load_conversations
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import accuracy, accuracy_per_class
from common.evaluation.predictions import Evaluation, exact_match
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.script import run
from common.training.build import build_trainer
from common.training.evaluation import evaluate_only
from common.training.start import start


def load_rows(data_dir: Path, split: str, limit: int | None, bar: bool, skip_bad: bool) -> Rows:
    """Return the rows of a split, which are already in the conversation format. All rows and images are checked."""
    return load_conversations(data_dir / f"ucf101_{split}.jsonl", data_dir / "images", limit, bar, skip_bad)


def to_conversation(row: dict, rng: random.Random) -> dict:
    return row


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    """Compute the accuracy of the generated answer, over all rows and per class."""
    answers = generate_answers(model, processor, rows, args)
    turns = [row["conversations"][0] for row in rows]
    predictions = [
        exact_match(row["id"] or rows.place(index), turn["user"], answer, turn["assistant"])
        for index, (row, turn, answer) in enumerate(zip(rows, turns, answers, strict=True))
    ]
    classes, correct = [turn["assistant"] for turn in turns], [entry.score for entry in predictions]
    values = {"accuracy": accuracy(correct), "accuracy_per_class": accuracy_per_class(classes, correct)}
    return Evaluation("accuracy", values, predictions)


def main(args) -> None:
    setup = start(args)
    skip = args.on_bad_sample == "skip"
    eval_rows = load_rows(args.data_dir, args.eval_split, args.max_eval_samples, args.tqdm, skip)
    if args.eval_only:
        return evaluate_only(args, setup, eval_rows, evaluate)
    train_rows = load_rows(args.data_dir, "train", args.max_train_samples, args.tqdm, skip)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    model = load_model(args, setup, processor)
    source, eval_set = str(args.data_dir), {"split": args.eval_split}
    trainer = build_trainer(args, setup, model, processor, train_rows, eval_rows, to_conversation, evaluate, source, eval_set)
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
