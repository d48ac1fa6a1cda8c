"""Checking rows and their images before training, each process its share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any, TypeVar, overload

import numpy as np

from common.runtime.collectives import gather
from common.runtime.process import InputError, rank, world_size
from common.runtime.progress import Progress

from .conversations import Conversation, max_text_tokens, pictures
from .loader import in_parallel
from .pictures import check_picture, picture_content
from .reading import check_conversation
from .rows import BadRows, Rows, converting
from .streaming import Stream

T = TypeVar("T")
U = TypeVar("U")

ITEMS_AT_ONCE = 64


@overload
def check_rows(rows: Rows, *args: Any, **kwargs: Any) -> Rows: ...
@overload
def check_rows(rows: Stream, *args: Any, **kwargs: Any) -> Stream: ...
def check_rows(
    rows: Rows | Stream,
    conversations: Callable[[Any], Iterable[Conversation]],
    name: str,
    bar: bool = True,
    skip_bad: bool = False,
) -> Rows | Stream:
    """Check the texts, image tags and images of rows; each process checks its share. Streamed rows are checked when read.

    Parameters
    ----------
    rows : Rows or Stream
    conversations : callable
        Returns all conversations that a row can be converted to, which must have the same images.
    name : str
        Name of a row in messages, for example ``"training row"``.
    bar : bool
        False with ``--no-tqdm``.
    skip_bad : bool
        Skip invalid rows instead of raising the first error.

    Returns
    -------
    Rows or Stream
        The valid rows; all rows of a stream.

    Raises
    ------
    InputError
        If a row is invalid; the message names the row.
    """
    none_left = InputError(f"no {name}s are left: the dataset is too small, or all of them were skipped")
    if isinstance(rows, Stream):
        if not len(rows):
            raise none_left
        return rows
    found: dict[str | bytes, str | None | InputError] = {}  # rows may share images; what is suspicious or wrong about them
    known: list[tuple[int, ...]] = []

    def check(index: int, rows: Rows = rows) -> None:
        place = rows.place(index)
        with converting(place):
            variants = list(conversations(rows[index]))
            if not variants:
                raise InputError("the row has no question: remove it")
        for conversation in variants:
            check_conversation(conversation, place)
        keys = []
        for picture in pictures(variants[0]):
            with converting(place):
                keys.append(picture if isinstance(picture, str) else picture_content(picture))
            if keys[-1] not in found:
                try:
                    found[keys[-1]] = check_picture(picture, whole=isinstance(picture, str))
                except InputError as error:
                    found[keys[-1]] = error
            if isinstance(result := found[keys[-1]], InputError):
                raise result.at(place)
        names = [os.path.basename(key) if isinstance(key, str) else key for key in keys]
        hashes = content_hash(variants, keys), content_hash(variants, names)
        known.append((index, hashes[0], max(map(max_text_tokens, variants)), len(keys), hashes[1]))

    bad = set(check_all(f"{name}s", range(len(rows)), check, len(rows), bar, skip_bad)[0])
    usable = {key: doubt for key, doubt in found.items() if not isinstance(doubt, InputError)}
    doubts = [doubt for doubt in usable.values() if doubt]
    rows = rows.checked(bad, np.array(known, dtype=np.int64).reshape(-1, 5), list(usable), doubts)
    if not len(rows):
        raise none_left
    return rows


def content_hash(conversations: list[Conversation], images: Sequence[str | bytes]) -> int:
    """Return a hash, int64, of the texts and the images of a row that can be converted to any of these conversations."""
    texts = [
        (conversation.get("system"), [(turn["user"], turn["assistant"]) for turn in conversation["conversations"]])
        for conversation in conversations
    ]
    return hash_text(repr((texts, images)))


def hash_text(text: str) -> int:
    """Return a hash of a text, int64."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def check_all(
    what: str,
    items: Iterable[T],
    check: Callable[[T], U],
    count: int,
    bar: bool,
    skip_bad: bool = False,
    num_workers: int = 0,
) -> tuple[list[int], list[U]]:
    """Check items, each process its share, with workers of its own.

    ``check`` raises an :class:`~common.runtime.process.InputError` for an invalid item; ``what`` names the items in messages.
    All processes raise the first error, or return the indices of all invalid items, and the results of their own valid ones.
    """

    def check_some(chunk: list[tuple[int, T]]) -> list[tuple[int, U | InputError]]:
        found: list[tuple[int, U | InputError]] = []
        for index, item in chunk:
            try:
                found.append((index, check(item)))
            except InputError as failure:
                found.append((index, failure))
                if not skip_bad:
                    break
        return found

    own = islice(enumerate(items), rank(), None, world_size())
    results: list[U] = []
    failures: list[tuple[int, InputError]] = []
    with Progress(f"Checking {what}", what, count, bar, shared=True) as progress:
        for found in in_parallel(check_some, iter(lambda: list(islice(own, ITEMS_AT_ONCE)), []), num_workers):
            for index, result in found:
                if isinstance(result, InputError):
                    failures.append((index, result))
                else:
                    results.append(result)
            progress.update(len(found))
            if failures and not skip_bad:
                break
    all_failures = sorted(chain.from_iterable(gather(failures)), key=lambda failure: failure[0])
    bad = BadRows(skip_bad)
    for _, error in all_failures:
        bad.add(error)
    bad.report("checking", what.removesuffix("s"))
    return [index for index, _ in all_failures], results
