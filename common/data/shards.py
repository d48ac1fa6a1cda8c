"""Shards for streaming: JSON Lines and Parquet files in the general format, and Parquet files of datasets on the Hub.

The main process counts the rows of all blocks of lines or row groups and broadcasts the index. It reads JSON Lines files
once, but only the footers of Parquet files.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import are_progress_bars_disabled, load_dataset_builder

from common.runtime.collectives import on_main_process
from common.runtime.process import InputError
from common.runtime.progress import track

from .conversations import Conversation
from .formats import is_array, is_table
from .pictures import Picture, picture_path
from .reading import check_conversation, parse_conversation, read_conversation
from .rows import Rows, converting
from .sources import find_image_dir, load_hub, require_stored_images
from .streaming import Span, Stream

LINES_PER_BLOCK = 64
NUM_INDEX_THREADS = 16


def open_hub(
    *name: str, columns: list[str], split: str = "train", each: str | None = None, streaming: bool = False
) -> Rows | Stream:
    """Open a dataset from the Hub with :func:`stream_hub` or :func:`~.sources.load_hub`; same parameters."""
    return (stream_hub if streaming else load_hub)(*name, columns=columns, split=split, each=each)


def stream_conversations(patterns: Path | Sequence[Path], image_dir: Path | None, limit: int | None = None) -> Stream:
    """Stream shards in the general format: JSON Lines or Parquet files. Parquet files can contain the images.

    Parameters
    ----------
    patterns : Path or sequence of Path
        Files, or several with wildcards, for example ``data/train-*.parquet``.
    image_dir : Path, optional
        Folder that image names are relative to; by default :func:`~.sources.find_image_dir` of each shard.
    limit : int, optional
        Use only the first ``limit`` rows.

    Raises
    ------
    InputError
        If no shard matches, a shard cannot be read, or all shards are empty.
    """

    @cache
    def folder_of(shard: str) -> Path:
        return image_dir or find_image_dir(Path(shard))

    def read(span: Span) -> Iterator[tuple[str, Conversation]]:
        for place, row in _read_table(span) if span.shard.endswith(".parquet") else _read_lines(span):
            for turn in row["conversations"]:
                with converting(place):
                    turn["images"] = [_locate(image, folder_of(span.shard)) for image in turn.get("images") or []]
            yield place, row

    def index() -> list[Span]:
        shards = []
        for pattern in [patterns] if isinstance(patterns, Path) else patterns:
            # A folder may have brackets in its name.
            if not (found := [str(pattern)] if pattern.is_file() else sorted(glob.glob(str(pattern)))):
                raise InputError(f"{pattern} is missing: put the shards there, or name other ones")
            shards += found
        for shard in shards:
            if not Path(shard).is_file():  # opening a FIFO would wait
                raise InputError(f"{shard} is not a file: name files, or use wildcards, for example {shard}/*.jsonl")
            if is_table(Path(shard)) or (not shard.endswith(".parquet") and is_array(Path(shard))):
                what = "CSV is" if is_table(Path(shard)) else "JSON arrays are"
                raise InputError(f"{what} not streamed: use JSON Lines or Parquet, or remove --streaming", shard)
        return _index(shards, lambda shard: _index_row_groups(shard) if shard.endswith(".parquet") else _index_lines(shard))

    return Stream(on_main_process(index), read).select(0, limit)


def stream_hub(*name: str, columns: list[str], split: str = "train", each: str | None = None) -> Stream:
    """Stream the Parquet shards of a dataset on the Hub, or of a directory with the same layout; images stay encoded.

    The parameters are those of :func:`~.sources.load_hub`.

    Raises
    ------
    InputError
        If the Hub cannot be reached, or the dataset does not exist or has no such files or columns.
    """

    def read(span: Span) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in _read_row_group(span, columns):
            place = f"{' '.join(name)}, {split}, row {number}"
            if each is None:
                yield place, row
            else:
                yield from ((place, row | {each: [entry]}) for entry in row[each] or [])

    def index() -> list[Span]:
        try:
            files = load_dataset_builder(*name).config.data_files or {}
        except (OSError, ValueError) as error:
            raise InputError(f"dataset {' '.join(name)} cannot be streamed from the Hub: {error}") from None
        shards = [file for file in files.get(split, []) if file.endswith(".parquet")]
        if not shards:
            raise InputError(f"dataset {' '.join(name)} on the Hub has no Parquet files to stream: remove --streaming")
        return _index(shards, lambda shard: _index_row_groups(shard, columns, each), across_shards=True)

    return Stream(on_main_process(index), read)


def _index(shards: list[str], index: Callable[[str], list[tuple[int, int, int]]], across_shards: bool = False) -> list[Span]:
    """Index the pieces of all shards.

    ``index`` returns position, number of lines or stored rows, and number of rows of each piece. The lines or stored rows are
    numbered in each shard, or across all shards.
    """
    spans, number, first = [], 0, 0
    with ThreadPoolExecutor(NUM_INDEX_THREADS) as readers:
        shown = track(shards, "Counting rows", "shards", bar=not are_progress_bars_disabled())  # they are with --no-tqdm
        for shard, pieces in zip(shown, readers.map(index, shards), strict=True):
            first = first if across_shards else 0
            for position, size, rows in pieces:
                spans.append(Span(shard, position, first, number, 0, rows))
                first, number = first + size, number + rows
    if not number:
        raise InputError(f"{', '.join(shards)}: no rows")
    return spans


def _index_lines(shard: str) -> list[tuple[int, int, int]]:
    pieces, begin, position, lines, rows = [], 0, 0, 0, 0
    with _blame(shard), open(shard, "rb") as file:
        for line in file:
            position, lines, rows = position + len(line), lines + 1, rows + bool(line.strip())
            if rows == LINES_PER_BLOCK:
                pieces.append((begin, lines, rows))
                begin, lines, rows = position, 0, 0
    return [*pieces, (begin, lines, rows)]


def _read_lines(span: Span) -> Iterator[tuple[str, Conversation]]:
    with _blame(span.shard), open(span.shard, "rb") as file:
        file.seek(span.position)
        for number, line in enumerate(file, start=span.first + 1):
            if line.strip():
                place = f"{span.shard}, line {number}"
                yield place, parse_conversation(line, place)


def _locate(image: Picture, image_dir: Path) -> Picture:
    name = image.get("path") if isinstance(image, dict) and image.get("bytes") is None else image
    return picture_path(image_dir, name) if isinstance(name, str) else image


def _read_table(span: Span) -> Iterator[tuple[str, Conversation]]:
    for number, row in _read_row_group(span):
        place = f"{span.shard}, row {number}"
        conversation = read_conversation(row, place)
        check_conversation(conversation, place)
        yield place, conversation


@contextmanager
def _blame(shard: str) -> Iterator[None]:
    """Turn any error of reading a shard into an input error that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        kind = " as a Parquet file" if shard.endswith(".parquet") else ""
        raise InputError(f"{shard} cannot be read{kind} ({error}): download or write it again") from None


@lru_cache(maxsize=32)
def _open_parquet(shard: str) -> pq.ParquetFile:
    return pq.ParquetFile(fsspec.open(shard, "rb").open())


def _index_row_groups(shard: str, columns: list[str] | None = None, each: str | None = None) -> list[tuple[int, int, int]]:
    pieces = []
    with _blame(shard):
        file = _open_parquet(shard)
        schema = file.schema_arrow
        required = columns or ([] if "messages" in schema.names else ["conversations"])
        if missing := set(required) - set(schema.names):
            raise InputError(f"{shard} has no column {', '.join(sorted(missing))}")
        if columns:
            require_stored_images(schema, shard)
        for group in range(file.num_row_groups):
            rows = in_group = file.metadata.row_group(group).num_rows
            if each:
                rows = pc.sum(pc.list_value_length(file.read_row_group(group, columns=[each])[each])).as_py() or 0
            pieces.append((group, in_group, rows))
    return pieces


def _read_row_group(span: Span, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    with _blame(span.shard):
        batches = _open_parquet(span.shard).iter_batches(batch_size=16, row_groups=[span.position], columns=columns)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=span.first)
