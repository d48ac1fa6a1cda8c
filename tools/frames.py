"""Convert video clips to images and a JSONL file that `finetune_hf_trainer_jsonl.py` reads.

    python -m tools.frames --clips my_clips --out_dir data/clips --question "What happens in the video?"
    python -m tools.frames --clips a.mp4 b.mp4 --table answers.csv --out_dir data/clips --num_frames 16

Folders are searched for clips, at any depth. The answer to --question is the name of a clip's folder; a --table has the columns
clip (its path in the folder, or its file name), question and answer, and may have several rows for a clip.

It writes `images/<clip>.<0-7>.jpg` and `clips.jsonl`, with a row for each question. An interrupted conversion can be resumed
with the same command; images of clips or settings that are not used any more are removed.
"""

import argparse
import csv
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from common.runtime.parser import Parser
from common.runtime.process import InputError, counted
from tools.clips import LARGEST_CLIP, add_flags, check_names, convert_clips, remove_strays, run, write_json_lines

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
TABLE_COLUMNS = {"clip", "question", "answer"}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--clips", type=Path, nargs="+", required=True, metavar="PATH", help="clips, or folders of clips")
    group.add_argument("--out_dir", type=Path, required=True, metavar="DIR", help="output folder for images/ and clips.jsonl")
    answers = group.add_mutually_exclusive_group(required=True)
    answers.add_argument("--question", help="question about every clip, whose answer is the name of its folder")
    answers.add_argument("--table", type=Path, metavar="FILE", help="CSV file with the columns clip, question and answer")
    add_flags(parser)
    return parser.parse_args()


def find_clips(places: list[Path]) -> dict[PurePosixPath, Path]:
    """Find clips; map the path of each one, relative to the folder that was searched, to its file.

    Raises
    ------
    InputError
        If a place does not exist, there are no clips, or two clips would have the same images.
    """
    found: list[tuple[PurePosixPath, Path]] = []
    for place in places:
        if not place.exists():
            raise InputError(f"--clips {place}: no such file or folder")
        found_here = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and not path.is_dir())
        for file in sorted(found_here) if place.is_dir() else [place]:
            clip = PurePosixPath(file.relative_to(place if place.is_dir() else place.parent).as_posix())
            if any(part.startswith(".") for part in clip.parts):
                continue  # metadata of macOS and editors
            if file.stat().st_size > LARGEST_CLIP:
                raise InputError(f"{file} is larger than {LARGEST_CLIP:,} bytes; cut it into shorter clips")
            found.append((clip, file))
    if not found:
        raise InputError(f"--clips {' '.join(map(str, places))}: no clips ({', '.join(SUFFIXES)})")
    check_names((clip, file.absolute()) for clip, file in found)  # a folder's name is an answer
    return dict(found)


def questions_of(clips: dict[PurePosixPath, Path], question: str, table: Path | None) -> list[tuple[PurePosixPath, str, str]]:
    """Return clip, question and answer of each row."""
    if table is None:
        return [(clip, question, Path(os.path.abspath(file)).parent.name) for clip, file in clips.items()]
    rows = list(read_clip_table(table, clips))
    if not rows:
        raise InputError(f"--table {table}: no rows")
    return rows


def read_clip_table(path: Path, clips: dict[PurePosixPath, Path]) -> Iterator[tuple[PurePosixPath, str, str]]:
    """Yield clip, question and answer of each row of a table.

    Raises
    ------
    InputError
        If the table cannot be read, or a row is incomplete or names no clip; the message names its line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            if set(table.fieldnames or ()) != TABLE_COLUMNS:
                raise InputError(f"--table {path}: expected the columns clip, question and answer in the first line")
            for row in table:
                place = f"--table {path}, line {table.line_num}"
                if None in row or not all(isinstance(text, str) and text.strip() for text in row.values()):
                    raise InputError(f"{place}: expected clip, question and answer; put quotes around texts with commas")
                clip = PurePosixPath(row["clip"].strip())
                if clip not in clips:
                    raise InputError(f"{place}: there is no clip {clip} among --clips")
                yield clip, row["question"], row["answer"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--table {path} is not a CSV file in UTF-8 ({error}); save it as one") from error


def convert(args: argparse.Namespace) -> None:
    """Convert the clips that have a question.

    Raises
    ------
    InputError
        If there are no clips or questions, or there are broken clips and ``--skip_broken`` is not set.
    """
    files = find_clips(args.clips)
    questions = questions_of(files, args.question, args.table)
    clips = dict.fromkeys(clip for clip, _, _ in questions)
    print(f"{counted(len(questions), 'question')} about {len(clips):,} of {counted(len(files), 'clip')}", flush=True)

    # Images may change from here on, so the file that lists them is removed until they are complete.
    (args.out_dir / "clips.jsonl").unlink(missing_ok=True)
    images = convert_clips({clip: files[clip].read_bytes for clip in clips}, args)
    remove_strays(args.out_dir, images)
    rows = [
        {"id": str(clip), "conversations": [{"images": images[clip], "user": question, "assistant": answer}]}
        for clip, question, answer in questions
        if clip in images
    ]
    write_json_lines(args.out_dir / "clips.jsonl", rows)
    print(f"{args.out_dir}/clips.jsonl: {counted(len(rows), 'row')}")


def main(args: argparse.Namespace) -> None:
    run(convert, args)


if __name__ == "__main__":
    main(parse_args())
