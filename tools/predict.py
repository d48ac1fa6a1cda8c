"""Answer questions about images with a model, or with an adapter and its base model.

python -m tools.predict --model output/docvqa --images page.png --prompt "What is the total?"
python -m tools.predict --model output/nlvr2 --images left.jpg right.jpg --prompt "Do both show a dog?"
python -m tools.predict --model output/mine --data_file val.jsonl --image_dir images --output_file answers.jsonl

A data file has any of the formats that training reads. The last turn of each row is answered. Each row is written to the
output, as JSON, with the model's answer as "prediction" and, if the row has an answer, its "scores".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.evaluation.metrics import METRICS
from common.runtime.parser import check_inputs
from common.runtime.process import InputError, counted, fail, say
from tools.flags import check_positive, prediction_parser


def parse_args() -> argparse.Namespace:
    parser = prediction_parser(__doc__)
    group = parser.add_argument_group("one question")
    group.add_argument("--prompt", help="the question; <|image_1|>, <|image_2|>, … set the positions of the images")
    group.add_argument("--images", nargs="+", default=[], metavar="FILE", help="image files, in the order of their numbers")
    group = parser.add_argument_group("output")
    group.add_argument("--output_file", type=Path, metavar="FILE", help="JSONL file to write (default: print)")
    args = parser.parse_args()
    if (args.prompt is None) == (args.data_file is None):
        parser.error("expected either --prompt (with --images) or --data_file")
    if args.data_file and args.images:
        parser.error("--images requires --prompt; the images of a --data_file are listed in its rows")
    if args.prompt is not None and (args.image_dir or args.output_file or args.metric != ["exact"]):
        parser.error("--image_dir, --metric and --output_file require --data_file")
    check_positive(parser, args)
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

import json
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch

from common.data.conversations import Conversation, pictures
from common.data.pictures import check_picture, picture_path
from common.data.reading import check_conversation, file_faults, parse_object, read_conversation
from common.data.sources import find_image_dir, read_json_lines
from common.evaluation.generation import Answering, generate_answers
from common.model.inference import load_for_inference
from common.runtime.files import write_file
from common.runtime.progress import limit_library_bars, track


class Question(NamedTuple):
    """A row of a data file.

    Attributes
    ----------
    place : str
        File and line, for messages.
    row : dict
        The row as it is in the file.
    conversation : dict
        In the general format, with full image paths; see :mod:`common.data.conversations`.
    expected : str, optional
        Answer to the last turn.
    """

    place: str
    row: dict[str, Any]
    conversation: Conversation
    expected: str | None


def read_questions(path: Path, image_dir: Path | None, bar: bool, answered: bool = False) -> list[Question]:
    """Read the rows of a data file, and check them and their images.

    Parameters
    ----------
    path : Path
        In any of the formats that :func:`common.data.reading.read_conversation` reads, or a CSV table.
    image_dir : Path, optional
        Root folder of the image paths; by default :func:`common.data.sources.find_image_dir`, as in training.
    bar : bool
        False with ``--no-tqdm``.
    answered : bool
        Whether every row must have an answer.

    Raises
    ------
    InputError
        With file and line.
    """
    image_dir = image_dir or find_image_dir(path)
    questions = []
    for place, line in read_json_lines(path):
        row = parse_object(line, place)
        conversation = read_conversation(row, place)
        turns = conversation["conversations"]
        expected = turns[-1].get("assistant")
        if answered and not expected:
            raise InputError("the row has no answer to its last question: add it, or use tools.predict", place)
        turns[-1]["assistant"] = expected or "?"
        for error in file_faults(conversation, place):
            raise error
        try:
            for turn in turns:
                turn["images"] = [picture_path(image_dir, name) for name in turn.get("images") or []]
        except InputError as error:
            raise error.at(place) from None
        questions.append(Question(place, row, conversation, expected or None))
    for question in track(questions, "Checking images", "rows", bar):
        check_images(question.conversation, question.place)
    return questions


def check_images(conversation: Conversation, place: str) -> None:
    """Check that all images of a conversation exist and are complete, and warn of suspicious ones.

    Raises
    ------
    InputError
        With ``place`` and the image.
    """
    for picture in pictures(conversation):
        try:
            if doubt := check_picture(picture):
                say(f"warning: {place}: {doubt}")
        except InputError as error:
            raise error.at(place) from None


def answer(conversations: list[Conversation], args: argparse.Namespace) -> list[str]:
    """Load the model that the flags name, and answer the last turn of each conversation."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU is available; omit the flag to run on the CPU", "--device cuda")
    say("Loading the model")
    model, processor = load_for_inference(args.model, device, base=args.base)
    processor.image_processor.num_crops = args.num_crops or processor.image_processor.num_crops
    workers = min(args.dataloader_num_workers, len(conversations) - 1)
    settings = Answering(args.eval_batch_size, args.max_new_tokens, workers, args.tqdm)
    return generate_answers(model, processor, conversations, settings)


def predict(args: argparse.Namespace) -> None:
    """Answer the questions that the flags give, and print or write the answers."""
    if args.prompt is not None:
        turn = {"images": args.images, "user": args.prompt, "assistant": "?"}
        conversation = {"conversations": [turn]}
        check_conversation(conversation, "--prompt")
        check_images(conversation, "--images")
        print(answer([conversation], args)[0])
        return
    questions = read_questions(args.data_file, args.image_dir, args.tqdm)
    lines, scores = [], []
    answers = answer([question.conversation for question in questions], args)
    for question, prediction in zip(questions, answers, strict=True):
        row = question.row | {"prediction": prediction}
        if question.expected:
            row["scores"] = {name: METRICS[name](prediction, [question.expected]) for name in args.metric}
            scores.append(row["scores"])
        lines.append(json.dumps(row, ensure_ascii=False))
    if args.output_file is None:
        print("\n".join(lines))
    else:
        write_file(args.output_file, "\n".join(lines) + "\n")
        say(f"{counted(len(lines), 'answer')} written to {args.output_file}")
    if scores:
        means = [f"{name} {fmean(row[name] for row in scores):.4f}" for name in args.metric]
        say(f"{', '.join(means)} on {counted(len(scores), 'row')} with an answer")


def run_tool(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a tool; an input error, or a file that cannot be read or written, exits with its message and code 1."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # from libraries, about their own dependencies
    limit_library_bars(args.tqdm)
    try:
        main(args)
    except (OSError, InputError) as error:
        fail(str(error))


def main(args: argparse.Namespace) -> None:
    run_tool(predict, args)


if __name__ == "__main__":
    main(args)
