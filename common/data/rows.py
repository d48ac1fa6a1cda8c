"""Dataset rows as a task reads them, with their location in the source for messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.runtime import InputError, say

MAX_REPORTED = 10  # further invalid rows are only counted


class Rows(Sequence):
    """Rows of a dataset, converted lazily.

    Parameters
    ----------
    source : sequence
        A ``datasets.Dataset`` or a list of dicts.
    place : callable
        Returns the location of a row of the source, by its index, for messages.
    keys : sequence of (int, int or None), optional
        For each row, its index in the source and the index of its entry in the column ``each``. By default, all rows.
    each : str, optional
        A column of lists. Each row contains a single entry of its list.
    convert : callable, optional
        Converts a source row and an identifier to the row that the task reads.
    """

    def __init__(
        self,
        source: Sequence[Any],
        place: Callable[[int], str],
        keys: Sequence[tuple[int, int | None]] | None = None,
        each: str | None = None,
        convert: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
    ) -> None:
        self.source, self.each, self.convert = source, each, convert
        self._place = place
        self.keys = [(row, None) for row in range(len(source))] if keys is None else keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(index, self.source[self.keys[index][0]])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        numbers = [self.keys[index][0] for index in indices]
        # Reading many rows of a datasets.Dataset at once takes as long as reading a single row.
        fetch = getattr(self.source, "__getitems__", None)
        contents = fetch(numbers) if fetch else [self.source[number] for number in numbers]
        return [self._read(index, content) for index, content in zip(indices, contents, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """Location of a row, for messages."""
        return self._place(self.keys[index][0])

    def map(self, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> Rows:
        """Return the same rows with another conversion of source row and identifier."""
        return Rows(self.source, self._place, self.keys, self.each, convert)

    def select(self, begin: int, limit: int | None = None) -> Rows:
        """Return at most ``limit`` rows, starting at ``begin``."""
        end = None if limit is None else begin + limit
        return Rows(self.source, self._place, self.keys[begin:end], self.each, self.convert)

    def head(self, count: int) -> Rows:
        """Return the first ``count`` rows."""
        return self.select(0, count)

    def without(self, bad: set[int]) -> Rows:
        """Return all rows except those with the given indices."""
        keys = [key for index, key in enumerate(self.keys) if index not in bad]
        return Rows(self.source, self._place, keys, self.each, self.convert)

    def _read(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        row, entry = self.keys[index]
        identifier = str(row)
        if entry is not None:
            content, identifier = content | {self.each: [content[self.each][entry]]}, f"{row}-{entry}"
        return self.convert(content, identifier) if self.convert else content


class BadRows:
    """Handling of invalid rows: raise their error or, with ``--skip_bad_rows``, report and count them.

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
        if self.count <= MAX_REPORTED:
            say(f"skipped: {error}")

    def report(self, what: str) -> None:
        """Print the number of skipped rows, if any."""
        if self.count:
            say(f"{what}: {self.count:,} invalid rows skipped (--skip_bad_rows)")
