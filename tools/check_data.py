"""Check a dataset before training, without a GPU, and report all problems at once.

python -m tools.check_data --data_file data/mine/train.jsonl --image_dir data/mine/images
python -m tools.check_data --data_file data/mine/train.jsonl data/mine/val.jsonl --image_dir data/mine/images --quick

Every row is read and checked as by a training run, every image is decoded (with --quick, it is only checked as by a run), and
the tokens of every row are counted. Problems, which would end a run, make the exit code 1. Warnings point out what a run trains
on, but may be a mistake: rows or images that occur in two files or twice in one, tiny images, files without images.
"""

from __future__ import annotations

import argparse
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
from common.data.conversations import Conversation, check_context, count_tokens, read_conversation
from common.data.pictures import check_picture, decode_picture, picture_content, picture_path, picture_size
from common.data.sources import content_hash, file_faults, listed_images, parse_object, read_lines
from common.model.checkpoint import check_checkpoint
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import MAX_CROPS
from common.process import counted
from common.runtime import InputError, Progress, excerpt, limit_library_bars

LINES_AT_ONCE = 500
IMAGES_REMEMBERED = 100_000
HISTOGRAM_BINS, HISTOGRAM_WIDTH = 10, 40


@dataclass
class Row:
    """The result of checking one line.

    Attributes
    ----------
    place : str
        File and line, for messages.
    content : int, optional
        Hash of the row's images and texts, without its id; None for an invalid row.
    images : list of (str, str or bytes)
        Name of each usable image, and its identity: the hash of its content or, with ``--quick``, its resolved path.
    num_images : int
    num_tokens : int, optional
        None if the row is invalid or one of its images is unusable.
    problems, warnings : list of (str, str)
        Kind and message of each problem or warning.
    """

    place: str
    content: int | None = None
    images: list[tuple[str, str | bytes]] = field(default_factory=list)
    num_images: int = 0
    num_tokens: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """The result of checking all files.

    Attributes
    ----------
    num_rows, num_images : Counter
        Number of rows and of their images by file.
    tokens : list of int
        Number of tokens of each row without problems.
    problems, warnings : list of (str, str)
        Kind and message of each problem or warning.
    """

    num_rows: Counter[Path] = field(default_factory=Counter)
    num_images: Counter[Path] = field(default_factory=Counter)
    tokens: list[int] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("data")
    group.add_argument("--data_file", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files or JSON arrays")
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
    group.add_argument("--quick", action="store_true", help="check images as a run does, without decoding them")
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
        Check the images as a training run does, without decoding them.
    """

    def __init__(self, processor: Phi3VProcessor, max_length: int | None, quick: bool) -> None:
        self.processor, self.max_length, self.quick = processor, max_length, quick
        self.check_image = lru_cache(IMAGES_REMEMBERED)(self._check_image)

    def check(self, lines: list[tuple[str, bytes]], image_dir: Path) -> list[Row]:
        """Check lines of a file, given as pairs of place and content."""
        rows: list[Row] = []
        usable: list[tuple[Row, Conversation, list[int]]] = []
        for place, line in lines:
            row = Row(place)
            rows.append(row)
            try:
                conversation = read_conversation(parse_object(line, place), place)
            except InputError as error:
                row.problems.append(("invalid row", str(error)))
                continue
            row.problems += [("invalid row", str(error)) for error in file_faults(conversation, place)]
            image_tokens = []
            for name in listed_images(conversation):
                if not isinstance(name, str):
                    continue
                row.num_images += 1
                try:
                    num_tokens, identity, doubt = self.check_image(picture_path(image_dir, name))
                except InputError as error:
                    row.problems.append(("unusable image", f"{place}: {error}"))
                    continue
                image_tokens.append(num_tokens)
                row.images.append((name, identity))
                row.warnings += [("suspicious image", f"{place}: {doubt}")] if doubt else []
            if not row.problems:
                row.content = content_hash([conversation], [identity for _, identity in row.images])
                usable.append((row, conversation, image_tokens))
        if usable:
            self._count_tokens(usable)
        return rows

    def _count_tokens(self, usable: list[tuple[Row, Conversation, list[int]]]) -> None:
        rows, conversations, image_tokens = zip(*usable, strict=True)
        counts = count_tokens(conversations, image_tokens, (row.place for row in rows), self.processor)
        for row, count in zip(rows, counts, strict=True):
            row.num_tokens = count
            try:
                check_context(count, self.processor)
                if self.max_length is not None and count > self.max_length:
                    raise InputError(f"{count:,} tokens exceed --max_length {self.max_length:,}")
            except InputError as error:
                row.problems.append(("row too long", str(error.at(row.place))))

    def _check_image(self, image: str) -> tuple[int, str | bytes, str | None]:
        """Return tokens, identity and what is suspicious of an image."""
        doubt = check_picture(image)
        if not self.quick:
            decode_picture(image)
        identity = os.path.realpath(image) if self.quick else picture_content(image)
        return self.processor.image_processor.num_tokens(*picture_size(image)), identity, doubt


_checker: Checker | None = None  # set in worker processes


def start_worker(checker: Checker) -> None:
    """Set up a worker process: it ignores Ctrl-C, and exits with the main process even if that is killed."""
    global _checker
    _checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    parent = parent_process()
    assert parent

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def check_lines(image_dir: Path, lines: list[tuple[str, bytes]]) -> list[Row]:
    """Check lines of a file in a worker process."""
    assert _checker
    return _checker.check(lines, image_dir)


def read_chunks(files: list[Path]) -> Iterator[tuple[Path, list[tuple[str, bytes]]]]:
    """Yield the lines of each file in chunks, with their places."""
    for path in files:
        lines = read_lines(path)
        while chunk := list(islice(lines, LINES_AT_ONCE)):
            yield path, chunk


def check_in_parallel(
    files: list[Path], image_dir: Path | None, checker: Checker, bar: bool
) -> Iterator[tuple[Path, list[Row]]]:
    """Check all lines in parallel, yield the results in order, and show the progress."""
    total = sum(path.stat().st_size for path in files)
    pending: deque[tuple[Path, int, Future]] = deque()
    # With "fork", workers inherit the checker and the imported libraries; importing again takes longer than most checks.
    num_workers = os.cpu_count() or 1
    pool = ProcessPoolExecutor(num_workers, get_context("fork"), start_worker, (checker,))
    with pool, Progress("Checking data", "bytes", total, bar) as progress:
        batches = read_chunks(files)
        while True:
            for path, lines in islice(batches, 2 * num_workers - len(pending)):
                future = pool.submit(check_lines, image_dir or path.parent, lines)
                pending.append((path, sum(len(line) for _, line in lines), future))
            if not pending:
                progress.update(total - progress.done)
                return
            path, size, future = pending.popleft()
            yield path, future.result()
            progress.update(min(size, total - progress.done - 1))  # the size of a row in a JSON array is not exact


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
    first_rows: dict[int, tuple[Path, str]] = {}
    first_files: dict[str | bytes, Path] = {}
    shared_images: dict[tuple[Path, Path], set[str | bytes]] = {}
    examples: dict[tuple[Path, Path], str] = {}
    for path, rows in check_in_parallel(files, image_dir, checker, bar):
        report.num_rows[path] += len(rows)
        for row in rows:
            report.num_images[path] += row.num_images
            report.problems += row.problems
            report.warnings += row.warnings
            if row.num_tokens is not None:
                report.tokens.append(row.num_tokens)
            for name, identity in row.images:
                if (first_path := first_files.setdefault(identity, path)) != path:
                    shared_images.setdefault((path, first_path), set()).add(identity)
                    examples.setdefault((path, first_path), f"{row.place}: {excerpt(name)}")
            if row.content is not None:
                first_path, first_place = first_rows.setdefault(row.content, (path, row.place))
                if first_place != row.place:
                    kind = "duplicate row" if first_path == path else "row in two files"
                    report.warnings.append((kind, f"{row.place}: same images and texts as {first_place}"))
    for (path, first_path), images in shared_images.items():
        message = f"{len(images):,} images of {path} are also in {first_path}, for example {examples[path, first_path]}"
        report.warnings.append(("images in two files", message))
    for path in files:
        if not report.num_rows[path]:
            report.problems.append(("empty file", f"{path}: no rows"))
        elif not report.num_images[path]:
            report.warnings.append(("no images", f"{path}: no row has an image"))
    return report


def print_report(report: Report) -> None:
    """Print the counts, token statistics and all problems."""
    for path, num_rows in report.num_rows.items():
        print(f"{path}: {counted(num_rows, 'row')}")
    print(counted(report.num_images.total(), "image"))
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
    for name, entries in (("problem", report.problems), ("warning", report.warnings)):
        kinds = Counter(kind for kind, _ in entries)
        summary = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
        print(f"{len(entries):,} {name}{'s' * (len(entries) > 1)}: {summary}" if entries else f"No {name}s.")
        for kind, message in entries:
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
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    print_report(report)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
