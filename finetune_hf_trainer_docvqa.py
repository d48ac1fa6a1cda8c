"""Finetune Phi-3.5-vision (or Phi-3-vision) on DocVQA: questions about images of document pages.

    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-6 --num_train_epochs 2                   # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16 --use_lora     # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --data_dir DIR        # files of the official release

Metric: ANLS. Writes the model (or adapter), both evaluations, run.json, a model card and report.html to --output_dir.
"""

import random
from functools import partial
from pathlib import Path
from statistics import fmean

from common.arguments import training_parser
from common.runtime.process import InputError, say

MINI = "nielsr/docvqa_1200_examples"
MINI_COLUMNS = ["id", "image", "query", "answers"]
FULL = ("HuggingFaceM4/the_cauldron", "docvqa")


def parse_args():
    parser = training_parser(__doc__, task="DocVQA", metric="anls")
    group = parser.add_argument_group("DocVQA")
    group.add_argument("--full_train", action="store_true", help=f"train on all of DocVQA ({FULL[0]}) instead of {MINI}")
    group.add_argument("--data_dir", type=Path, help="official release: {train,val}_v1.0_withQT.json and documents/")
    args = parser.parse_args()
    if args.data_dir and (args.streaming or args.full_train):
        parser.error("--streaming and --full_train read from the Hub, not from --data_dir: remove one of them")
    return args


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and wrong flags are answered at once (Python 3.15 has lazy imports).
    args = parse_args()
    say("Loading PyTorch and transformers")

from common.data.pictures import picture_path
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.shards import open_hub
from common.data.sources import check_rows, collect_rows, load_hub
from common.data.streaming import Stream, training_data
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import anls
from common.evaluation.predictions import Evaluation, Prediction
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.files import read_json
from common.runtime.script import run
from common.training.evaluation import evaluate_only
from common.training.start import start
from common.training.trainer import build_trainer


def make_row(id: str, image, question: str, answers: list[str]) -> dict:
    """Return a row: a page, a question, and one training text per reference answer, one of which is drawn at random."""
    texts = [{"user": f"{question}\nAnswer briefly.", "assistant": answer} for answer in answers]
    return {"id": id, "image": image, "question": question, "answers": answers, "texts": texts}


def from_mini(row: dict, number: str) -> dict:
    return make_row(str(row["id"]), row["image"], row["query"]["en"], row["answers"])


def from_full(row: dict, number: str) -> dict:
    """Return a row with all questions about a page. It is used only for training."""
    return {"id": number, "image": row["images"][0], "question": None, "answers": [], "texts": row["texts"]}


def from_official(data_dir: Path, numbered: tuple[int, dict]) -> dict:
    number, entry = numbered
    answers = entry.get("answers") if isinstance(entry, dict) else None
    texts = answers if isinstance(answers, list) else []
    strings = isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("question", "image"))
    if not strings or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError('requires "question" and "image" (strings) and "answers" (a nonempty list of nonempty strings)')
    return make_row(str(entry.get("questionId", number)), picture_path(data_dir, entry["image"]), entry["question"], texts)


def load_official(data_dir: Path, split: str, limit: int | None, skip_bad: bool = False) -> Rows:
    path = data_dir / f"{split}_v1.0_withQT.json"
    entries = read_json(path, "--data_dir must be the folder of DocVQA's official files; download it again").get("data")
    if not isinstance(entries, list) or not entries:
        raise InputError(f'{path} does not have the DocVQA format: expected an object with a nonempty list "data" of questions')
    places = ((f'{path}, entry {number} of "data"', (number, entry)) for number, entry in enumerate(entries))
    return collect_rows(places, partial(from_official, data_dir), limit, skip_bad)


def load_train_rows(args) -> Rows | Stream:
    """Return the training rows. Unless they are streamed, they are checked, including their images."""
    skip = args.on_bad_sample == "skip"
    rows: Rows | Stream
    if args.data_dir:
        rows = load_official(args.data_dir, "train", args.max_train_samples, skip)
    elif args.full_train:
        rows = open_hub(*FULL, columns=["images", "texts"], streaming=args.streaming).map(from_full)
    else:
        rows = open_hub(MINI, columns=MINI_COLUMNS, streaming=args.streaming).map(from_mini)
    rows = rows.select(0, args.max_train_samples)
    return rows if isinstance(rows, Stream) else check_rows(rows, all_conversations, "training row", args.tqdm, skip)


def load_eval_rows(args) -> Rows:
    skip = args.on_bad_sample == "skip"
    if args.data_dir:
        rows = load_official(args.data_dir, "val", args.max_eval_samples, skip)
    else:
        rows = load_hub(MINI, columns=MINI_COLUMNS, split="test").map(from_mini).select(0, args.max_eval_samples)
    return check_rows(rows, all_conversations, "evaluation row", args.tqdm, skip)


def to_conversation(row: dict, rng: random.Random) -> dict:
    """Return a row as a conversation. If it has several questions or reference answers, one is drawn at random."""
    text = rng.choice(row["texts"])
    return {"conversations": [{"images": [row["image"]], "user": text["user"], "assistant": text["assistant"]}]}


def all_conversations(row: dict) -> list[dict]:
    """Return all conversations that can be drawn from a row."""
    return [to_conversation(row | {"texts": [text]}, random.Random(0)) for text in row["texts"]]


def score(row: dict, answer: str, full_train: bool) -> Prediction:
    """Compute the ANLS of an answer, as defined by the benchmark and in the case-sensitive form of the published table."""
    # In the_cauldron every answer ends with a period; the benchmark's reference answers do not.
    prediction = answer.strip().removesuffix(".").strip() if full_train else answer.strip()
    more = {"score_case_sensitive": anls(answer, row["answers"], case_sensitive=True)}
    return Prediction(row["id"], row["question"], prediction, row["answers"], anls(prediction, row["answers"]), more)


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    answers = generate_answers(model, processor, [to_conversation(row, random.Random(0)) for row in rows], args)
    predictions = [score(row, answer, args.full_train) for row, answer in zip(rows, answers, strict=True)]
    case_sensitive = fmean(prediction.more["score_case_sensitive"] for prediction in predictions)
    values = {"anls": fmean(prediction.score for prediction in predictions), "anls_case_sensitive": case_sensitive}
    return Evaluation("anls", values, predictions)


def main(args) -> None:
    setup = start(args)
    eval_rows = load_eval_rows(args)
    if args.eval_only:
        evaluate_only(args, setup, lambda model, processor: evaluate(model, processor, eval_rows, args))
        return
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    train_rows = load_train_rows(args)
    model = load_model(args, setup, processor)
    trainer = build_trainer(
        args,
        setup,
        model,
        processor,
        train_data=training_data(train_rows, to_conversation, processor, args.seed),
        eval_data=TrainingData(eval_rows, to_conversation, processor, args.seed),
        evaluate=lambda model: evaluate(model, processor, eval_rows, args),
        source=str(args.data_dir) if args.data_dir else f"{FULL[0]} {MINI}" if args.full_train else MINI,
    )
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
