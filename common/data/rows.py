"""Rows as a task reads them, each of which knows its own place in the data set that it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.runtime import InputError, say

MOST_NAMED = 10  # bad rows that are named before they are only counted


class Rows(Sequence):
    """Rows of a data set; what each becomes is worked out when it is read.

    Parameters
    ----------
    source : sequence
        A ``datasets.Dataset`` or a list of dicts.
    place : callable
        Names a row of the source, by its number, in messages.
    keys : sequence of (int, int or None), optional
        The source's row, and the entry of its list ``each``, of each row here; by default all rows.
    each : str, optional
        A column of lists: a row here holds one entry of it.
    convert : callable, optional
        Turns what the source holds, and an identifier, into the row that the task reads.
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
        # One access of a datasets.Dataset costs as much as one of many rows.
        fetch = getattr(self.source, "__getitems__", None)
        contents = fetch(numbers) if fetch else [self.source[number] for number in numbers]
        return [self._read(index, content) for index, content in zip(indices, contents, strict=True)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """What messages call a row."""
        return self._place(self.keys[index][0])

    def map(self, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> Rows:
        """The same rows, as ``convert`` makes them of a source's row and its number there."""
        return Rows(self.source, self._place, self.keys, self.each, convert)

    def select(self, begin: int, limit: int | None = None) -> Rows:
        """The rows from ``begin`` on, at most ``limit``."""
        end = None if limit is None else begin + limit
        return Rows(self.source, self._place, self.keys[begin:end], self.each, self.convert)

    def head(self, count: int) -> Rows:
        """The first rows."""
        return self.select(0, count)

    def without(self, bad: set[int]) -> Rows:
        """All rows but some, by their index here."""
        keys = [key for index, key in enumerate(self.keys) if index not in bad]
        return Rows(self.source, self._place, keys, self.each, self.convert)

    def _read(self, index: int, content: dict[str, Any]) -> dict[str, Any]:
        row, entry = self.keys[index]
        identifier = str(row)
        if entry is not None:
            content, identifier = content | {self.each: [content[self.each][entry]]}, f"{row}-{entry}"
        return self.convert(content, identifier) if self.convert else content


class BadRows:
    """What happens at a bad row: it ends the run or, with ``--skip_bad_rows``, is left out, named and counted.

    Parameters
    ----------
    skip : bool
        The flag.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.count = skip, 0

    def add(self, error: InputError) -> None:
        """Raise the error, or count its row."""
        if not self.skip:
            raise error
        self.count += 1
        if self.count <= MOST_NAMED:
            say(f"left out: {error}")

    def report(self, what: str) -> None:
        """Say how many rows were left out, if any."""
        if self.count:
            say(f"{what}: {self.count:,} bad rows left out (--skip_bad_rows)")
