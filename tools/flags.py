"""Flags that tools.predict and tools.evaluate share. Imports nothing heavy, so that a wrong flag is reported at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.arguments import MAX_CROPS
from common.evaluation.metrics import METRICS
from common.runtime.parser import Parser


def prediction_parser(description: str | None) -> Parser:
    """Create a parser of the flags for a model, a data file and generation."""
    parser = Parser(description)
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="directory or Hub id of a model or an adapter")
    group.add_argument("--base", metavar="DIR", help="directory or Hub id of an adapter's base (default: from the adapter)")
    group.add_argument("--device", choices=("cuda", "cpu"), help="device to run on (default: cuda if available)")
    group.add_argument(
        "--num_crops",
        type=int,
        choices=range(1, MAX_CROPS + 1),
        metavar="N",
        help=f"maximum number of crops per image, 1 to {MAX_CROPS} (default: as saved with the model)",
    )

    group = parser.add_argument_group("data file")
    group.add_argument("--data_file", type=Path, metavar="FILE", help="JSON Lines, JSON or CSV file, as for training")
    group.add_argument(
        "--image_dir",
        type=Path,
        metavar="DIR",
        help="root folder of the image paths (default: the file's or, if its first image is not there, images/ in it)",
    )
    group.add_argument(
        "--metric", nargs="+", choices=METRICS, default=["exact"], help="how answers are scored (default: exact)"
    )

    group = parser.add_argument_group("generation")
    group.add_argument("--eval_batch_size", type=int, default=8, metavar="N", help="prompts per batch (default: %(default)s)")
    group.add_argument(
        "--max_new_tokens", type=int, metavar="N", help="maximum answer length in tokens (default: 64, or that of the answers)"
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=2, metavar="N", help="processes that load images (default: %(default)s)"
    )
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    return parser


def check_positive(parser: Parser, args: argparse.Namespace) -> None:
    """End the program if a flag is below its least value, or the output cannot be a file, which is written last."""
    for name, least in (("eval_batch_size", 1), ("max_new_tokens", 1), ("dataloader_num_workers", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if args.output_file is not None and args.output_file.is_dir():
        parser.error(f"--output_file {args.output_file} is a folder: add the name of a file")
