"""What is suspicious about the data of a run, for its summary; a row that is longer than the model's context ends the run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np

from common.phi3v.image_processing import CROP_SIZE, num_image_tokens
from common.runtime.collectives import gather
from common.runtime.process import counted, rank, world_size

from .batches import Lengths
from .checks import check_all
from .conversations import longest_answer
from .pictures import describe_picture, picture_content
from .rows import Contents
from .samples import TrainingData
from .streaming import StreamedData

MAX_DOUBTS = 3  # further images are only counted
BYTES_COMPARED = 4096  # at the end of files of equal size, before their whole contents are compared


def review_data(
    train: TrainingData | StreamedData,
    evaluation: TrainingData,
    lengths: Lengths,
    longest: int,
    max_new_tokens: int | None,
    bar: bool,
) -> list[str]:
    """Return warnings about training and evaluation data. Must be called on all processes.

    Parameters
    ----------
    train, evaluation
        Of streamed rows, only ``lengths`` are known.
    lengths : Lengths
        Lengths of some or all training samples.
    longest : int
        Tokens of the longest answer, see :func:`longest_evaluation_answer`.
    max_new_tokens : int, optional
        The flag.
    bar : bool
        False with ``--no-tqdm``.

    Raises
    ------
    InputError
        If a row is longer than the model's context; the message names the row.
    """
    for data in (train, evaluation):
        if isinstance(data, TrainingData) and data.rows.contents:
            _check_long_rows(data, data.rows.contents, bar)
    warnings = []
    for name, measured in (("training", lengths), ("evaluation", evaluation.sample_lengths())):
        if not measured.views.any():
            warnings.append(f"no image in {counted(len(measured.views), f'{name} row')} looked at: text only")
    before, after = train.rows.contents, evaluation.rows.contents
    if before and after:
        warnings += _overlap(before, after, evaluation)
    doubts = list(chain.from_iterable(gather([*(before.doubts if before else ()), *(after.doubts if after else ())])))
    warnings += doubts[:MAX_DOUBTS]
    if len(doubts) > MAX_DOUBTS:
        warnings.append(f"{counted(len(doubts) - MAX_DOUBTS, 'further image')} like these")
    if max_new_tokens and max_new_tokens < longest:
        warnings.append(
            f"--max_new_tokens {max_new_tokens} is less than the longest evaluation answer, {longest:,} tokens, which "
            "can therefore never be given"
        )
    return warnings


def longest_evaluation_answer(evaluation: TrainingData) -> int:
    """Return the number of tokens of the longest answer, including the token that ends it. Must be called on all processes."""
    share = (evaluation.conversation(0, row) for row in range(rank(), len(evaluation), world_size()))
    return max(gather(longest_answer(share, evaluation.processor)))


def _check_long_rows(data: TrainingData, contents: Contents, bar: bool) -> None:
    # An image has the most tokens as a column of crops. Only rows that may be too long are tokenized.
    per_image = num_image_tokens(data.processor.image_processor.num_crops * CROP_SIZE, CROP_SIZE)
    possible = contents.rows[:, 2] + contents.rows[:, 3] * per_image > data.processor.tokenizer.model_max_length
    rows = sorted(chain.from_iterable(gather(contents.rows[possible, 0].tolist())))
    if rows:
        check_all("long rows", rows, lambda row: data.measure(0, np.array([row])), len(rows), bar)


def _overlap(train: Contents, evaluation: Contents, data: TrainingData) -> Iterator[str]:
    """Yield warnings about rows and images that are in both; ``data`` has the evaluation rows."""
    rows = np.concatenate(gather(evaluation.rows))
    same = rows[np.any(gather(np.isin(rows[:, 1], train.rows[:, 1])), axis=0), 0]
    if len(same):
        what = "is also a training row:" if len(same) == 1 else "are also training rows, for example"
        yield f"{len(same):,} of {counted(len(rows), 'evaluation row')} {what} {data.place(int(same.min()))}"
    pictures = set(chain.from_iterable(gather(list(evaluation.pictures))))
    found = pictures & set(train.pictures)
    files = (picture for picture in train.pictures if isinstance(picture, str) and picture not in found)
    found |= _copies(files, {picture for picture in pictures - found if isinstance(picture, str)})
    shared = set().union(*gather(found))
    if shared:
        names = sorted(picture for picture in shared if isinstance(picture, str))
        what = "is also a training image" if len(shared) == 1 else "are also training images"
        example = f", for example {describe_picture(names[0])}" if names else ""
        yield f"{len(shared):,} of {counted(len(pictures), 'evaluation image')} {what}{example}"


def _copies(files: Iterable[str], wanted: set[str]) -> set[str]:
    """Return those of the wanted files that have the same content as one of ``files``."""
    left = list(files)
    for key in (os.path.getsize, _end, picture_content):
        keys = {key(file) for file in wanted}
        left = [file for file in left if key(file) in keys]
        keys = {key(file) for file in left}
        wanted = {file for file in wanted if key(file) in keys}
    return wanted


def _end(file: str) -> bytes:
    with open(file, "rb") as content:
        content.seek(max(0, os.path.getsize(file) - BYTES_COMPARED))
        return content.read()
