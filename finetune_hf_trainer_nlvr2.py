"""Finetune Phi-3.5-vision (or Phi-3-vision) on NLVR2: is a statement true for a pair of images?

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 1e-5 --num_train_epochs 3                # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_lora   # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --data_dir DIR      # files of the official release

Metrics: accuracy and, with the official release, consistency: the share of statements that are answered correctly for all of
their image pairs.
"""

import random
from functools import partial
from pathlib import Path

from common.arguments import training_parser
from common.runtime.parser import check_inputs
from common.runtime.process import InputError, say


def parse_args():
    parser = training_parser(__doc__, task="NLVR2", metric="accuracy")
    group = parser.add_argument_group("NLVR2")
    group.add_argument("--data_dir", type=Path, help="official release: train.json, dev.json, images/train/ and images/dev/")
    args = parser.parse_args()
    if args.data_dir and args.streaming:
        parser.error("--streaming reads from the Hub and cannot be used with --data_dir: remove one of them")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds, so that --help and wrong flags are answered at once
    check_inputs(args)
    say("Loading PyTorch and transformers")

from common.data.checks import check_rows
from common.data.pictures import picture_path
from common.data.rows import Rows, first_entry
from common.data.shards import open_hub
from common.data.sources import read_rows
from common.data.streaming import Stream
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import accuracy, consistency
from common.evaluation.predictions import Evaluation, exact_match
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.script import run
from common.training.build import build_trainer
from common.training.evaluation import evaluate_only
from common.training.start import start

HUB = ("HuggingFaceM4/the_cauldron", "nlvr2")
HUB_EVAL_ROWS = 500
HUB_EVAL_SET = {"type": HUB[0], "config": HUB[1], "split": f"train[:{HUB_EVAL_ROWS}]"}
# One of the Hub's eight wordings, which all have the same beginning and end.
QUESTION = (
    "The first image is the image on the left, the second image is the image on the right. Given the left and right images, "
    'does the statement "{sentence}" hold true? Answer yes or no.'
)
ANSWERS = {"True": "Yes.", "False": "No."}  # by label


def from_hub(row: dict, identifier: str) -> dict:
    """Return the first question about an image pair; if each question is a row, this is the only one."""
    text = first_entry(row, "texts")
    return {"id": f"{identifier}-0", "images": row["images"], "question": text["user"], "answer": text["assistant"]}


def from_official(data_dir: Path, split: str, row: dict) -> dict:
    identifier, sentence = row.get("identifier"), row.get("sentence")
    if not isinstance(identifier, str) or identifier.count("-") != 3:
        raise InputError('requires "identifier", of the form split-set-pair-sentence')
    if not isinstance(sentence, str) or str(row.get("label")) not in ANSWERS:
        raise InputError('requires "sentence" (a string) and "label" ("True" or "False")')
    if split == "train" and "directory" not in row:
        raise InputError('requires "directory", the folder in images/train/ that contains the images')
    folder = f"{row['directory']}/" if split == "train" else ""
    names = [f"{folder}{identifier.rpartition('-')[0]}-img{side}.png" for side in (0, 1)]
    images = [picture_path(data_dir / "images" / split, name) for name in names]
    question = QUESTION.format(sentence=sentence)
    return {"id": identifier, "images": images, "question": question, "answer": ANSWERS[str(row["label"])]}


def load_official(data_dir: Path, split: str, limit: int | None, skip_bad: bool = False) -> Rows:
    return read_rows(data_dir / f"{split}.json", "NLVR2", partial(from_official, data_dir, split), limit, skip_bad)


def load_train_rows(args) -> Rows | Stream:
    """Return the training rows. Unless they are streamed, they are checked, including their images."""
    if args.data_dir:
        rows: Rows | Stream = load_official(args.data_dir, "train", args.max_train_samples, args.on_bad_sample == "skip")
    else:
        hub = partial(open_hub, *HUB, columns=["images", "texts"], streaming=args.streaming)
        # The first image pairs are for evaluation. With each="texts", a row is one question: skip all questions about them.
        held_out = sum(len(row["texts"]) for row in hub().head(HUB_EVAL_ROWS))
        rows = hub(each="texts").map(from_hub).select(held_out, args.max_train_samples)
    return check_rows(rows, lambda row: [to_conversation(row)], "training row", args.tqdm, args.on_bad_sample == "skip")


def load_eval_rows(args) -> Rows:
    """Return the evaluation rows: without an official release, the first question of each of the Hub's first 500 rows."""
    if args.data_dir:
        rows = load_official(args.data_dir, "dev", args.max_eval_samples, args.on_bad_sample == "skip")
    else:
        rows = open_hub(*HUB, columns=["images", "texts"], streaming=args.streaming).head(HUB_EVAL_ROWS)
        rows = rows.map(from_hub).select(0, args.max_eval_samples)
    return check_rows(rows, lambda row: [to_conversation(row)], "evaluation row", args.tqdm, args.on_bad_sample == "skip")


def to_conversation(row: dict, rng: random.Random | None = None) -> dict:
    return {"conversations": [{"images": row["images"], "user": row["question"], "assistant": row["answer"]}]}


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    """Compute the accuracy and, with the identifiers of the official release, the consistency of the generated answers."""
    answers = generate_answers(model, processor, [to_conversation(row) for row in rows], args)
    predictions = [
        exact_match(row["id"], row["question"], answer, row["answer"]) for row, answer in zip(rows, answers, strict=True)
    ]
    correct = [prediction.score for prediction in predictions]
    values = {"accuracy": accuracy(correct)}
    if args.data_dir:
        values["consistency"] = consistency([prediction.id for prediction in predictions], correct)
    return Evaluation("accuracy", values, predictions)


def main(args) -> None:
    setup = start(args)
    eval_rows = load_eval_rows(args)
    if args.eval_only:
        return evaluate_only(args, setup, eval_rows, evaluate)
    train_rows = load_train_rows(args)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    model = load_model(args, setup, processor)
    source, eval_set = (str(args.data_dir), {"split": "dev"}) if args.data_dir else (HUB[0], HUB_EVAL_SET)
    trainer = build_trainer(args, setup, model, processor, train_rows, eval_rows, to_conversation, evaluate, source, eval_set)
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
