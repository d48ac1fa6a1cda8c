"""Check a dataset before training, without a GPU: report all problems at once, and what a person would notice.

python -m tools.check_data --data_file data/mine/train.jsonl --image_dir data/mine/images
python -m tools.check_data --data_file data/mine/train.jsonl data/mine/val.jsonl --contact_sheet sheet.html
python -m tools.check_data --data_file data/mine/train.jsonl --image_dir data/mine/images --quick

Every row is read and checked as by a training run, every image is decoded (with --quick, it is only checked as by a run), and
the tokens of every row are counted. Problems, which would end a run, make the exit code 1. Warnings point out what a run trains
on, but may be a mistake: rows or images that occur in two files or twice in one, images that look alike in two files, tiny
images, files without images, answers longer than --max_new_tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.arguments import DEFAULT_MODEL, MAX_CROPS
from common.runtime.parser import Parser, check_inputs
from common.runtime.process import InputError, counted, excerpt, fail, say


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_file", type=Path, nargs="+", required=True, metavar="FILE", help="JSON Lines files, JSON arrays or CSV tables"
    )
    group.add_argument(
        "--image_dir",
        type=Path,
        help="root folder of the image paths (default: the file's or, if its first image is not there, images/ in it)",
    )

    group = parser.add_argument_group("tokens")
    group.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="model whose tokens are counted (default: %(default)s)"
    )
    group.add_argument(
        "--num_crops",
        type=int,
        default=16,
        choices=range(1, MAX_CROPS + 1),
        metavar="N",
        help=f"maximum number of crops per image, 1 to {MAX_CROPS}, as in the training run (default: %(default)s)",
    )
    group.add_argument("--max_length", type=int, metavar="TOKENS", help="report rows with more tokens (default: no limit)")
    group.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="TOKENS",
        help="warn of answers that are longer than a run with this flag generates",
    )

    group = parser.add_argument_group("running")
    group.add_argument("--quick", action="store_true", help="check images as a run does, without decoding or comparing them")
    group.add_argument(
        "--contact_sheet", type=Path, metavar="FILE", help="write an HTML page that shows images as the model sees them"
    )
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    args = parser.parse_args()
    if len({path.resolve() for path in args.data_file}) < len(args.data_file):
        parser.error("--data_file contains the same file twice")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from common.data.formats import describe_format
from common.model.checks import check_checkpoint
from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import CROP_SIZE
from common.runtime.progress import limit_library_bars
from tools.checker import CheckedImage, CheckedRow, Checker, check_in_parallel
from tools.contact_sheet import write_contact_sheet
from tools.similar_images import similar_pairs

HISTOGRAM_BINS, HISTOGRAM_WIDTH = 10, 40
ELONGATED = 4  # sides of an image
MAX_COMPARED = 20_000  # images that are compared by their looks, which takes time that grows with the square


@dataclass
class Report:
    """The result of checking all files.

    Attributes
    ----------
    num_rows, num_images : Counter
        Number of rows and of their images by file.
    images_per_row : Counter
        Number of rows by the number of their images.
    images : dict
        Name, facts, file and first row of each distinct image, by its identity.
    answers : Counter
        Number of rows by the answer to their last turn.
    longest : tuple of (int, str)
        Tokens of the longest answer, and the place of its row.
    tokens : list of int
        Number of tokens of each row without problems.
    num_alike : int
        Number of pairs of images that look alike; if all do, these are millions.
    alike : tuple of (str or bytes), optional
        Identities of the first pair.
    problems, warnings : list of (str, str)
        Kind and message of each problem or warning.
    """

    num_rows: Counter[Path] = field(default_factory=Counter)
    num_images: Counter[Path] = field(default_factory=Counter)
    images_per_row: Counter[int] = field(default_factory=Counter)
    images: dict[str | bytes, tuple[str, CheckedImage, Path, CheckedRow]] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    longest: tuple[int, str] = (0, "")
    tokens: list[int] = field(default_factory=list)
    num_alike: int = 0
    alike: tuple[str | bytes, str | bytes] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def check_files(
    files: list[Path], image_dir: Path | None, checker: Checker, bar: bool = True, max_new_tokens: int | None = None
) -> Report:
    """Check all rows and images of the given files.

    Parameters
    ----------
    files : list of Path
        Files in the general format.
    image_dir : Path, optional
        Root folder of the image paths; by default :func:`common.data.sources.find_image_dir` of each file.
    bar : bool
        Show progress bars; False for ``--no-tqdm``.
    max_new_tokens : int, optional
        Warn of longer answers.
    """
    report = Report()
    first_rows: dict[int, tuple[Path, str]] = {}
    shared_images: dict[tuple[Path, Path], dict[str | bytes, str]] = {}
    too_long: list[str] = []
    for path, rows in check_in_parallel(files, image_dir, checker, bar):
        report.num_rows[path] += len(rows)
        for row in rows:
            report.num_images[path] += row.num_images
            report.problems += row.problems
            report.warnings += row.warnings
            if row.num_tokens is not None and row.answer_tokens is not None:
                report.tokens.append(row.num_tokens)
                report.images_per_row[len(row.images)] += 1
                report.answers[row.answer.strip()] += 1
                report.longest = max(report.longest, (row.answer_tokens, row.place), key=lambda entry: entry[0])
                if max_new_tokens and row.answer_tokens > max_new_tokens:
                    too_long.append(row.place)
            for name, image in row.images:
                first_path = report.images.setdefault(image.identity, (name, image, path, row))[2]
                if first_path != path:
                    shared_images.setdefault((path, first_path), {}).setdefault(image.identity, f"{row.place}: {excerpt(name)}")
            if row.content is not None:
                first_path, first_place = first_rows.setdefault(row.content, (path, row.place))
                if first_place != row.place:
                    kind = "duplicate row" if first_path == path else "row in two files"
                    report.warnings.append((kind, f"{row.place}: same images and texts as {first_place}"))
    for (path, first_path), shared in shared_images.items():
        what = f"{len(shared):,} images of {path} are" if len(shared) > 1 else f"1 image of {path} is"
        message = f"{what} also in {first_path}, for example {next(iter(shared.values()))}"
        report.warnings.append(("images in two files", message))
    report.warnings += compare_looks(report)
    if too_long:
        message = f"{counted(len(too_long), 'answer')} longer than --max_new_tokens {max_new_tokens}, for example {too_long[0]}"
        report.warnings.append(("long answers", message))
    for path in files:
        if not report.num_rows[path]:
            report.problems.append(("empty file", f"{path}: no rows"))
        elif not report.num_images[path]:
            report.warnings.append(("no images", f"{path}: no row has an image"))
    return report


def compare_looks(report: Report) -> Iterator[tuple[str, str]]:
    """Find images that look alike, and yield a warning for each pair of files that have such images."""
    compared = [image for _, image, _, _ in report.images.values() if image.look is not None][:MAX_COMPARED]
    files = list(dict.fromkeys(path for _, _, path, _ in report.images.values()))
    file_of = np.array([files.index(report.images[image.identity][2]) for image in compared], dtype=np.int64)
    in_two_files: dict[tuple[Path, Path], tuple[int, str]] = {}  # number of pairs, and an example
    for pairs in similar_pairs([image.look for image in compared if image.look is not None]):
        report.num_alike += len(pairs)
        if len(pairs) and not report.alike:
            report.alike = compared[pairs[0, 0]].identity, compared[pairs[0, 1]].identity
        of_two = pairs[file_of[pairs[:, 0]] != file_of[pairs[:, 1]]]
        combinations = file_of[of_two[:, 0]] * len(files) + file_of[of_two[:, 1]]
        for example, count in zip(*np.unique(combinations, return_index=True, return_counts=True)[1:], strict=True):
            (name, _, path, _), (other_name, _, other_path, row) = (
                report.images[compared[index].identity] for index in of_two[example]
            )
            before, said = in_two_files.get((other_path, path), (0, f"{row.place}: {excerpt(other_name)} like {excerpt(name)}"))
            in_two_files[other_path, path] = before + int(count), said
    for (path, first_path), (number, said) in in_two_files.items():
        yield "similar images in two files", f"{counted(number, 'pair')} in {path} and {first_path}, for example {said}"


def print_report(report: Report, files: list[Path]) -> None:
    """Print the counts, what is noticeable about the data, token statistics, and all problems."""
    for path in files:
        print(f"{path} ({describe_format(path)}): {counted(report.num_rows[path], 'row')}")
    print(f"{counted(len(report.images), 'image')} in {counted(report.num_rows.total(), 'row')}")
    if report.tokens:
        numbers = (f"{rows:,} with {number}" for number, rows in sorted(report.images_per_row.items()))
        print(f"Rows by number of images: {', '.join(numbers)}")
        print_images(report)
        answer, rows = report.answers.most_common(1)[0]
        share = f"{counted(rows, 'row')}, {rows / len(report.tokens):.1%}: a model that always gives it scores as much"
        print(f"Most frequent of {counted(len(report.answers), 'distinct answer')}: {excerpt(answer)!r} in {share}")
        print(f"Longest answer: {counted(report.longest[0], 'token')}, {report.longest[1]}")
        print_tokens(np.array(report.tokens))
    for name, entries in (("problem", report.problems), ("warning", report.warnings)):
        kinds = Counter(kind for kind, _ in entries)
        summary = ", ".join(f"{kind} {number:,}" for kind, number in kinds.items())
        print(f"{counted(len(entries), name)}: {summary}" if entries else f"No {name}s.")
        for kind, message in entries:
            print(f"  {kind}: {message}")


def print_images(report: Report) -> None:
    """Print the range of sizes, how many images are small or elongated, and how many look alike."""
    if not report.images:
        return
    names = {identity: (name, image.size) for identity, (name, image, _, _) in report.images.items()}
    sizes = sorted(names.values(), key=lambda entry: entry[1][0] * entry[1][1])
    (smallest, low), (_, high) = sizes[0], sizes[-1]
    print(f"Sizes: {low[0]:,} × {low[1]:,} ({excerpt(smallest)}) to {high[0]:,} × {high[1]:,} pixels")
    if small := sum(max(size) < CROP_SIZE for _, size in sizes):
        print(f"  {counted(small, 'image')} smaller than a crop ({CROP_SIZE} × {CROP_SIZE} pixels): enlarged for the model")
    if elongated := [(name, size) for name, size in sizes if max(size) > ELONGATED * min(size)]:
        name, size = max(elongated, key=lambda entry: max(entry[1]) / min(entry[1]))
        example = f"{excerpt(name)}, {size[0]:,} × {size[1]:,}"
        print(f"  {counted(len(elongated), 'image')} longer than {ELONGATED} times the other side, most of all {example}")
    if report.alike:
        first, second = (excerpt(names[identity][0]) for identity in report.alike)
        print(
            f"Near-duplicates: {counted(report.num_alike, 'pair')} of images that look alike, for example {first} and {second}"
        )
    if len(report.images) > MAX_COMPARED:
        print(f"  (only the first {MAX_COMPARED:,} images are compared by their looks)")


def print_tokens(tokens: np.ndarray) -> None:
    """Print statistics and a histogram of the number of tokens per row, (rows,)."""
    low, high = int(tokens.min()), int(tokens.max())
    print(
        f"Tokens per row: minimum {low:,}, mean {tokens.mean():,.1f}, 95 % {np.percentile(tokens, 95):,.0f}, maximum {high:,}"
    )
    width = (high - low) // HISTOGRAM_BINS + 1
    counts, edges = np.histogram(tokens, bins=np.arange(low, high + width + 1, width))
    for number, edge in zip(counts, edges, strict=False):
        bar = "#" * -(-int(number) * HISTOGRAM_WIDTH // int(counts.max()))
        print(f"  {edge:>9,} to {edge + width - 1:>9,}  {bar:{HISTOGRAM_WIDTH}}  {number:,}")


def main(args: argparse.Namespace) -> None:
    limit_library_bars(args.tqdm)
    try:
        check_checkpoint(args.model_name_or_path, "--model_name_or_path")
        processor = Phi3VProcessor.from_pretrained(args.model_name_or_path, num_crops=args.num_crops)
        checker = Checker(processor, args.max_length, args.quick)
        report = check_files(args.data_file, args.image_dir, checker, args.tqdm, args.max_new_tokens)
        print_report(report, args.data_file)
        if args.contact_sheet:
            images = [(name, image, row) for name, image, _, row in report.images.values()]
            write_contact_sheet(args.contact_sheet, images, args.num_crops)
            print(f"Wrote {args.contact_sheet}")
    except (OSError, InputError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main(args)
