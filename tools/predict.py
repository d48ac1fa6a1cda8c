"""Answer questions about images with a model, or with an adapter and its base model.

python -m tools.predict --model output/docvqa --images page.png --prompt "What is the total?"
python -m tools.predict --model output/nlvr2 --images left.jpg right.jpg --prompt "Do both show a dog?"
python -m tools.predict --model output/mine --data_file val.jsonl --image_dir images --output_file answers.jsonl

A data file contains conversations in the general format. The last turn of each conversation is answered; a reference
answer in the data is ignored. Each row is written to the output with the model's answer as "prediction".
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from common.data.conversations import Conversation, check_conversation, pictures, read_conversation
from common.data.pictures import check_picture, picture_path
from common.data.sources import file_faults, parse_object, read_json_lines
from common.evaluation.generation import generate_answers
from common.model.inference import load_for_inference
from common.model.loading import base_model
from common.phi3v.image_processing import MAX_CROPS
from common.runtime import InputError, limit_library_bars, say, track, write_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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

    group = parser.add_argument_group("one question")
    group.add_argument("--prompt", help="the question; <|image_1|>, <|image_2|>, … set the positions of the images")
    group.add_argument("--images", nargs="+", default=[], metavar="FILE", help="image files, in the order of their numbers")

    group = parser.add_argument_group("many questions")
    group.add_argument("--data_file", type=Path, metavar="FILE", help="JSONL file in the general format")
    group.add_argument(
        "--image_dir", type=Path, metavar="DIR", help="root folder of the image paths (default: the data file's)"
    )
    group.add_argument("--output_file", type=Path, metavar="FILE", help="JSONL file to write (default: print)")

    group = parser.add_argument_group("generation")
    group.add_argument("--eval_batch_size", type=int, default=8, metavar="N", help="prompts per batch (default: %(default)s)")
    group.add_argument(
        "--max_new_tokens", type=int, default=64, metavar="N", help="maximum answer length in tokens (default: %(default)s)"
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=2, metavar="N", help="processes that load images (default: %(default)s)"
    )
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    args = parser.parse_args()
    if (args.prompt is None) == (args.data_file is None):
        parser.error("expected either --prompt (with --images) or --data_file")
    if args.data_file and args.images:
        parser.error("--images requires --prompt; the images of a --data_file are listed in its rows")
    if args.prompt is not None and (args.image_dir or args.output_file):
        parser.error("--image_dir and --output_file require --data_file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available; omit the flag to run on the CPU")
    for name in ("eval_batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    return args


def read_rows(path: Path, image_dir: Path, bar: bool) -> list[tuple[dict[str, Any], Conversation]]:
    """Read rows, convert them to conversations with full image paths and a placeholder as last answer, and check the images.

    Raises
    ------
    InputError
        With file and line.
    """
    rows = []
    for place, line in read_json_lines(path):
        row = parse_object(line, place)
        conversation = read_conversation(row, place)
        turns = conversation["conversations"]
        turns[-1]["assistant"] = "?"
        for error in file_faults(conversation, place):
            raise error
        try:
            for turn in turns:
                turn["images"] = [picture_path(image_dir, name) for name in turn.get("images") or []]
        except InputError as error:
            raise error.at(place) from None
        rows.append((place, row, conversation))
    for place, _, conversation in track(rows, "Checking images", "rows", bar):
        check_images(conversation, place)
    return [(row, conversation) for _, row, conversation in rows]


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


def predict(args: argparse.Namespace) -> None:
    """Answer the questions that the flags give, and print or write the answers."""
    if args.data_file:
        rows = read_rows(args.data_file, args.image_dir or args.data_file.parent, args.tqdm)
    else:
        turn = {"images": args.images, "user": args.prompt, "assistant": "?"}
        rows = [({}, {"conversations": [turn]})]
        check_conversation(rows[0][1], "--prompt")
        check_images(rows[0][1], "--images")

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_for_inference(args.model, device, base=args.base)
    processor.image_processor.num_crops = args.num_crops or processor.image_processor.num_crops
    options = vars(args) | {"bf16": base_model(model).dtype == torch.bfloat16}
    options["dataloader_num_workers"] = min(args.dataloader_num_workers, len(rows) - 1)
    answers = generate_answers(model, processor, [conversation for _, conversation in rows], argparse.Namespace(**options))

    if args.prompt is not None:
        print(answers[0])
        return
    lines = [
        json.dumps(row | {"prediction": answer}, ensure_ascii=False) for (row, _), answer in zip(rows, answers, strict=True)
    ]
    if args.output_file is None:
        print("\n".join(lines))
        return
    write_file(args.output_file, "\n".join(lines) + "\n")
    print(f"Wrote {len(lines)} answers to {args.output_file}")


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from libraries, about their own dependencies
    limit_library_bars(args.tqdm)
    try:
        predict(args)
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
