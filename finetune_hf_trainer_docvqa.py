"""Finetune Phi-3.5-vision (or Phi-3-vision) on DocVQA: questions about pages of documents, answered from the picture.

    torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py --full_train --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-6 --num_train_epochs 2                   # all weights, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_docvqa.py --bf16 --use_lora     # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_docvqa.py --data_dir DIR        # the official release's files

Metric: ANLS. Writes the model (or adapter), both evaluations, train_results.json, trainer_state.json, run.json, a model card
and report.html to --output_dir.
"""

import json
import random
from pathlib import Path
from statistics import fmean

from datasets import Dataset, Image

from common.arguments import training_parser
from common.data.conversations import check_conversation
from common.data.samples import TrainingData
from common.data.shards import stream_hub
from common.data.sources import check_pictures, check_rows, load_hub
from common.data.streaming import Stream, StreamedData
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import anls
from common.evaluation.predictions import Evaluation
from common.model.loading import load_model, load_processor
from common.runtime import InputError, run
from common.training.run import finetune, start

MINI = "nielsr/docvqa_1200_examples"
COLUMNS = ["id", "image", "query", "answers"]
FULL = ("HuggingFaceM4/the_cauldron", "docvqa")


def parse_args():
    parser = training_parser(__doc__, task="DocVQA", metric="anls")
    group = parser.add_argument_group("DocVQA")
    group.add_argument("--full_train", action="store_true", help=f"train on all of DocVQA ({FULL[0]}), not on {MINI}")
    group.add_argument("--data_dir", type=Path, help="official release: {train,val}_v1.0_withQT.json and documents/")
    return parser.parse_args()


def load_from_hub(full_train: bool, streaming: bool) -> tuple[Dataset | Stream, Dataset]:
    """Rows of the hub's data sets; pictures stay encoded until a worker needs them."""
    mini = load_hub(MINI).select_columns(COLUMNS).cast_column("image", Image(decode=False))
    if streaming:
        train_rows = stream_hub(*FULL, columns=["images", "texts"]) if full_train else stream_hub(MINI, columns=COLUMNS)
        return train_rows, mini["test"]
    if not full_train:
        return mini["train"], mini["test"]
    full = load_hub(*FULL, split="train").cast_column("images", [Image(decode=False)])
    return full, mini["test"]


def load_official(data_dir: Path, split: str, limit: int | None, tqdm: bool) -> Dataset:
    """Rows of the official release, every picture checked."""
    path = data_dir / f"{split}_v1.0_withQT.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # escapes can spell half characters
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: --data_dir takes the folder of DocVQA's official files") from None
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}): download it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f'{path} is not in DocVQA\'s schema: it must be an object with a list "data"')
    rows = []
    for number, entry in enumerate(content["data"][:limit]):
        answers = entry.get("answers") if isinstance(entry, dict) else None
        fields = isinstance(answers, list) and answers and all(isinstance(answer, str) and answer.strip() for answer in answers)
        if not fields or not isinstance(entry.get("question"), str) or not isinstance(entry.get("image"), str):
            raise InputError(
                f'{path}, entry {number} of "data": needs "question" and "image" (texts) and "answers" '
                "(a list of at least one text, none empty)"
            )
        image = str(data_dir / entry["image"])
        row = {"id": str(entry.get("questionId", number)), "question": entry["question"], "image": image, "answers": answers}
        for conversation in all_conversations(row):
            check_conversation(conversation, f'{path}, entry {number} of "data"')
        rows.append(row)
    if not rows:
        raise InputError(f'{path} is empty: "data" holds no question')
    check_pictures(sorted({row["image"] for row in rows}), tqdm)
    return Dataset.from_list(rows)


def load_rows(args) -> tuple[Dataset | Stream, Dataset]:
    if args.data_dir and args.streaming:
        raise InputError("--streaming is for the hub's shards; pictures in --data_dir are read one by one anyway: leave it out")
    if args.data_dir and args.full_train:
        raise InputError("--full_train is for the hub's rows, --data_dir for the official release: leave one of them out")
    if args.data_dir:
        train_rows = load_official(args.data_dir, "train", args.max_train_samples, args.tqdm)
        return train_rows, load_official(args.data_dir, "val", args.max_eval_samples, args.tqdm)
    train_rows, eval_rows = load_from_hub(args.full_train, args.streaming)
    limit = min(args.max_train_samples or len(train_rows), len(train_rows))
    train_rows = train_rows.select(0, limit) if args.streaming else train_rows.select(range(limit))
    eval_rows = eval_rows.select(range(min(args.max_eval_samples or len(eval_rows), len(eval_rows))))
    if not args.streaming:
        check_rows(train_rows, all_conversations, "training row", args.tqdm)
    check_rows(eval_rows, all_conversations, "evaluation row", args.tqdm)
    return train_rows, eval_rows


def question(row: dict) -> str:
    return row["question"] if "question" in row else row["query"]["en"]


def to_conversation(row: dict, rng: random.Random) -> dict:
    """A row as a conversation; one of a page's questions, or of several accepted answers, is drawn."""
    if "texts" in row:
        text = rng.choice(row["texts"])
        turn = {"images": row["images"], "user": text["user"], "assistant": text["assistant"]}
    else:
        user = f"{question(row)}\nAnswer briefly."
        turn = {"images": [row["image"]], "user": user, "assistant": rng.choice(row["answers"])}
    return {"conversations": [turn]}


def all_conversations(row: dict) -> list[dict]:
    """All that a row of the hub can become."""
    choices = [("texts", text) for text in row["texts"]] if "texts" in row else [("answers", text) for text in row["answers"]]
    return [to_conversation(row | {name: [choice]}, random.Random(0)) for name, choice in choices]


def score(row: dict, answer: str, full_train: bool) -> dict:
    """ANLS of an answer as the benchmark defines it, and in the case-sensitive form of the published table."""
    # the_cauldron puts a full stop after every answer, which the benchmark's answers don't have.
    prediction = answer.strip().removesuffix(".").strip() if full_train else answer.strip()
    return {
        "id": str(row["id"]),
        "question": question(row),
        "prediction": prediction,
        "answers": row["answers"],
        "score": anls(prediction, row["answers"]),
        "score_case_sensitive": anls(answer, row["answers"], case_sensitive=True),
    }


def evaluate(model, processor, rows: Dataset, args) -> Evaluation:
    """Answer every question and score the answers."""
    conversations = [to_conversation(row, random.Random(0)) for row in rows]
    answers = generate_answers(model, processor, conversations, args)
    predictions = [score(row, answer, args.full_train) for row, answer in zip(rows, answers, strict=True)]
    values = {
        "anls": fmean(entry["score"] for entry in predictions),
        "anls_case_sensitive": fmean(entry["score_case_sensitive"] for entry in predictions),
    }
    return Evaluation("anls", values, predictions)


def main() -> None:
    args = parse_args()
    state = start(args)
    processor = load_processor(args)
    train_rows, eval_rows = load_rows(args)
    training_data = StreamedData if args.streaming else TrainingData
    finetune(
        args,
        load_model(args, processor, state.device),
        processor,
        train_data=training_data(train_rows, to_conversation, processor, args.seed),
        eval_data=TrainingData(eval_rows, to_conversation, processor, args.seed, name="evaluation row"),
        evaluate=lambda model: evaluate(model, processor, eval_rows, args),
        source=str(args.data_dir) if args.data_dir else f"{FULL[0]} {MINI}" if args.full_train else MINI,
    )


if __name__ == "__main__":
    run(main)
