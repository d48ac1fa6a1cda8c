"""What is prepared once and kept in the cache of ``datasets``: rows as an Arrow file, and their lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from common.runtime.files import replacing

ROWS_PER_BATCH = 64  # all are read for a single row


class PreparedRows(Sequence[dict[str, Any]]):
    """Rows of an Arrow file, of which only the batch of a row is read, so that a process needs no memory for the others.

    The file is not mapped into memory: its pages would count as memory of every process that reads rows at random.

    Parameters
    ----------
    path : Path
        Written by :func:`write_rows`.
    limit : int, optional
        Use only the first ``limit`` rows.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path = path
        self._file = pa.ipc.open_file(pa.OSFile(str(path)))  # forked processes can share it, since it has no position
        batches = self._file.num_record_batches
        rows = (batches - 1) * ROWS_PER_BATCH + self._file.get_batch(batches - 1).num_rows if batches else 0
        self._rows = rows if limit is None else min(limit, rows)
        self._last: tuple[int, pa.RecordBatch] | None = None

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([range(self._rows)[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for number, some in groupby(indices, lambda index: index // ROWS_PER_BATCH):
            if self._last is None or self._last[0] != number:
                self._last = number, self._file.get_batch(number)
            rows += self._last[1].take(pa.array([index % ROWS_PER_BATCH for index in some])).to_pylist()
        return rows

    def columns(self, *names: str) -> pa.Table:
        """Return some columns of all rows; the others are not read."""
        options = pa.ipc.IpcReadOptions(included_fields=[self._file.schema.get_field_index(name) for name in names])
        # Mapped only for as long as the columns are used.
        return pa.ipc.open_file(pa.memory_map(str(self.path)), options=options).read_all().slice(0, self._rows)


def can_be_opened(path: Path) -> bool:
    """Whether the file of :class:`PreparedRows` exists and is not truncated."""
    try:
        PreparedRows(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def write_rows(path: Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write the rows of several tables as a file for :class:`PreparedRows`."""
    with replacing(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
        left = schema.empty_table()
        for part in parts:
            table = pa.concat_tables([left, part]).combine_chunks()
            full = len(table) - len(table) % ROWS_PER_BATCH
            writer.write_table(table.slice(0, full), max_chunksize=ROWS_PER_BATCH)
            left = table.slice(full)
        writer.write_table(left)


def cache_file(content: str, suffix: str) -> Path:
    """Path in the cache of what is prepared from ``content``, which describes its sources."""
    name = hashlib.sha256(content.encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "conversations" / f"{name}.{suffix}"


def load_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return an array of this shape from the cache, mapped into memory, or None if there is none."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return array if array.shape == shape else None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array to the cache, unless it is there."""
    if load_array(path, array.shape) is None:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)
