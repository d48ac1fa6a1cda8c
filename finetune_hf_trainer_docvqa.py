"""Finetune Phi-3.5-vision (or Phi-3-vision) on DocVQA: questions about document pages, scored by ANLS.

    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-6 --num_train_epochs 2                   # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16 --use_lora     # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --data_dir DIR        # files of the official release
"""

import random
from functools import partial
from pathlib import Path
from statistics import fmean

from common.arguments import training_parser
from common.runtime.parser import check_inputs
from common.runtime.process import InputError, say

MINI = "nielsr/docvqa_1200_examples"
MINI_COLUMNS = ["id", "image", "query", "answers"]
FULL = ("HuggingFaceM4/the_cauldron", "docvqa")  # a row is a page with all questions about it; only for training


def parse_args():
    parser = training_parser(__doc__, task="DocVQA", metric="anls")
    group = parser.add_argument_group("DocVQA")
    group.add_argument("--full_train", action="store_true", help="train on all pages; scoring ignores a final period")
    group.add_argument("--data_dir", type=Path, help="official release: {train,val}_v1.0_withQT.json and documents/")
    args = parser.parse_args()
    if args.data_dir and (args.streaming or args.full_train):
        parser.error("--streaming and --full_train read from the Hub, not from --data_dir: remove one of them")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds, so that --help and wrong flags are answered at once
    check_inputs(args)
    say("Loading PyTorch and transformers")

from common.data.checks import check_rows
from common.data.pictures import picture_path
from common.data.rows import Rows, first_entry
from common.data.shards import open_hub
from common.data.sources import load_hub, read_rows
from common.data.streaming import Stream
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import anls
from common.evaluation.predictions import Evaluation, Prediction
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.script import run
from common.training.build import build_trainer
from common.training.evaluation import evaluate_only
from common.training.start import start


def make_row(id: str, image, question: str, answers: list[str]) -> dict:
    """Return a row: a page, a question, and one training text per reference answer, one of which is drawn at random."""
    texts = [{"user": f"{question}\nAnswer briefly.", "assistant": answer} for answer in answers]
    return {"id": id, "image": image, "question": question, "answers": answers, "texts": texts}


def from_mini(row: dict, identifier: str) -> dict:
    return make_row(str(row["id"]), row["image"], row["query"]["en"], row["answers"])


def from_full(row: dict, identifier: str) -> dict:
    return {"id": identifier, "image": first_entry(row, "images"), "question": None, "answers": [], "texts": row["texts"]}


def from_official(data_dir: Path, entry: dict) -> dict:
    answers = entry.get("answers")
    texts = [entry.get("question"), entry.get("image"), *(answers if isinstance(answers, list) and answers else [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError('requires "question" and "image" (strings) and "answers" (a nonempty list of nonempty strings)')
    identifier = str(entry.get("questionId", f"{entry['image']}: {entry['question']}"))
    return make_row(identifier, picture_path(data_dir, entry["image"]), entry["question"], entry["answers"])


def load_official(data_dir: Path, split: str, limit: int | None, skip_bad: bool = False) -> Rows:
    path = data_dir / f"{split}_v1.0_withQT.json"
    return read_rows(path, "DocVQA", partial(from_official, data_dir), limit, skip_bad, field="data")


def load_train_rows(args) -> Rows | Stream:
    """Return the training rows. Unless they are streamed, they are checked, including their images."""
    if args.data_dir:
        rows: Rows | Stream = load_official(args.data_dir, "train", args.max_train_samples, args.on_bad_sample == "skip")
    elif args.full_train:
        rows = open_hub(*FULL, columns=["images", "texts"], streaming=args.streaming).map(from_full)
    else:
        rows = open_hub(MINI, columns=MINI_COLUMNS, streaming=args.streaming).map(from_mini)
    rows = rows.select(0, args.max_train_samples)
    return check_rows(rows, all_conversations, "training row", bar=args.tqdm, skip_bad=args.on_bad_sample == "skip")


def load_eval_rows(args) -> Rows:
    """Return the evaluation rows: without an official release, the test split of the examples, also with --full_train."""
    if args.data_dir:
        rows = load_official(args.data_dir, "val", args.max_eval_samples, args.on_bad_sample == "skip")
    else:
        rows = load_hub(MINI, columns=MINI_COLUMNS, split="test").map(from_mini).select(0, args.max_eval_samples)
    return check_rows(rows, all_conversations, "evaluation row", bar=args.tqdm, skip_bad=args.on_bad_sample == "skip")


def all_conversations(row: dict) -> list[dict]:
    """Return a conversation for each question, or for each reference answer to a question."""
    turns = ({"images": [row["image"]], "user": text["user"], "assistant": text["assistant"]} for text in row["texts"])
    return [{"conversations": [turn]} for turn in turns]


def to_conversation(row: dict, rng: random.Random) -> dict:
    return rng.choice(all_conversations(row))


def score(row: dict, generated: str, full_train: bool) -> Prediction:
    """Compute the ANLS of an answer, as defined by the benchmark and in the case-sensitive form of the published table."""
    # In the_cauldron every answer ends with a period; the benchmark's reference answers do not.
    prediction = generated.strip().removesuffix(".").strip() if full_train else generated.strip()
    more = {"score_case_sensitive": anls(generated, row["answers"], case_sensitive=True)}
    return Prediction(row["id"], row["question"], prediction, row["answers"], anls(prediction, row["answers"]), more)


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    answers = generate_answers(model, processor, [all_conversations(row)[0] for row in rows], args)
    predictions = [score(row, answer, args.full_train) for row, answer in zip(rows, answers, strict=True)]
    case_sensitive = fmean(prediction.more["score_case_sensitive"] for prediction in predictions)
    values = {"anls": fmean(prediction.score for prediction in predictions), "anls_case_sensitive": case_sensitive}
    return Evaluation("anls", values, predictions)


def main(args) -> None:
    setup = start(args)
    eval_rows = load_eval_rows(args)
    if args.eval_only:
        return evaluate_only(args, setup, eval_rows, evaluate)
    train_rows = load_train_rows(args)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    model = load_model(args, setup, processor)
    source = str(args.data_dir or (FULL[0] if args.full_train else MINI))
    eval_set = {"split": "val"} if args.data_dir else {"type": MINI, "split": "test"}
    trainer = build_trainer(args, setup, model, processor, train_rows, eval_rows, to_conversation, evaluate, source, eval_set)
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
