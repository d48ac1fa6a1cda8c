"""Loading rows: from the Hub, from JSON Lines files, and from the general format as a memory-mapped Arrow file.

On all processes that see the same files, a function returns the same rows or raises the same error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, load_dataset
from pyarrow import json as arrow_json

from common.runtime import InputError, Progress, first_on_each_machine, gather, parse_json, rank, replacing, say, world_size

from .conversations import Conversation, check_conversation, conversation_faults, pictures
from .pictures import Picture, check_picture, picture_path
from .rows import BadRows, Rows

T = TypeVar("T")

TURN = pa.struct([("images", pa.list_(pa.string())), ("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("conversations", pa.list_(TURN))])
BLOCK_SIZE = 16 * 2**20  # bytes per read, which limits the length of a line


def load_hub(*name: str, columns: list[str], split: str = "train", each: str | None = None) -> Rows:
    """Load a split of a dataset on the Hub, downloading it once per machine; images stay encoded.

    Parameters
    ----------
    *name : str
        Hub id or directory and, if there are several configurations, the name of one.
    columns : list of str
        Columns to read.
    split : str
    each : str, optional
        A column of lists, one of ``columns``. Every entry becomes a row, whose list contains only that entry.

    Raises
    ------
    InputError
        If the Hub cannot be reached or the dataset does not exist.
    """

    def load() -> Dataset:
        say(f"Loading {' '.join(name)} from the Hub or its cache")
        try:
            return load_dataset(*name, split=split).select_columns(columns)
        except (OSError, ConnectionError, ValueError) as error:
            raise InputError(
                f"dataset {' '.join(name)} cannot be loaded from the Hub ({error}): without access to the Hub, use --data_dir"
            ) from None

    rows = first_on_each_machine(load)
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(column, [Image(decode=False)])
    keys = None
    if each:
        keys = [(row, entry) for row, entries in enumerate(rows[each]) for entry in range(len(entries or []))]
    return Rows(rows, partial("{}, {}, row {}".format, " ".join(name), split), keys, each)


def read_json_lines(path: Path, release: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Read the non-blank lines of a JSON Lines file.

    Parameters
    ----------
    path : Path
    release : str, optional
        Name of the dataset if the file is part of its official release, for messages.

    Yields
    ------
    tuple of (str, bytes)
        Location (file and line) and content of the line.

    Raises
    ------
    InputError
        If the file is missing or has no rows.
    """
    if not path.is_file():
        remedy = f"--data_dir must be the folder of {release}'s official files" if release else "name a JSON Lines file"
        raise InputError(f"{path} is missing: {remedy}")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line
                empty = False
    if empty:
        raise InputError(f"{path} is empty: expected one JSON object per line")


def collect_rows(
    entries: Iterable[tuple[str, Any]], to_row: Callable[[Any], dict[str, Any]], limit: int | None, skip_bad: bool = False
) -> Rows:
    """Convert the entries of a file to rows.

    Parameters
    ----------
    entries : iterable of (str, Any)
        Location, for messages, and content of each entry.
    to_row : callable
        Converts an entry to a row, or raises an :class:`~common.runtime.InputError`.
    limit : int, optional
        Use only the first ``limit`` rows.
    skip_bad : bool
        Skip invalid entries instead of raising the first error.
    """
    rows, places, bad = [], [], BadRows(skip_bad)
    for place, entry in entries:
        try:
            rows.append(to_row(entry))
            places.append(place)
        except InputError as error:
            bad.add(error.at(place))
        if len(rows) == limit:
            break
    bad.report("reading")
    return Rows(rows, places.__getitem__)


def read_rows(
    path: Path, release: str, to_row: Callable[[dict[str, Any]], dict[str, Any]], limit: int | None, skip_bad: bool
) -> Rows:
    """Read a JSON Lines file of a dataset's official release; see :func:`collect_rows` for the parameters."""
    return collect_rows(read_json_lines(path, release), lambda line: to_row(parse_object(line)), limit, skip_bad)


def parse_conversation(line: bytes, place: str) -> Conversation:
    """Parse and check one line of the general format, in which images are file names.

    Parameters
    ----------
    line : bytes
    place : str
        Location (file and line), for messages.

    Raises
    ------
    InputError
        If the line is invalid; the message names the location and what is expected.
    """
    conversation = parse_object(line, place)
    for error in row_faults(conversation, place):
        raise error
    return conversation


def row_faults(row: dict[str, Any], place: str) -> Iterator[InputError]:
    """Yield all errors of a row of the general format, without checking the image files."""
    yield from conversation_faults(row, place)
    if not isinstance(row.get("id") or "", str):
        yield InputError('"id" must be a string: put it in quotes', place)
    if any(isinstance(name, dict) for name in picture_names(row)):
        yield InputError('"images" must contain file names', place)


def picture_names(row: dict[str, Any]) -> list[Any]:
    """All values in the ``images`` lists of a row, which may be invalid."""
    turns = row.get("conversations")
    found = [turn.get("images") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [name for images in found if isinstance(images, list) for name in images]


def load_conversations(
    path: Path, image_dir: Path, limit: int | None = None, bar: bool = True, skip_bad: bool = False
) -> Dataset:
    """Load a JSONL file in the general format; see :mod:`common.data.conversations`.

    The file is converted to Arrow once, in the cache of ``datasets``, and memory-mapped. Later runs therefore load a million
    rows in seconds and without copying them to memory. All rows and images are checked.

    Parameters
    ----------
    path : Path
        JSONL file.
    image_dir : Path
        Folder that image names are relative to.
    limit : int, optional
        Use only the first ``limit`` rows.
    bar : bool
        False with ``--no-tqdm``.
    skip_bad : bool
        Skip invalid rows instead of raising the first error.

    Returns
    -------
    datasets.Dataset
        Conversations, with ``id`` (None if the row has none) and image names joined to ``image_dir``.

    Raises
    ------
    InputError
        If the file, a row or an image is invalid; the message names the file and line, or the image.
    """
    rows = Dataset.from_file(str(first_on_each_machine(lambda: _to_arrow(path, skip_bad))))
    if skip_bad and (count := sum(1 for _ in read_json_lines(path)) - len(rows)):
        say(f"{path}: {count:,} invalid rows skipped (--skip_bad_rows)")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    chunks = rows.data.column("conversations").chunks
    names = pa.chunked_array([pc.struct_field(turns.flatten(), "images").flatten() for turns in chunks]).unique()

    def check(name: pa.StringScalar) -> None:
        check_picture(picture_path(image_dir, name.as_py()))

    if bad := _check_all("images", names, check, len(names), bar, skip_bad):
        unusable = {names[index].as_py() for index in bad}
        rows = rows.select([index for index, row in enumerate(rows) if unusable.isdisjoint(picture_names(row))])

    def with_paths(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for turns in batch["conversations"]:
            for turn in turns:
                turn["images"] = [os.path.join(image_dir, name) for name in turn["images"] or []]
        return batch

    return rows.with_transform(with_paths)


def check_rows(
    rows: Rows,
    conversations: Callable[[Any], Iterable[Conversation]],
    name: str,
    bar: bool = True,
    skip_bad: bool = False,
) -> Rows:
    """Check the texts, image tags and images of rows; each process checks its share.

    Parameters
    ----------
    rows : Rows
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
    Rows
        The valid rows.

    Raises
    ------
    InputError
        If a row is invalid; the message names the row.
    """
    checked: dict[Picture, InputError | None] = {}  # rows may share image files

    def check_file(picture: str) -> None:
        if picture not in checked:
            try:
                checked[picture] = check_picture(picture, whole=True) and None
            except InputError as error:
                checked[picture] = error
        if checked[picture]:
            raise checked[picture]

    def check(index: int) -> None:
        place = rows.place(index)
        try:
            found = list(conversations(rows[index]))
            if not found:
                raise InputError("the row has no question: remove it")
        except IndexError:
            raise InputError("the row is missing an image or a text: remove it", place) from None
        except InputError as error:
            raise error.at(place) from None
        for conversation in found:
            check_conversation(conversation, place)
        try:
            for picture in pictures(found[0]):
                (check_file if isinstance(picture, str) else check_picture)(picture)
        except InputError as error:
            raise error.at(place) from None

    bad = _check_all(f"{name}s", range(len(rows)), check, len(rows), bar, skip_bad)
    rows = rows.without(set(bad)) if bad else rows
    if not len(rows):
        raise InputError(f"no {name}s are left: the dataset has fewer rows than requested")
    return rows


def _check_all(
    what: str, items: Iterable[T], check: Callable[[T], Any], count: int, bar: bool, skip_bad: bool = False
) -> list[int]:
    """Check items, each process its share. All processes raise the first error, or return the indices of invalid items."""
    found: list[tuple[int, InputError]] = []
    with Progress(f"Checking {what}", what, len(range(rank(), count, world_size())), bar) as progress:
        for index, item in islice(enumerate(items), rank(), None, world_size()):
            try:
                check(item)
            except InputError as error:
                found.append((index, error))
                if not skip_bad:
                    break
            progress.update()
    all_found = sorted(chain.from_iterable(gather(found)), key=lambda bad: bad[0])
    bad = BadRows(skip_bad)
    for _, error in all_found:
        bad.add(error)
    bad.report(what)
    return [index for index, _ in all_found]


def parse_object(line: bytes, place: str | None = None) -> dict[str, Any]:
    """Parse one line of a JSON Lines file.

    Raises
    ------
    InputError
        If the line is not a valid JSON object; the message names its location.
    """
    if len(line) > BLOCK_SIZE:
        raise InputError(f"longer than {BLOCK_SIZE:,} bytes: split the conversation", place)
    return parse_json(line, "write one object per line, in UTF-8", place)


def _to_arrow(path: Path, skip_bad: bool = False) -> Path:
    """Convert a file in the general format to an Arrow file in the cache, if it is not there yet."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: put the JSONL file there (convert_ucf101.py writes the one of UCF-101), or name another file"
        )
    state = path.stat()
    version = hashlib.sha256(
        f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {SCHEMA}{' skip bad' if skip_bad else ''}".encode()
    ).hexdigest()
    arrow = Path(datasets.config.HF_DATASETS_CACHE) / "conversations" / f"{version[:32]}.arrow"
    if arrow.exists():
        return arrow
    try:
        with (
            replacing(arrow) as temporary,
            arrow_json.open_json(
                path,
                read_options=arrow_json.ReadOptions(block_size=BLOCK_SIZE),
                # Without an explicit schema, an answer such as 2020-01-01 would be parsed as a date.
                parse_options=arrow_json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore"),
            ) as batches,
            pa.ipc.new_stream(str(temporary), SCHEMA) as writer,
        ):
            num_rows = 0
            for batch in batches:
                _check_batch(batch)
                writer.write_batch(batch)
                num_rows += len(batch)
            with path.open("rb") as file:
                if num_rows != sum(1 for line in file if line.strip()):
                    raise InputError("expected one conversation per line")  # Arrow also accepts other layouts
    except (pa.ArrowInvalid, UnicodeError, InputError) as error:
        if skip_bad:
            return _good_lines_to_arrow(path, arrow)
        _raise_first_error(path)
        raise InputError(
            f"{path} cannot be read ({error}): write one JSON object per line, with only the fields of the general format"
        ) from None
    return arrow


def _good_lines_to_arrow(path: Path, arrow: Path) -> Path:
    """Convert the valid lines of a file, one by one."""
    bad = BadRows(skip=True)
    with replacing(arrow) as temporary, pa.ipc.new_stream(str(temporary), SCHEMA) as writer:
        for place, line in read_json_lines(path):
            try:
                row = parse_conversation(line, place)
            except InputError as error:
                bad.add(error)
            else:
                writer.write_batch(pa.RecordBatch.from_pylist([{"id": None} | row], SCHEMA))
    return arrow


def _check_batch(batch: pa.RecordBatch) -> None:
    """Check a batch like :func:`parse_conversation`, but vectorized; the message does not name the row."""
    conversations = batch.column("conversations")
    turns = conversations.flatten()
    texts = pa.chunked_array([pc.struct_field(turns, "user"), pc.struct_field(turns, "assistant")])
    names = pc.struct_field(turns, "images").flatten()
    lengths = pc.fill_null(pc.list_value_length(conversations), 0)
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    if pc.any(pc.equal(lengths, 0)).as_py() or pc.any(empty).as_py() or names.null_count:
        raise InputError("a row does not have the general format")
    marked = (pc.match_substring_regex(pc.struct_field(turns, field), r"<[|/su]") for field in ("user", "assistant"))
    rows = pc.list_parent_indices(conversations).filter(pc.or_(*marked)).unique()
    for conversation in batch.take(rows).to_pylist():
        check_conversation(conversation, "a row")


def _raise_first_error(path: Path) -> None:
    """Parse a file line by line and raise the first error, which names its line."""
    for place, line in read_json_lines(path):
        parse_conversation(line, place)
