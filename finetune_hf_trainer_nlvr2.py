"""Finetune Phi-3.5-vision (or Phi-3-vision) on NLVR2: does a statement hold for two pictures?

    torchrun --nproc_per_node=8 finetune_hf_trainer_nlvr2.py --bf16 --use_flash_attention \\
        --batch_size 64 --learning_rate 1e-5 --num_train_epochs 3                # all weights, DeepSpeed ZeRO-2
    torchrun --nproc_per_node=4 finetune_hf_trainer_nlvr2.py --bf16 --use_lora   # LoRA
    torchrun --nproc_per_node=2 finetune_hf_trainer_nlvr2.py --data_dir DIR      # the official release's files

Metrics: accuracy and, with the official release, consistency: the share of statements that are right on all of their pairs.

Writes the model (or adapter), both evaluations, train_results.json, trainer_state.json, run.json, a model card and report.html
to --output_dir.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Image

from common.arguments import training_parser
from common.data.conversations import check_conversation
from common.data.samples import TrainingData
from common.data.shards import stream_hub
from common.data.sources import check_pictures, check_rows, load_hub, read_json_lines
from common.data.streaming import Stream, StreamedData
from common.evaluation.generation import generate_answers
from common.evaluation.metrics import accuracy, consistency, normalise_answer
from common.evaluation.predictions import Evaluation
from common.model.loading import load_model, load_processor
from common.runtime import InputError, run
from common.training.run import finetune, start

HUB = ("HuggingFaceM4/the_cauldron", "nlvr2")
HUB_EVAL_ROWS = 500
# One of the hub's eight wordings, which all begin and end so.
QUESTION = (
    "The first image is the image on the left, the second image is the image on the right. Given the left and right images, "
    'does the statement "{sentence}" hold true? Answer yes or no.'
)
ANSWERS = {"True": "Yes.", "False": "No."}  # by label


def parse_args():
    parser = training_parser(__doc__, task="NLVR2", metric="accuracy")
    group = parser.add_argument_group("NLVR2")
    group.add_argument("--data_dir", type=Path, help="official release: train.json, dev.json, images/train/ and images/dev/")
    return parser.parse_args()


class HubQuestions(Sequence):
    """The questions of the hub's rows, one by one; a pair of pictures is read, encoded, when one of its questions is.

    Parameters
    ----------
    rows : Dataset
    places : list of (int, int)
        Row and question.
    """

    def __init__(self, rows: Dataset, places: list[tuple[int, int]]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        row, question = self.places[index]
        content = self.rows[row]
        text = content["texts"][question]
        return {"id": f"{row}-{question}", "images": content["images"], "question": text["user"], "answer": text["assistant"]}


def load_hub_questions(train_limit: int | None, eval_limit: int | None) -> tuple[HubQuestions, HubQuestions]:
    """Questions of the hub's training rows: the first of each of the first 500 evaluates, all of the others train."""
    rows = load_hub(*HUB, split="train").cast_column("images", [Image(decode=False)])
    counts = [len(texts) for texts in rows["texts"]]
    eval_places = [(row, 0) for row in range(min(HUB_EVAL_ROWS, len(rows)))]
    train_places = [(row, question) for row in range(HUB_EVAL_ROWS, len(rows)) for question in range(counts[row])]
    return HubQuestions(rows, train_places[:train_limit]), HubQuestions(rows, eval_places[:eval_limit])


def stream_hub_questions(train_limit: int | None, eval_limit: int | None) -> tuple[Stream, HubQuestions]:
    """The same questions, those for training streamed, each with its row's pictures."""
    columns = ["images", "texts"]
    eval_rows = stream_hub(*HUB, columns=columns).head(HUB_EVAL_ROWS)
    before = sum(len(texts) for texts in eval_rows["texts"])
    questions = stream_hub(*HUB, columns=columns, each="texts").select(before, train_limit)
    return questions, HubQuestions(eval_rows, [(row, 0) for row in range(len(eval_rows))][:eval_limit])


def load_official(data_dir: Path, split: str, limit: int | None, tqdm: bool) -> Dataset:
    """Rows of the official release, every picture checked."""
    rows = []
    for place, row in read_json_lines(data_dir / f"{split}.json", "NLVR2"):
        identifier, sentence = row.get("identifier"), row.get("sentence")
        if not isinstance(identifier, str) or identifier.count("-") != 3:
            raise InputError(f'{place}: needs "identifier", of the form split-set-pair-sentence')
        if not isinstance(sentence, str) or str(row.get("label")) not in ANSWERS:
            raise InputError(f'{place}: needs "sentence" (a text) and "label" ("True" or "False")')
        if split == "train" and "directory" not in row:
            raise InputError(f'{place}: needs "directory", the folder below images/train/ that holds the pictures')
        pair = identifier.rpartition("-")[0]
        folder = data_dir / "images" / split / (str(row["directory"]) if split == "train" else "")
        images = [str(folder / f"{pair}-img{side}.png") for side in (0, 1)]
        question = QUESTION.format(sentence=sentence)
        rows.append({"id": identifier, "images": images, "question": question, "answer": ANSWERS[str(row["label"])]})
        check_conversation(to_conversation(rows[-1]), place)
        if len(rows) == limit:
            break
    check_pictures(sorted({image for row in rows for image in row["images"]}), tqdm)
    return Dataset.from_list(rows)


def load_rows(args) -> tuple[Sequence | Stream, Sequence]:
    if args.data_dir and args.streaming:
        raise InputError("--streaming is for the hub's shards; pictures in --data_dir are read one by one anyway: leave it out")
    if not args.data_dir:
        load = stream_hub_questions if args.streaming else load_hub_questions
        train_rows, eval_rows = load(args.max_train_samples, args.max_eval_samples)
        if not args.streaming:
            check_rows(train_rows, lambda row: [to_conversation(row)], "training row", args.tqdm)
        check_rows(eval_rows, lambda row: [to_conversation(row)], "evaluation row", args.tqdm)
        return train_rows, eval_rows
    train_rows = load_official(args.data_dir, "train", args.max_train_samples, args.tqdm)
    return train_rows, load_official(args.data_dir, "dev", args.max_eval_samples, args.tqdm)


def to_conversation(row: dict, rng: random.Random | None = None) -> dict:
    if "texts" in row:  # streamed from the hub
        user, assistant = row["texts"][0]["user"], row["texts"][0]["assistant"]
    else:
        user, assistant = row["question"], row["answer"]
    return {"conversations": [{"images": row["images"], "user": user, "assistant": assistant}]}


def statement(identifier: str) -> str:
    """What names a statement over all of its pairs: its identifier without the field of the pair."""
    split, set_number, _, sentence = identifier.split("-")
    return f"{split}-{set_number}-{sentence}"


def evaluate(model, processor, rows: Sequence, args) -> Evaluation:
    """Accuracy of the generated answer and, where identifiers tell which pairs belong together, consistency."""
    answers = generate_answers(model, processor, [to_conversation(row) for row in rows], args)
    predictions = []
    for row, answer in zip(rows, answers, strict=True):
        prediction = normalise_answer(answer)
        predictions.append(
            {
                "id": row["id"],
                "question": row["question"],
                "prediction": prediction,
                "answers": [row["answer"]],
                "score": float(prediction == normalise_answer(row["answer"])),
            }
        )
    correct = [entry["score"] for entry in predictions]
    values = {"accuracy": accuracy(correct)}
    if args.data_dir:
        values["consistency"] = consistency([statement(row["id"]) for row in rows], correct)
    return Evaluation("accuracy", values, predictions)


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
