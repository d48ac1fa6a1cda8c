"""Evaluation of a model or adapter without training (``--eval_only``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from torch import nn

from common.arguments import Setup
from common.data.rows import Rows, skipped_rows
from common.evaluation.predictions import Evaluation, write_evaluation
from common.model.inference import load_for_inference
from common.model.loading import DTYPES
from common.phi3v import Phi3VProcessor
from common.runtime.collectives import on_main_process, set_timeout
from common.runtime.process import say

from .output import note_skipped_rows

RESULT = "evaluation.json"


def evaluate_only(
    args: argparse.Namespace,
    setup: Setup,
    rows: Rows,
    evaluate: Callable[[nn.Module, Phi3VProcessor, Rows, argparse.Namespace], Evaluation],
) -> None:
    """Evaluate the model or adapter ``--model_name_or_path``, print its metrics, and write ``evaluation.json``.

    Images have ``--num_crops`` crops, as in a training run with the same flags, whatever is saved with the model.

    Raises
    ------
    InputError
        If the model or adapter, or the base of the adapter, is missing or invalid.
    """
    say("Loading the model")
    model, processor = load_for_inference(args.model_name_or_path, setup.device, DTYPES[setup.precision])
    saved = processor.image_processor.num_crops
    if saved != args.num_crops:
        say(f"warning: evaluating with --num_crops {args.num_crops}, but {args.model_name_or_path} was saved with {saved}")
        processor.image_processor.num_crops = args.num_crops
    set_timeout(args.ddp_timeout)
    result = evaluate(model, processor, rows, args)
    on_main_process(lambda: note_skipped_rows(args.output_dir, skipped_rows))
    write_evaluation(args.output_dir / RESULT, result)
    say(f"{result}; all answers are in {args.output_dir / RESULT}", sys.stdout)
