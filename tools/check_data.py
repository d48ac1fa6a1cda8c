"""Check a dataset before training, without a GPU, and report all problems at once.

python -m tools.check_data --data_file data/mine/train.jsonl --image_dir data/mine/images
python -m tools.check_data --data_file data/mine/train.jsonl data/mine/val.jsonl --image_dir data/mine/images --quick

Every row is validated against the general format, every image is decoded (with --quick, only its header is read), and
the tokens of every row are counted as in training. Duplicate rows, with the same images and texts, are found within a
file and across files. The exit code is 1 if there is any problem.
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
from common.data.pictures import decode_picture, open_picture, picture_path
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
    """The result of checking one line.

    Attributes
    ----------
    place : str
        File and line, for messages.
    content : bytes, optional
        Hash of the row's images and texts, without its id; None for an invalid row.
    num_pictures : int
    num_tokens : int, optional
        None if the row is invalid or one of its images is unusable.
    problems : list of (str, str)
        Kind and message of each problem.
    """

    place: str
    content: bytes | None = None
    num_pictures: int = 0
    num_tokens: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """The result of checking all files.

    Attributes
    ----------
    num_rows : Counter
        Number of rows by file.
    num_pictures : int
    tokens : list of int
        Number of tokens of each row without problems.
    problems : list of (str, str)
        Kind and message of each problem.
    """

    num_rows: Counter[Path] = field(default_factory=Counter)
    num_pictures: int = 0
    tokens: list[int] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data_file", type=Path, nargs="+", required=True, metavar="FILE", help="one or more JSONL files")
    group.add_argument("--image_dir", type=Path, help="root folder of the image paths (default: the data file's folder)")

    group = parser.add_argument_group("tokens")
    group.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="model whose tokens are counted (default: %(default)s)"
    )
    group.add_argument(
        "--num_crops",
        type=int,
        default=4,
        choices=range(1, MAX_CROPS + 1),
        metavar="N",
        help=f"maximum number of crops per image, 1 to {MAX_CROPS} (default: %(default)s, as in the UCF-101 script; "
        "the other training scripts default to 16). Use the same value as the training run",
    )
    group.add_argument("--max_length", type=int, metavar="TOKENS", help="report rows with more tokens (default: no limit)")

    group = parser.add_argument_group("running")
    group.add_argument("--quick", action="store_true", help="only read the images' headers, without decoding them")
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    args = parser.parse_args()
    if len({path.resolve() for path in args.data_file}) < len(args.data_file):
        parser.error("--data_file contains the same file twice")
    return args


class Checker:
    """Checks lines in a worker process.

    Parameters
    ----------
    processor : Phi3VProcessor
        Counts the tokens.
    max_length : int, optional
        Maximum number of tokens of a row; a longer row is a problem.
    quick : bool
        Read the sizes of the images without decoding them.
    """

    def __init__(self, processor: Phi3VProcessor, max_length: int | None, quick: bool) -> None:
        self.processor, self.max_length, self.quick = processor, max_length, quick
        self.count_picture_tokens = lru_cache(PICTURES_REMEMBERED)(self._count_picture_tokens)

    def check(self, lines: list[tuple[str, bytes]], image_dir: Path) -> list[Row]:
        """Check lines of a file, given as pairs of place and content."""
        rows, usable = [], []
        for place, line in lines:
            try:
                conversation = parse_object(line, place)
            except InputError as error:
                rows.append(Row(place, problems=[("invalid row", str(error))]))
                continue
            faults = list(row_faults(conversation, place))
            images = [name for name in picture_names(conversation) if isinstance(name, str)]
            image_tokens = [self.count_picture_tokens(image_dir, name) for name in images]
            errors = [error for error in image_tokens if isinstance(error, InputError)]
            problems = [("invalid row", str(fault)) for fault in faults]
            problems += [("unusable image", f"{place}: {error}") for error in errors]
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
                message = f"{row.place}: {row.num_tokens:,} tokens exceed --max_length {self.max_length:,}"
                row.problems.append(("row too long", message))

    def _count_picture_tokens(self, image_dir: Path, name: str) -> int | InputError:
        try:
            image = picture_path(image_dir, name)
            with open_picture(image) if self.quick else decode_picture(image) as picture:
                return self.processor.image_processor.num_tokens(*picture.size)
        except InputError as error:
            return error


def row_content(conversation: Conversation, image_dir: Path) -> bytes:
    """Hash a row's texts and the resolved paths of its images, to find duplicates."""
    turns = [
        (
            [os.path.realpath(os.path.join(image_dir, name)) for name in turn.get("images") or []],
            turn["user"],
            turn["assistant"],
        )
        for turn in conversation["conversations"]
    ]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


_checker: Checker | None = None  # set in worker processes


def start_worker(checker: Checker) -> None:
    """Set up a worker process: it ignores Ctrl-C, and exits with the main process even if that is killed."""
    global _checker
    _checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_lines(path: Path, image_dir: Path, lines: list[tuple[int, bytes]]) -> list[Row]:
    """Check numbered lines of a file in a worker process; blank lines are skipped."""
    return _checker.check([(f"{path}, line {number}", line) for number, line in lines if line.strip()], image_dir)


def read_lines(files: list[Path]) -> Iterator[tuple[Path, list[tuple[int, bytes]]]]:
    """Yield the numbered lines of each file in chunks."""
    for path in files:
        with path.open("rb") as file:
            numbered = enumerate(file, start=1)
            while lines := list(islice(numbered, LINES_AT_ONCE)):
                yield path, lines


def check_in_parallel(
    files: list[Path], image_dir: Path | None, checker: Checker, bar: bool
) -> Iterator[tuple[Path, list[Row]]]:
    """Check all lines in parallel, yield the results in order, and show the progress."""
    total = sum(path.stat().st_size for path in files)
    pending: deque[tuple[Path, int, Future]] = deque()
    # With "fork", workers inherit the checker and the imported libraries; importing again takes longer than most checks.
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
    """Check all rows and images of the given files.

    Parameters
    ----------
    files : list of Path
        JSONL files in the general format.
    image_dir : Path, optional
        Root folder of the image paths; by default the folder of each file.
    bar : bool
        Show progress bars; False for ``--no-tqdm``.
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
                    kind = "duplicate row" if first_path == path else "row in two files"
                    report.problems.append((kind, f"{row.place}: same images and texts as {first_place}"))
    report.problems += [("empty file", f"{path}: no rows") for path in files if not report.num_rows[path]]
    return report


def print_report(report: Report) -> None:
    """Print the counts, token statistics and all problems."""
    for path, num_rows in report.num_rows.items():
        print(f"{path}: {num_rows:,} rows")
    print(f"{report.num_pictures:,} images")
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
