"""Finetune Phi-3.5-vision (or Phi-3-vision) on Hateful Memes: does a meme, its image and text together, promote hate speech?

    torchrun --nproc_per_node=8 finetune_hf_trainer_hateful_memes.py --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-5 --num_train_epochs 2                        # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py --bf16 --use_lora   # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --data_dir DIR      # files of the official release

Metrics: AUROC, the official one, from the probabilities of the answers `Yes.` and `No.`; accuracy of the generated answer.
"""

import random
from functools import partial
from pathlib import Path

import numpy as np

from common.arguments import training_parser
from common.runtime.parser import check_inputs
from common.runtime.process import InputError, excerpt, say


def parse_args():
    parser = training_parser(__doc__, task="Hateful Memes", metric="auroc")
    group = parser.add_argument_group("Hateful Memes")
    group.add_argument("--data_dir", type=Path, help="official release: train.jsonl, dev_seen.jsonl and img/")
    group.add_argument("--eval_by_likelihood", action="store_true", help="use the more likely answer instead of generating one")
    args = parser.parse_args()
    if args.data_dir and args.streaming:
        parser.error("--streaming reads from the Hub and cannot be used with --data_dir: remove one of them")
    if args.eval_by_likelihood and args.max_new_tokens:
        parser.error("--max_new_tokens has no effect with --eval_by_likelihood: remove one of them")
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
from common.evaluation.generation import generate_with_log_probabilities
from common.evaluation.metrics import accuracy, auroc
from common.evaluation.predictions import Evaluation, exact_match
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime.script import run
from common.training.build import build_trainer
from common.training.evaluation import evaluate_only
from common.training.start import start

HUB = ("HuggingFaceM4/the_cauldron", "hateful_memes")
HUB_EVAL_ROWS = 500
HUB_EVAL_SET = {"type": HUB[0], "config": HUB[1], "split": f"train[:{HUB_EVAL_ROWS}]"}
# The Hub's rows use eleven wordings. A single one makes models from both sources comparable.
QUESTION = "Does this meme promote hate speech?\nAnswer yes or no."
ANSWERS = ("No.", "Yes.")  # by label


def from_hub(row: dict, identifier: str) -> dict:
    answer = first_entry(row, "texts")["assistant"]
    if answer not in ANSWERS:
        raise InputError(f'expected the answer "{ANSWERS[0]}" or "{ANSWERS[1]}", got "{excerpt(answer)}": remove the row')
    return {"id": identifier, "image": first_entry(row, "images"), "label": ANSWERS.index(answer)}


def from_official(data_dir: Path, row: dict) -> dict:
    if not isinstance(row.get("img"), str) or row.get("label") not in (0, 1):
        raise InputError('requires "img" (name of the image) and "label" (0 or 1)')
    image = picture_path(data_dir, row["img"])
    return {"id": str(row.get("id", Path(image).stem)), "image": image, "label": int(row["label"])}


def load_official(data_dir: Path, split: str, limit: int | None, skip_bad: bool = False) -> Rows:
    return read_rows(data_dir / f"{split}.jsonl", "Hateful Memes", partial(from_official, data_dir), limit, skip_bad)


def load_train_rows(args) -> Rows | Stream:
    """Return the training rows. Unless they are streamed, they are checked, including their images."""
    if args.data_dir:
        rows: Rows | Stream = load_official(args.data_dir, "train", args.max_train_samples, args.on_bad_sample == "skip")
    else:
        rows = open_hub(*HUB, columns=["images", "texts"], streaming=args.streaming).map(from_hub)
        rows = rows.select(HUB_EVAL_ROWS, args.max_train_samples)  # the first ones are for evaluation
    return check_rows(rows, lambda row: [to_conversation(row)], "training row", args.tqdm, args.on_bad_sample == "skip")


def load_eval_rows(args) -> Rows:
    """Return the evaluation rows: without an official release, the Hub's first 500 rows, as in the published recipe."""
    if args.data_dir:
        rows = load_official(args.data_dir, "dev_seen", args.max_eval_samples, args.on_bad_sample == "skip")
    else:
        count = min(args.max_eval_samples or HUB_EVAL_ROWS, HUB_EVAL_ROWS)
        rows = open_hub(*HUB, columns=["images", "texts"], streaming=args.streaming).map(from_hub).head(count)
    rows = check_rows(rows, lambda row: [to_conversation(row)], "evaluation row", args.tqdm, args.on_bad_sample == "skip")
    if len({row["label"] for row in rows}) < 2:
        remedy = "increase --max_eval_samples" if args.max_eval_samples else "use a dataset with both labels"
        raise InputError(f"AUROC requires rows with both labels, but all have one: {remedy}", str(args.data_dir or HUB[0]))
    return rows


def to_conversation(row: dict, rng: random.Random | None = None) -> dict:
    return {"conversations": [{"images": [row["image"]], "user": QUESTION, "assistant": ANSWERS[row["label"]]}]}


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    """Compute AUROC from P(yes) / (P(yes) + P(no)), and the accuracy of the generated (or more likely) answer."""
    conversations = [to_conversation(row) for row in rows]
    generate = not args.eval_by_likelihood
    answers, log_probabilities = generate_with_log_probabilities(model, processor, conversations, ANSWERS, args, generate)
    log_p_no, log_p_yes = log_probabilities.T
    p_yes = 1 / (1 + np.exp(log_p_no - log_p_yes))
    if not generate:
        answers = [ANSWERS[int(p > 0.5)] for p in p_yes]
    predictions = [
        exact_match(row["id"], QUESTION, answer, ANSWERS[row["label"]], label=row["label"], p_yes=p)
        for row, answer, p in zip(rows, answers, p_yes.tolist(), strict=True)
    ]
    name = "accuracy" if generate else "accuracy_by_likelihood"
    values = {"auroc": auroc([row["label"] for row in rows], p_yes), name: accuracy([entry.score for entry in predictions])}
    return Evaluation("auroc", values, predictions)


def main(args) -> None:
    setup = start(args)
    eval_rows = load_eval_rows(args)
    if args.eval_only:
        return evaluate_only(args, setup, eval_rows, evaluate)
    train_rows = load_train_rows(args)
    processor = load_processor(args.model_name_or_path, setup.revision, args.num_crops)
    model = load_model(args, setup, processor)
    source, eval_set = (str(args.data_dir), {"split": "dev_seen"}) if args.data_dir else (HUB[0], HUB_EVAL_SET)
    trainer = build_trainer(args, setup, model, processor, train_rows, eval_rows, to_conversation, evaluate, source, eval_set)
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main, args)
