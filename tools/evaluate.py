"""Score a model or an adapter on a file of questions with answers, without training.

python -m tools.evaluate --model output/receipts --data_file val.jsonl --image_dir images --metric anls
python -m tools.evaluate --model output/receipts --data_file val.jsonl --metric anls exact --output_file scores.json

The file has any of the formats that training reads. The last turn of each row is answered, and compared with the answer in the
file. --output_file is written like eval_after.json of a training run: the metrics, and every answer with its score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.runtime.parser import check_inputs
from common.runtime.process import say
from tools.flags import check_positive, prediction_parser


def parse_args() -> argparse.Namespace:
    parser = prediction_parser(__doc__)
    parser.add_argument("--output_file", type=Path, metavar="FILE", help="JSON file to write (default: none)")
    args = parser.parse_args()
    if args.data_file is None:
        parser.error("--data_file is required")
    check_positive(parser, args)
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

from collections import Counter
from statistics import fmean

from common.evaluation.metrics import METRICS
from common.evaluation.predictions import Evaluation, Prediction, write_evaluation
from tools.predict import answer, read_questions, run_tool


def evaluate(args: argparse.Namespace) -> None:
    """Answer the questions of the data file, print the scores, and write them with ``--output_file``."""
    questions = read_questions(args.data_file, args.image_dir, args.tqdm, answered=True)
    answers = answer([question.conversation for question in questions], args)
    ids = Counter(question.conversation["id"] for question in questions)
    predictions = []
    for question, prediction in zip(questions, answers, strict=True):
        references = [question.expected or ""]
        scores = {name: METRICS[name](prediction, references) for name in args.metric}
        identifier, asked = question.conversation["id"], question.conversation["conversations"][-1]["user"]
        if not identifier or ids[identifier] > 1:
            identifier = question.place
        predictions.append(Prediction(identifier, asked, prediction, references, scores[args.metric[0]], scores))
    values = {name: fmean(entry.more[name] for entry in predictions) for name in args.metric}
    result = Evaluation(args.metric[0], values, predictions)
    print(result)
    if args.output_file:
        write_evaluation(args.output_file, result)
        say(f"all answers are in {args.output_file}")


def main(args: argparse.Namespace) -> None:
    run_tool(evaluate, args)


if __name__ == "__main__":
    main(args)
