"""Finetune Phi-3.5-vision (or Phi-3-vision) on Hateful Memes: does a meme, picture and words together, promote hate speech?

    torchrun --nproc_per_node=8 finetune_hf_trainer_hateful_memes.py --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 5e-5 --num_train_epochs 2                        # all weights, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_hateful_memes.py --bf16 --use_lora   # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_hateful_memes.py --data_dir DIR      # the official release's files

Metrics: AUROC, the data set's own, from the probabilities of the whole answers `Yes.` and `No.`; accuracy of the generated one.

Writes the model (or adapter), both evaluations, train_results.json, trainer_state.json, run.json, a model card and report.html
to --output_dir.
"""

import random
from pathlib import Path

import numpy as np
from datasets import Dataset, Image

from common.arguments import training_parser
from common.data.samples import TrainingData
from common.data.shards import stream_hub
from common.data.sources import check_pictures, check_rows, load_hub, read_json_lines
from common.data.streaming import Stream, StreamedData
from common.evaluation.generation import generate_and_compare
from common.evaluation.metrics import accuracy, auroc, normalise_answer
from common.evaluation.predictions import Evaluation
from common.model.loading import load_model, load_processor
from common.runtime import InputError, run
from common.training.run import finetune, start

HUB = ("HuggingFaceM4/the_cauldron", "hateful_memes")
HUB_EVAL_ROWS = 500
# The hub's rows ask in eleven wordings; one for all, so that models from both sources can be compared.
QUESTION = "Does this meme promote hate speech?\nAnswer yes or no."
ANSWERS = ("No.", "Yes.")  # by label


def parse_args():
    parser = training_parser(__doc__, task="Hateful Memes", metric="auroc")
    group = parser.add_argument_group("Hateful Memes")
    group.add_argument("--data_dir", type=Path, help="official release: train.jsonl, dev_seen.jsonl and img/")
    group.add_argument(
        "--eval_by_likelihood",
        action="store_true",
        help="take the likelier answer instead of generating one: faster, and labelled accuracy_by_likelihood",
    )
    return parser.parse_args()


def load_hub_rows(train_limit: int | None, eval_limit: int | None) -> tuple[Dataset, Dataset]:
    """The hub's training rows: the first 500 evaluate, as in the published recipe; pictures stay encoded."""
    rows = load_hub(*HUB, split="train").cast_column("images", [Image(decode=False)])
    eval_rows = rows.select(range(min(eval_limit or len(rows), HUB_EVAL_ROWS, len(rows))))
    train_rows = rows.select(list(range(HUB_EVAL_ROWS, min(HUB_EVAL_ROWS + (train_limit or len(rows)), len(rows)))))
    return train_rows, eval_rows


def stream_hub_rows(train_limit: int | None, eval_limit: int | None) -> tuple[Stream, Dataset]:
    """The same rows, those for training streamed."""
    rows = stream_hub(*HUB, columns=["images", "texts"])
    return rows.select(HUB_EVAL_ROWS, train_limit), rows.head(min(eval_limit or HUB_EVAL_ROWS, HUB_EVAL_ROWS))


def load_official(data_dir: Path, split: str, limit: int | None, tqdm: bool) -> Dataset:
    """Rows of the official release, every picture checked."""
    rows = []
    for place, row in read_json_lines(data_dir / f"{split}.jsonl", "Hateful Memes"):
        if not isinstance(row.get("img"), str) or row.get("label") not in (0, 1):
            raise InputError(f'{place}: needs "img" (the picture\'s name) and "label" (0 or 1)')
        rows.append({"id": str(row.get("id", len(rows))), "image": str(data_dir / row["img"]), "label": int(row["label"])})
        if len(rows) == limit:
            break
    check_pictures([row["image"] for row in rows], tqdm)
    return Dataset.from_list(rows)


def load_rows(args) -> tuple[Dataset | Stream, Dataset]:
    if args.data_dir and args.streaming:
        raise InputError("--streaming is for the hub's shards; pictures in --data_dir are read one by one anyway: leave it out")
    if args.data_dir:
        train_rows = load_official(args.data_dir, "train", args.max_train_samples, args.tqdm)
        eval_rows = load_official(args.data_dir, "dev_seen", args.max_eval_samples, args.tqdm)
    else:
        load = stream_hub_rows if args.streaming else load_hub_rows
        train_rows, eval_rows = load(args.max_train_samples, args.max_eval_samples)
        if not args.streaming:
            check_rows(train_rows, lambda row: [to_conversation(row)], "training row", args.tqdm)
        check_rows(eval_rows, lambda row: [to_conversation(row)], "evaluation row", args.tqdm)
    if len({label(row) for row in eval_rows}) < 2:
        where = args.data_dir / "dev_seen.jsonl" if args.data_dir else HUB[0]
        remedy = "raise --max_eval_samples" if args.max_eval_samples else "take a data set with both"
        raise InputError(f"AUROC needs memes of both labels, but all {len(eval_rows)} have the same: {remedy}", where)
    return train_rows, eval_rows


def label(row: dict) -> int:
    if "label" in row:
        return row["label"]
    answer = row["texts"][0]["assistant"]
    if answer not in ANSWERS:
        raise InputError(f'the answer must be "{ANSWERS[0]}" or "{ANSWERS[1]}", not "{answer}": take the row out')
    return ANSWERS.index(answer)


def to_conversation(row: dict, rng: random.Random | None = None) -> dict:
    image = row["image"] if "image" in row else row["images"][0]
    return {"conversations": [{"images": [image], "user": QUESTION, "assistant": ANSWERS[label(row)]}]}


def evaluate(model, processor, rows: Dataset, args) -> Evaluation:
    """AUROC of P(yes) / (P(yes) + P(no)); accuracy of the generated answer, or of the likelier one."""
    conversations = [to_conversation(row) for row in rows]
    generate = not args.eval_by_likelihood
    answers, log_probabilities = generate_and_compare(model, processor, conversations, ANSWERS, args, generate)
    log_p_no, log_p_yes = log_probabilities.T
    p_yes = 1 / (1 + np.exp(log_p_no - log_p_yes))
    accuracy_name = "accuracy" if generate else "accuracy_by_likelihood"
    answers = answers or [ANSWERS[int(p > 0.5)] for p in p_yes]
    predictions = []
    for number, (row, answer, p) in enumerate(zip(rows, answers, p_yes.tolist(), strict=True)):
        prediction, truth = normalise_answer(answer), ANSWERS[label(row)]
        predictions.append(
            {
                "id": row.get("id", str(number)),
                "question": QUESTION,
                "prediction": prediction,
                "answers": [truth],
                "score": float(prediction == normalise_answer(truth)),
                "label": label(row),
                "p_yes": p,
            }
        )
    values = {
        "auroc": auroc([entry["label"] for entry in predictions], p_yes),
        accuracy_name: accuracy([entry["score"] for entry in predictions]),
    }
    return Evaluation("auroc", values, predictions)


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
        source=str(args.data_dir or HUB[0]),
    )


if __name__ == "__main__":
    run(main)
