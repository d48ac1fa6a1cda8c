"""Read a data set before any GPU is rented, and report everything that is wrong with it at once.

python -m tools.check_data --data_file data/mine/train.jsonl --image_dir data/mine/images
python -m tools.check_data --data_file data/mine/train.jsonl data/mine/val.jsonl --image_dir data/mine/images --quick

Every row is checked against the general format, every picture is decoded (with --quick: found and its size read), and
every row's tokens are counted as training counts them. Rows that say the same, pictures and texts alike, are found
within a file and across files. The exit code is 1 if there is any problem.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np

from common.arguments import DEFAULT_MODEL
from common.data.conversations import Conversation, count_tokens
from common.data.pictures import decode_picture, open_picture
from common.data.sources import parse_object, picture_names, row_faults
from common.model.checkpoint import check_checkpoint
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import MAX_CROPS
from common.runtime import InputError, Progress, limit_library_bars

LINES_AT_ONCE = 500
PICTURES_REMEMBERED = 100_000
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 10, 40


@dataclass
class Row:
    """What was found in one line.

    Attributes
    ----------
    place : str
        File and line, for messages.
    content : bytes, optional
        The same for rows with the same pictures and texts, whatever their ids; None for an invalid row.
    num_pictures : int
    num_tokens : int, optional
        None if the row is invalid or one of its pictures unusable.
    problems : list of (str, str)
        Kind and message of each.
    """

    place: str
    content: bytes | None = None
    num_pictures: int = 0
    num_tokens: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What was found in all files: rows of each, pictures, tokens of every row that has them, problems as in a row."""

    num_rows: Counter[Path] = field(default_factory=Counter)
    num_pictures: int = 0
    tokens: list[int] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data_file", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL file, or several")
    group.add_argument("--image_dir", type=Path, help="folder that picture names start from (default: the file's own)")

    group = parser.add_argument_group("tokens")
    group.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help="whose tokens to count (default: %(default)s)")
    group.add_argument(
        "--num_crops",
        type=int,
        default=4,
        choices=range(1, MAX_CROPS + 1),
        metavar="N",
        help=f"most crops a picture is cut into, 1 to {MAX_CROPS}, as in training (default: %(default)s)",
    )
    group.add_argument("--max_length", type=int, metavar="TOKENS", help="report rows beyond it (default: no limit)")

    group = parser.add_argument_group("running")
    group.add_argument("--quick", action="store_true", help="look for pictures and read their sizes, decode none")
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="plain lines instead of progress bars")
    args = parser.parse_args()
    if len({path.resolve() for path in args.data_file}) < len(args.data_file):
        parser.error("--data_file names a file twice, whose rows would all be in two files")
    return args


class Checker:
    """Checks lines, in a process of its own.

    Parameters
    ----------
    processor : Phi3VProcessor
        Counts the tokens.
    max_length : int, optional
        Tokens beyond which a row is a problem.
    quick : bool
        Read pictures' sizes without decoding them.
    """

    def __init__(self, processor: Phi3VProcessor, max_length: int | None, quick: bool) -> None:
        self.processor, self.max_length, self.quick = processor, max_length, quick
        self.count_picture_tokens = lru_cache(PICTURES_REMEMBERED)(self._count_picture_tokens)

    def check(self, lines: list[tuple[str, bytes]], image_dir: Path) -> list[Row]:
        """Check some lines of a file, each with its place."""
        rows, usable = [], []
        for place, line in lines:
            try:
                conversation = parse_object(line, place)
            except InputError as error:
                rows.append(Row(place, problems=[("invalid row", str(error))]))
                continue
            faults = list(row_faults(conversation, place))
            images = [os.path.join(image_dir, name) for name in picture_names(conversation) if isinstance(name, str)]
            image_tokens = [self.count_picture_tokens(image) for image in images]
            errors = [error for error in image_tokens if isinstance(error, InputError)]
            problems = [("invalid row", str(fault)) for fault in faults]
            problems += [("unusable picture", f"{place}: {error}") for error in errors]
            content = None if faults else row_content(conversation, image_dir)
            rows.append(Row(place, content, len(images), problems=problems))
            if not problems:
                usable.append((rows[-1], conversation, image_tokens))
        self._count_tokens(usable)
        return rows

    def _count_tokens(self, usable: list[tuple[Row, Conversation, list[int]]]) -> None:
        if not usable:
            return
        rows, conversations, image_tokens = zip(*usable, strict=True)
        counts = count_tokens(conversations, image_tokens, (row.place for row in rows), self.processor)
        for row, row.num_tokens in zip(rows, counts, strict=True):
            if self.max_length is not None and row.num_tokens > self.max_length:
                message = f"{row.place}: {row.num_tokens:,} tokens are more than --max_length {self.max_length:,}"
                row.problems.append(("row too long", message))

    def _count_picture_tokens(self, image: str) -> int | InputError:
        try:
            with open_picture(image) if self.quick else decode_picture(image) as picture:
                return self.processor.image_processor.num_tokens(*picture.size)
        except InputError as error:
            return error


def row_content(conversation: Conversation, image_dir: Path) -> bytes:
    """What tells a row from others: its texts, and its pictures' files wherever they are named from."""
    turns = [
        (
            [os.path.realpath(os.path.join(image_dir, name)) for name in turn.get("images") or []],
            turn["user"],
            turn["assistant"],
        )
        for turn in conversation["conversations"]
    ]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


_checker: Checker | None = None  # of a worker process


def start_worker(checker: Checker) -> None:
    """Give a worker process its checker, leave Ctrl-C to the main process, and end with it even when it is killed."""
    global _checker
    _checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_lines(path: Path, image_dir: Path, lines: list[tuple[int, bytes]]) -> list[Row]:
    """Check some numbered lines of a file, in a worker process; blank ones are no rows."""
    return _checker.check([(f"{path}, line {number}", line) for number, line in lines if line.strip()], image_dir)


def read_lines(files: list[Path]) -> Iterator[tuple[Path, list[tuple[int, bytes]]]]:
    """Give each file's numbered lines, some at once."""
    for path in files:
        with path.open("rb") as file:
            numbered = enumerate(file, start=1)
            while lines := list(islice(numbered, LINES_AT_ONCE)):
                yield path, lines


def check_in_parallel(
    files: list[Path], image_dir: Path | None, checker: Checker, bar: bool
) -> Iterator[tuple[Path, list[Row]]]:
    """Check all lines in parallel and give what was found in their order, showing how far it got."""
    total = sum(path.stat().st_size for path in files)
    pending: deque[tuple[Path, int, Future]] = deque()
    # "fork" hands workers the checker and all libraries as they are; importing these anew takes longer than most checks.
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("fork"), start_worker, (checker,))
    with pool, Progress("Checking data", "bytes", total, bar) as progress:
        batches = read_lines(files)
        while True:
            for path, lines in islice(batches, 2 * os.cpu_count() - len(pending)):
                future = pool.submit(check_lines, path, image_dir or path.parent, lines)
                pending.append((path, sum(len(line) for _, line in lines), future))
            if not pending:
                return
            path, size, future = pending.popleft()
            yield path, future.result()
            progress.update(size)


def check_files(files: list[Path], image_dir: Path | None, checker: Checker, bar: bool = True) -> Report:
    """Check all rows and pictures of some files.

    Parameters
    ----------
    files : list of Path
        JSONL files in the general format.
    image_dir : Path, optional
        Folder that picture names start from; each file's own by default.
    bar : bool
        False for ``--no-tqdm``.
    """
    report = Report()
    first_places: dict[bytes, tuple[Path, str]] = {}
    for path, rows in check_in_parallel(files, image_dir, checker, bar):
        report.num_rows[path] += len(rows)
        for row in rows:
            report.num_pictures += row.num_pictures
            report.problems += row.problems
            if row.num_tokens is not None:
                report.tokens.append(row.num_tokens)
            if row.content is not None:
                first_path, first_place = first_places.setdefault(row.content, (path, row.place))
                if first_place != row.place:
                    kind = "repeated row" if first_path == path else "row in two files"
                    report.problems.append((kind, f"{row.place}: the same pictures and texts as {first_place}"))
    report.problems += [("empty file", f"{path}: no rows") for path in files if not report.num_rows[path]]
    return report


def print_report(report: Report) -> None:
    """Print counts, token statistics and every problem."""
    for path, num_rows in report.num_rows.items():
        print(f"{path}: {num_rows:,} rows")
    print(f"{report.num_pictures:,} pictures")
    if report.tokens:
        tokens = np.array(report.tokens)
        low, high = int(tokens.min()), int(tokens.max())
        print(
            f"Tokens per row: minimum {low:,}, mean {tokens.mean():,.1f}, 95 % {np.percentile(tokens, 95):,.0f}, "
            f"maximum {high:,}"
        )
        width = (high - low) // HISTOGRAM_BINS + 1
        counts, edges = np.histogram(tokens, bins=np.arange(low, high + width + 1, width))
        for count, edge in zip(counts, edges, strict=False):
            bar = "#" * -(-int(count) * HISTOGRAM_WIDTH // int(counts.max()))
            print(f"  {edge:>9,} to {edge + width - 1:>9,}  {bar:{HISTOGRAM_WIDTH}}  {count:,}")
    if not report.problems:
        print("No problems.")
        return
    kinds = Counter(kind for kind, _ in report.problems)
    count = len(report.problems)
    print(f"{count:,} problem{'s' * (count > 1)}: " + ", ".join(f"{kind} {times:,}" for kind, times in kinds.items()))
    for kind, message in report.problems:
        print(f"  {kind}: {message}")


def main() -> None:
    args = parse_args()
    for path in args.data_file:
        if not path.is_file():
            sys.exit(f"error: --data_file {path}: no such file")
    if args.image_dir and not args.image_dir.is_dir():
        sys.exit(f"error: --image_dir {args.image_dir}: no such folder")
    limit_library_bars(args.tqdm)
    try:
        check_checkpoint(args.model_name_or_path, "--model_name_or_path")
        processor = Phi3VProcessor.from_pretrained(args.model_name_or_path, num_crops=args.num_crops)
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")
    checker = Checker(processor, args.max_length, args.quick)
    try:
        report = check_files(args.data_file, args.image_dir, checker, args.tqdm)
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    print_report(report)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
