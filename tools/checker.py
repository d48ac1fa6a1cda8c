"""The checks of single rows and their images, in worker processes; see :mod:`tools.check_data`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from common.data.checks import content_hash
from common.data.conversations import Conversation, answer_lengths, check_context, count_tokens
from common.data.formats import read_lines
from common.data.loader import in_parallel
from common.data.pictures import check_picture, decode_picture, picture_content, picture_path, picture_size
from common.data.reading import file_faults, listed_images, parse_object, read_conversation
from common.data.sources import find_image_dir
from common.phi3v import Phi3VProcessor
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError
from common.runtime.progress import Progress

from .similar_images import signature

LINES_PER_TASK = 500
CHECKS_REMEMBERED = 100_000


@dataclass(frozen=True)
class CheckedImage:
    """A usable image.

    Attributes
    ----------
    path : str
    identity : str or bytes
        The hash of its content or, with ``--quick``, its resolved path.
    size : tuple of int
        Width and height in pixels, as a viewer shows it.
    num_tokens : int
    doubt : str, optional
        What is suspicious about it.
    look : bytes, optional
        Its :func:`~tools.similar_images.signature`; None with ``--quick``.
    """

    path: str
    identity: str | bytes
    size: tuple[int, int]
    num_tokens: int
    doubt: str | None
    look: bytes | None


@dataclass
class CheckedRow:
    """The result of checking one row.

    Attributes
    ----------
    place : str
        File and line, for messages.
    content : int, optional
        Hash of the row's images and texts, without its id; None for an invalid row.
    images : list of (str, CheckedImage)
        Name and facts of each usable image.
    num_images : int
        Including unusable ones.
    question, answer : str
        Of the last turn.
    num_tokens, answer_tokens : int, optional
        Of the row and its last answer; None if the row is invalid or one of its images is unusable.
    problems, warnings : list of (str, str)
        Kind and message of each problem or warning.
    """

    place: str
    content: int | None = None
    images: list[tuple[str, CheckedImage]] = field(default_factory=list)
    num_images: int = 0
    question: str = ""
    answer: str = ""
    num_tokens: int | None = None
    answer_tokens: int | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


class Checker:
    """Checks rows; in a worker process, it remembers the images.

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
        self.check_image = lru_cache(CHECKS_REMEMBERED)(self._check_image)

    def check(self, lines: list[tuple[str, bytes | InputError]], image_dir: Path) -> list[CheckedRow]:
        """Check rows of a file, given as pairs of place and content."""
        rows: list[CheckedRow] = []
        usable: list[tuple[CheckedRow, Conversation]] = []
        for place, line in lines:
            row = CheckedRow(place)
            rows.append(row)
            try:
                conversation = read_conversation(parse_object(line, place), place)
            except InputError as error:
                row.problems.append(("invalid row", str(error)))
                continue
            row.problems += [("invalid row", str(error)) for error in file_faults(conversation, place)]
            for name in listed_images(conversation):
                if not isinstance(name, str):
                    continue
                row.num_images += 1
                try:
                    image = self.check_image(picture_path(image_dir, name))
                except InputError as error:
                    row.problems.append(("unusable image", f"{place}: {error}"))
                    continue
                row.images.append((name, image))
                row.warnings += [("suspicious image", f"{place}: {image.doubt}")] if image.doubt else []
            if not row.problems:
                row.content = content_hash([conversation], [image.identity for _, image in row.images])
                usable.append((row, conversation))
        if usable:
            self._count_tokens(usable)
        return rows

    def _count_tokens(self, usable: list[tuple[CheckedRow, Conversation]]) -> None:
        rows, conversations = zip(*usable, strict=True)
        image_tokens = [[image.num_tokens for _, image in row.images] for row in rows]
        counts = count_tokens(conversations, image_tokens, lambda index: rows[index].place, self.processor)
        lengths = answer_lengths(conversations, self.processor)
        for row, conversation, count, length in zip(rows, conversations, counts, lengths, strict=True):
            turn = conversation["conversations"][-1]
            row.question, row.answer = turn["user"], turn["assistant"]
            row.num_tokens, row.answer_tokens = count, length
            try:
                check_context(count, self.processor)
                if self.max_length is not None and count > self.max_length:
                    raise InputError(f"{count:,} tokens exceed --max_length {self.max_length:,}")
            except InputError as error:
                row.problems.append(("row too long", str(error.at(row.place))))

    def _check_image(self, path: str) -> CheckedImage:
        doubt, size = check_picture(path), picture_size(path)
        look = None if self.quick else signature(decode_picture(path))
        identity = os.path.realpath(path) if self.quick else picture_content(path)
        return CheckedImage(path, identity, size, self.processor.image_processor.num_tokens(*size), doubt, look)


def check_in_parallel(
    files: list[Path], image_dir: Path | None, checker: Checker, bar: bool
) -> Iterator[tuple[Path, list[CheckedRow]]]:
    """Check all lines in parallel, yield the results in order, and show the progress."""
    total = sum(path.stat().st_size for path in files)
    folders = {path: image_dir or find_image_dir(path) for path in files}

    def chunks() -> Iterator[tuple[Path, list[tuple[str, bytes | InputError]]]]:
        for path in files:
            lines = read_lines(path)
            while chunk := list(islice(lines, LINES_PER_TASK)):
                yield path, chunk

    def check(chunk: tuple[Path, list[tuple[str, bytes | InputError]]]) -> tuple[Path, int, list[CheckedRow]]:
        path, lines = chunk
        return path, sum(len(line) for _, line in lines if isinstance(line, bytes)), checker.check(lines, folders[path])

    with Progress("Checking data", "bytes", total, bar) as progress:
        for path, size, rows in in_parallel(check, chunks(), cores_per_process()):
            yield path, rows
            progress.update(min(size, total - progress.done - 1))  # the size of a row in a JSON array is not exact
        progress.update(total - progress.done)
