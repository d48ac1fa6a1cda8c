"""Finetune Phi-3.5-vision (or Phi-3-vision) on Hateful Memes: does a meme, its image and text together, promote hate speech?

    torchrun --nproc_per_node=8 finetune_hf_trainer_hateful_memes.py --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-5 --num_train_epochs 2                        # full finetuning, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py --bf16 --use_lora   # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --data_dir DIR      # files of the official release

Metrics: AUROC, the dataset's official metric, from the probabilities of the answers `Yes.` and `No.`; accuracy of the generated
answer.

Writes the model (or adapter), both evaluations, train_results.json, trainer_state.json, run.json, a model card and report.html
to --output_dir.
"""

import random
from functools import partial
from pathlib import Path

import numpy as np

from common.arguments import training_parser
from common.data.pictures import picture_path
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.shards import open_hub
from common.data.sources import check_rows, read_rows
from common.data.streaming import Stream, training_data
from common.evaluation.generation import generate_and_compare
from common.evaluation.metrics import accuracy, auroc
from common.evaluation.predictions import Evaluation, exact_match
from common.model.checkpoint import load_processor
from common.model.loading import load_model
from common.runtime import InputError, excerpt, run
from common.training.start import start
from common.training.trainer import build_trainer

HUB = ("HuggingFaceM4/the_cauldron", "hateful_memes")
HUB_EVAL_ROWS = 500
# The Hub's rows use eleven wordings. A single one makes models from both sources comparable.
QUESTION = "Does this meme promote hate speech?\nAnswer yes or no."
ANSWERS = ("No.", "Yes.")  # by label


def parse_args():
    parser = training_parser(__doc__, task="Hateful Memes", metric="auroc")
    group = parser.add_argument_group("Hateful Memes")
    group.add_argument("--data_dir", type=Path, help="official release: train.jsonl, dev_seen.jsonl and img/")
    group.add_argument(
        "--eval_by_likelihood",
        action="store_true",
        help="use the more likely answer instead of generating one: faster; reported as accuracy_by_likelihood",
    )
    return parser.parse_args()


def from_hub(row: dict, number: str) -> dict:
    answer = row["texts"][0]["assistant"]
    if answer not in ANSWERS:
        raise InputError(f'expected the answer "{ANSWERS[0]}" or "{ANSWERS[1]}", got "{excerpt(answer)}": remove the row')
    return {"id": number, "image": row["images"][0], "label": ANSWERS.index(answer)}


def from_official(data_dir: Path, row: dict) -> dict:
    if not isinstance(row.get("img"), str) or row.get("label") not in (0, 1):
        raise InputError('requires "img" (name of the image) and "label" (0 or 1)')
    image = picture_path(data_dir, row["img"])
    return {"id": str(row.get("id", Path(image).stem)), "image": image, "label": int(row["label"])}


def load_rows(args) -> tuple[Rows | Stream, Rows]:
    """Return training and evaluation rows. Rows that are not streamed are checked, including their images."""
    skip = args.on_bad_sample == "skip"
    if args.data_dir and args.streaming:
        raise InputError("--streaming reads from the Hub and cannot be used with --data_dir: remove one of them")
    train_rows: Rows | Stream
    if args.data_dir:
        to_row = partial(from_official, args.data_dir)
        train_rows, eval_rows = (
            read_rows(args.data_dir / f"{split}.jsonl", "Hateful Memes", to_row, limit, skip)
            for split, limit in (("train", args.max_train_samples), ("dev_seen", args.max_eval_samples))
        )
    else:
        # The first 500 training rows of the Hub are used for evaluation, as in the published recipe.
        rows = open_hub(*HUB, columns=["images", "texts"], streaming=args.streaming).map(from_hub)
        eval_rows = rows.head(min(args.max_eval_samples or HUB_EVAL_ROWS, HUB_EVAL_ROWS))
        train_rows = rows.select(HUB_EVAL_ROWS, args.max_train_samples)
    if isinstance(train_rows, Rows):
        train_rows = check_rows(train_rows, all_conversations, "training row", args.tqdm, skip)
    eval_rows = check_rows(eval_rows, all_conversations, "evaluation row", args.tqdm, skip)
    if len({row["label"] for row in eval_rows}) < 2:
        where = args.data_dir / "dev_seen.jsonl" if args.data_dir else HUB[0]
        remedy = "increase --max_eval_samples" if args.max_eval_samples else "use a dataset with both labels"
        raise InputError(
            f"AUROC requires memes with both labels, but all {len(eval_rows)} have the same label: {remedy}", str(where)
        )
    return train_rows, eval_rows


def to_conversation(row: dict, rng: random.Random | None = None) -> dict:
    return {"conversations": [{"images": [row["image"]], "user": QUESTION, "assistant": ANSWERS[row["label"]]}]}


def all_conversations(row: dict) -> list[dict]:
    return [to_conversation(row)]


def evaluate(model, processor, rows: Rows, args) -> Evaluation:
    """Compute AUROC from P(yes) / (P(yes) + P(no)), and the accuracy of the generated (or more likely) answer."""
    conversations = [to_conversation(row) for row in rows]
    generate = not args.eval_by_likelihood
    answers, log_probabilities = generate_and_compare(model, processor, conversations, ANSWERS, args, generate)
    log_p_no, log_p_yes = log_probabilities.T
    p_yes = 1 / (1 + np.exp(log_p_no - log_p_yes))
    answers = answers or [ANSWERS[int(p > 0.5)] for p in p_yes]
    predictions = [
        exact_match(row["id"], QUESTION, answer, ANSWERS[row["label"]], label=row["label"], p_yes=p)
        for row, answer, p in zip(rows, answers, p_yes.tolist(), strict=True)
    ]
    values = {
        "auroc": auroc([prediction.more["label"] for prediction in predictions], p_yes),
        "accuracy" if generate else "accuracy_by_likelihood": accuracy([prediction.score for prediction in predictions]),
    }
    return Evaluation("auroc", values, predictions)


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
        source=str(args.data_dir or HUB[0]),
    )
    trainer.evaluate_before()
    trainer.train()
    trainer.save_result()
    trainer.evaluate_after()
    trainer.report()


if __name__ == "__main__":
    run(main)
