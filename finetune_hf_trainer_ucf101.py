"""Finetune Phi-3.5-vision (or Phi-3-vision) on UCF-101 (which activity do the frames of a video show?) or on your own data.

    python convert_ucf101.py --out_dir data/ucf101                                # once: clips to images and JSONL files
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir data/ucf101 --bf16 --use_flash_attention \\
        --learning_rate 4e-5 --warmup_steps 0.1 --num_train_epochs 2              # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_ucf101.py --data_dir data/ucf101 --bf16 --use_lora
    torchrun --nproc_per_node=2 finetune_hf_trainer_ucf101.py --data_dir data/mine \\
        --train_file train.jsonl --eval_file val.jsonl                            # any data; see docs/custom_dataset.md
    torchrun --nproc_per_node=8 finetune_hf_trainer_ucf101.py --data_dir data/big --streaming \\
        --train_file "train-*.parquet" --eval_file val.jsonl                      # shards, read during training

Metrics: accuracy of the answer to the last turn, over all rows and per class. A class is all rows with the same answer.

Writes the model (or adapter), both evaluations, train_results.json, trainer_state.json, run.json, a model card and report.html
to --output_dir.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from common.arguments import training_parser
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.shards import stream_conversations
from common.data.sources import load_conversations
from common.data.streaming import Stream, training_data
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import accuracy, accuracy_per_class
from common.evaluation.predictions import Evaluation, Prediction, exact_match
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime import run
from common.training.start import start
from common.training.trainer import build_trainer


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
        help="split to evaluate on without --eval_file (default: val)",
    )
    group.add_argument(
        "--train_file",
        default="ucf101_train.jsonl",
        help="file in --data_dir; with --streaming, wildcards select several files (default: %(default)s)",
    )
    group.add_argument("--eval_file", help="file in --data_dir (default: ucf101_{--eval_split}.jsonl)")
    group.add_argument(
        "--image_dir",
        type=Path,
        help="folder that the images' names are relative to and must not leave; / allows all (default: images/ in --data_dir)",
    )
    return parser.parse_args()


def load_rows(args) -> tuple[Rows | Stream, Rows]:
    """Return conversations from both files. All rows and images are checked; streamed ones when they are read."""
    skip = args.on_bad_sample == "skip"
    train_file = args.data_dir / args.train_file
    eval_file = args.data_dir / (args.eval_file or f"ucf101_{args.eval_split}.jsonl")
    image_dir = args.image_dir or args.data_dir / "images"
    train_rows: Rows | Stream
    if args.streaming:
        train_rows = stream_conversations(train_file, image_dir, args.max_train_samples)
    else:
        train_rows = load_conversations(train_file, image_dir, args.max_train_samples, args.tqdm, skip)
    return train_rows, load_conversations(eval_file, image_dir, args.max_eval_samples, args.tqdm, skip)


def to_conversation(row: dict, rng: random.Random) -> dict:
    return row  # rows are already in the conversation format


def score(rows: Sequence, answers: list[str]) -> list[Prediction]:
    """Compare the answer to each row's last turn with the expected one."""
    predictions, seen = [], set()
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        # Custom data may have no ids, or use the name of an image as the id of several questions.
        identifier = row["id"] if row["id"] and row["id"] not in seen else f"{row['id'] or ''}#{number}".removeprefix("#")
        seen.add(identifier)
        turn = row["conversations"][-1]
        predictions.append(exact_match(identifier, turn["user"], answer, turn["assistant"]))
    return predictions


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    """Compute the accuracy of the generated answer to the last turn, over all rows and per class."""
    predictions = score(rows, generate_answers(model, processor, rows, args))
    classes, correct = [entry.answers[0] for entry in predictions], [entry.score for entry in predictions]
    values = {"accuracy": accuracy(correct), "accuracy_per_class": accuracy_per_class(classes, correct)}
    return Evaluation("accuracy", values, predictions)


def main() -> None:
    args = parse_args()
    setup = start(args)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    train_rows, eval_rows = load_rows(args)
    model = load_model(args, setup, processor)
    trainer = build_trainer(
        args,
        setup,
        model,
        processor,
        train_data=training_data(train_rows, to_conversation, processor, args.seed),
        eval_data=TrainingData(eval_rows, to_conversation, processor, args.seed),
        evaluate=lambda model: evaluate(model, processor, eval_rows, args),
        source=str(args.data_dir),
    )
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main)
