"""Dataset rows as a task reads them, with their location in the source for messages."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from common.runtime.process import InputError, counted, say

from .mixing import Mixture

MAX_REPORTED = 10  # further invalid rows are not printed, only counted
skipped_rows: list[str] = []  # errors of the rows that BadRows has skipped in this process, for bad_samples.jsonl


@dataclass(frozen=True)
class Contents:
    """What this process, which has checked its share of some rows, knows about them; see :mod:`common.data.review`.

    Attributes
    ----------
    rows : numpy.ndarray
        int64 (rows of the share, 5): index, hash of texts and images, upper bound of the text's tokens, number of images,
        hash that is the same if the folder of the images has moved.
    pictures : sequence of str or bytes
        Files, or hashes of images stored in the dataset.
    doubts : sequence of str
        What is suspicious about images.
    """

    rows: np.ndarray
    pictures: Sequence[str | bytes]
    doubts: Sequence[str]


class Rows(Sequence[Any]):
    """Rows of a dataset, converted lazily.

    Parameters
    ----------
    source : sequence
        A ``datasets.Dataset`` or a list of dicts.
    place : callable
        Returns the location of a row of the source, by its index, for messages.
    numbers : sequence of int, optional
        For each row, its index in the source. By default, all rows.
    convert : callable, optional
        Converts a source row and an identifier to the row that the task reads.
    contents : Contents, optional
        Known if the rows have been checked.
    mixture : Mixture, optional
        Selects the rows of an epoch. By default, every row occurs once.
    fingerprint : str, optional
        Changes with the rows and their images, if that is known; what is computed from them is then kept in the cache.
    """

    def __init__(
        self,
        source: Sequence[Any],
        place: Callable[[int], str],
        numbers: Sequence[int] | np.ndarray | None = None,
        convert: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
        contents: Contents | None = None,
        mixture: Mixture | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.source, self.convert, self.contents, self.mixture = source, convert, contents, mixture
        self._place, self.fingerprint = place, fingerprint
        # No lists, since every worker would soon have its own copy of millions of Python's numbers.
        self.numbers = range(len(source)) if numbers is None else numbers if isinstance(numbers, range) else np.asarray(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._read(index, self.source[int(self.numbers[index])])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        numbers = [int(self.numbers[index]) for index in indices]
        # Reading many rows of a datasets.Dataset at once takes as long as reading a single row.
        fetch = getattr(self.source, "__getitems__", None)
        contents = fetch(numbers) if fetch else [self.source[number] for number in numbers]
        return [self._read(index, content) for index, content in zip(indices, contents, strict=True)]

    def place(self, index: int) -> str:
        """Location of a row, for messages."""
        return self._place(int(self.numbers[index]))

    def map(self, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> Rows:
        """Return the same rows with another conversion of source row and identifier."""
        return Rows(self.source, self._place, self.numbers, convert)

    def select(self, begin: int, limit: int | None = None) -> Rows:
        """Return at most ``limit`` rows, starting at ``begin``."""
        part = slice(begin, None if limit is None else begin + limit)
        return Rows(self.source, self._place, self.numbers[part], self.convert)

    def head(self, count: int) -> Rows:
        """Return the first ``count`` rows."""
        return self.select(0, count)

    def peek(self) -> Rows:
        """Return the rows that can be read before training: all of them."""
        return self

    def checked(self, bad: set[int], known: np.ndarray, pictures: Sequence[str | bytes], doubts: Sequence[str]) -> Rows:
        """Return all rows except those with the given indices, with what is known of them: see :class:`Contents`."""
        gone = np.array(sorted(bad), dtype=np.int64)
        known = known[~np.isin(known[:, 0], gone)]
        known[:, 0] -= np.searchsorted(gone, known[:, 0])
        left = np.delete(np.arange(len(self)), gone) if bad else range(len(self))
        return self.take(left, Contents(known, pictures, doubts))

    def take(self, indices: Sequence[int] | np.ndarray, contents: Contents) -> Rows:
        """Return the rows with the given indices, in ascending order, with what is known about their contents."""
        numbers, fingerprint = self.numbers, self.fingerprint
        if len(indices) < len(self):
            indices = np.asarray(indices, dtype=np.int64)
            numbers = np.asarray(numbers)[indices]
            fingerprint = fingerprint and f"{fingerprint} {hashlib.sha256(indices.tobytes()).hexdigest()}"
        return Rows(self.source, self._place, numbers, self.convert, contents, fingerprint=fingerprint)

    def _read(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        return self.convert(content, str(self.numbers[index])) if self.convert else content


@contextmanager
def converting(place: str) -> Iterator[None]:
    """Name the row in an input error, and turn an error because of missing or empty fields into one."""
    try:
        yield
    except InputError as error:
        raise error.at(place) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"fields are missing or have other types ({error!r}): correct or remove the row", place) from error


def first_entry(row: dict[str, Any], column: str) -> Any:
    """Return the first entry of a column of lists.

    Raises
    ------
    InputError
        If the list is empty.
    """
    if not row[column]:
        raise InputError(f'"{column}" is empty: remove the row')
    return row[column][0]


def join_rows(files: Sequence[Rows], weights: Sequence[float] | None = None, seed: int = 0) -> Rows:
    """Join the checked rows of several files; with ``weights``, see :class:`~.mixing.Mixture`, one for each file."""
    if len(files) == 1 and not weights:
        return files[0]
    ends = np.cumsum([len(rows) for rows in files])

    def place(index: int) -> str:
        file = int(np.searchsorted(ends, index, "right"))
        return files[file].place(index - int(ends[file]) + len(files[file]))

    known, pictures, doubts = [], list[str | bytes](), list[str]()
    for rows, end in zip(files, ends, strict=True):
        assert rows.contents is not None, "rows are checked when they are loaded"
        known.append(rows.contents.rows + np.array([end - len(rows), 0, 0, 0, 0]))
        pictures += rows.contents.pictures
        doubts += rows.contents.doubts
    contents = Contents(np.concatenate(known), list(dict.fromkeys(pictures)), list(dict.fromkeys(doubts)))
    mixture = Mixture([len(rows) for rows in files], weights, seed) if weights else None
    if mixture:
        counts = " + ".join(f"{count:,}" for count in mixture.per_epoch)
        say(f"{'data:':13}{counts} rows per epoch (--train_weights)", sys.stdout)
    source: Any = ConcatDataset(files)  # type: ignore[arg-type]  # it only takes their lengths and items
    prints = [rows.fingerprint for rows in files]
    fingerprint = " ".join(map(str, prints)) if all(prints) else None
    return Rows(source, place, contents=contents, mixture=mixture, fingerprint=fingerprint)


class BadRows:
    """Handling of invalid rows: raise their error or, with ``--on_bad_sample skip``, report and count them.

    Parameters
    ----------
    skip : bool
        Whether to skip invalid rows.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.count = skip, 0

    def add(self, error: InputError) -> None:
        """Raise the error of a row, or count the row."""
        if not self.skip:
            raise error
        self.count += 1
        skipped_rows.append(str(error))
        if self.count <= MAX_REPORTED:
            say(f"skipped: {error}")

    def report(self, where: str, what: str = "row") -> None:
        """Print the number of skipped rows, or of ``what`` else was checked, if any."""
        if self.count:
            say(f"{where}: {counted(self.count, f'invalid {what}')} skipped (--on_bad_sample skip)")
