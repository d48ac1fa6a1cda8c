"""Loading rows: from the Hub, from JSON Lines files, and conversations as a memory-mapped Arrow file.

On all processes that see the same files, a function returns the same rows or raises the same error.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, load_dataset

from common.runtime.collectives import first_on_each_machine, gather
from common.runtime.files import parse_json, read_json
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, counted, local_world_size, rank, say, world_size
from common.runtime.progress import Progress

from .conversations import (
    Conversation,
    check_conversation,
    conversation_faults,
    is_picture,
    max_text_tokens,
    pictures,
    read_conversation,
)
from .formats import describe_format, read_lines
from .loader import in_parallel
from .pictures import check_picture, picture_content, picture_path
from .prepared import PreparedRows, cache_file, write_rows
from .rows import BadRows, Contents, Rows

T = TypeVar("T")
U = TypeVar("U")

TURN = pa.struct([("images", pa.list_(pa.string())), ("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("system", pa.string()), ("conversations", pa.list_(TURN)), ("place", pa.string())]
    + [(name, pa.int64()) for name in ("hash", "size", "num_images")]  # see Contents
)
MAX_LINE = 16 * 2**20  # bytes
LINES_AT_ONCE = 1000
ITEMS_AT_ONCE = 64
SMALL_FILE = 4 * 2**20  # bytes that this process converts before worker processes have started
FEW_IMAGES = 2000  # that it checks in this time


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
    numbers, entries = None, None
    if each:
        counts = [len(found or []) for found in rows[each]]
        numbers = [number for number, count in enumerate(counts) for _ in range(count)]
        entries = [entry for count in counts for entry in range(count)]
    return Rows(rows, partial("{}, {}, row {}".format, " ".join(name), split), numbers, entries, each)


def read_json_lines(path: Path, release: str | None = None) -> Iterator[tuple[str, bytes]]:
    """Read the rows of a file as :func:`~.formats.read_lines`.

    Parameters
    ----------
    path : Path
    release : str, optional
        Name of the dataset if the file is part of its official release, for messages.

    Raises
    ------
    InputError
        If the file is missing or has no rows.
    """
    if not path.is_file():
        remedy = f"--data_dir must be the folder of {release}'s official files" if release else "put the file there"
        raise InputError(f"{path} is missing: {remedy}")
    empty = True
    for place, content in read_lines(path):
        yield place, content
        empty = False
    if empty:
        raise InputError(f"{path} is empty: expected at least one row")


def collect_rows(
    entries: Iterable[tuple[str, Any]], to_row: Callable[[Any], dict[str, Any]], limit: int | None, skip_bad: bool = False
) -> Rows:
    """Convert the entries of a file to rows.

    Parameters
    ----------
    entries : iterable of (str, Any)
        Location, for messages, and content of each entry.
    to_row : callable
        Converts an entry to a row, or raises an :class:`InputError`.
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
    path: Path,
    release: str,
    to_row: Callable[[dict[str, Any]], dict[str, Any]],
    limit: int | None,
    skip_bad: bool,
    field: str | None = None,
) -> Rows:
    """Read a file of a dataset's official release: a JSON object with a list of rows in ``field``, otherwise JSON Lines.

    The other parameters are those of :func:`collect_rows`.
    """
    if field is None:
        return collect_rows(read_json_lines(path, release), lambda line: to_row(parse_object(line)), limit, skip_bad)
    entries = read_json(path, f"--data_dir must be the folder of {release}'s official files; download it again").get(field)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{path} does not have the {release} format: expected an object with a list "{field}" of objects')
    places = (f'{path}, entry {number} of "{field}"' for number in range(len(entries)))
    return collect_rows(zip(places, entries, strict=True), to_row, limit, skip_bad)


def parse_conversation(line: bytes, place: str) -> Conversation:
    """Parse and check one line of a file of conversations, in which images are file names.

    Raises
    ------
    InputError
        If the line is invalid; the message names ``place``, the file and line, and what is expected.
    """
    conversation = read_conversation(parse_object(line, place), place)
    for error in file_faults(conversation, place):
        raise error
    return conversation


def file_faults(conversation: Conversation, place: str) -> Iterator[InputError]:
    """Yield all errors of a conversation from a file of conversations, without checking the image files."""
    yield from conversation_faults(conversation, place)
    if any(isinstance(name, dict) for name in listed_images(conversation)):
        yield InputError('"images" must contain file names', place)


def listed_images(conversation: Conversation) -> list[Any]:
    """All usable entries of the ``images`` lists of a conversation, which may be invalid."""
    found = [turn.get("images") for turn in conversation["conversations"]]
    return [image for images in found if isinstance(images, list) for image in images if is_picture(image)]


def load_conversations(path: Path, image_dir: Path, limit: int | None = None, bar: bool = True, skip_bad: bool = False) -> Rows:
    """Load a file of conversations; :func:`~.conversations.read_conversation` lists the formats.

    The file is checked and converted to Arrow once, in the cache of ``datasets``, from which rows are read one by one. Later
    runs therefore load a million rows in seconds and without copying them to memory. All images are checked in every run.

    Parameters
    ----------
    path : Path
        JSON Lines file, JSON array or CSV table.
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
    Rows
        Conversations, with ``id`` and ``system`` (None if the row has none) and image names joined to ``image_dir``.

    Raises
    ------
    InputError
        If the file, a row or an image is invalid; the message names the file and line, or the image.
    """
    source = PreparedRows(first_on_each_machine(lambda: _prepare(path, skip_bad)), limit)
    if skip_bad and limit is None and (count := sum(1 for _ in read_json_lines(path)) - len(source)):
        say(f"{path}: {counted(count, 'invalid row')} skipped (--on_bad_sample skip)")
    turns = pc.list_flatten(source.column("conversations"))
    names = pc.list_flatten(pc.struct_field(turns, "images")).unique()

    def check(name: str) -> tuple[str | None, int]:
        file = picture_path(image_dir, name)
        doubt, state = check_picture(file), os.stat(file)
        return doubt, _hash(f"{name} {state.st_size} {state.st_mtime_ns}")

    num_workers = cores_per_process() if len(names) > world_size() * FEW_IMAGES else 0
    bad_files, found = check_all("images", (name.as_py() for name in names), check, len(names), bar, skip_bad, num_workers)
    unusable = {names[index].as_py() for index in bad_files}
    bad = {index for index, row in enumerate(source if unusable else []) if not unusable.isdisjoint(pictures(row))}

    def with_paths(row: dict[str, Any], _: str) -> dict[str, Any]:
        turns = [
            turn | {"images": [os.path.join(image_dir, name) for name in turn["images"] or []]} for turn in row["conversations"]
        ]
        return {"id": row["id"], "system": row["system"], "conversations": turns}

    share = slice(rank(), None, world_size())
    columns = [source.column(name).to_numpy()[share] for name in ("hash", "size", "num_images")]
    known = np.stack([np.arange(len(source))[share], *columns], axis=1)
    files = [os.path.join(image_dir, name.as_py()) for name in names[share] if name.as_py() not in unusable]
    images = sum(gather(sum(state for _, state in found)))
    rows = Rows(
        source,
        lambda index: f"{path}, {source[index]['place']}",
        convert=with_paths,
        fingerprint=f"{source.path.stem} {image_dir} {len(source)} {images}",
    )
    rows = rows.checked(bad, _share(known, bad, files, [doubt for doubt, _ in found if doubt]))
    if not len(rows):
        raise InputError("no rows are left", str(path))
    counts = f"{len(rows):,} row{'s' * (len(rows) > 1)} with {len(names):,} image{'s' * (len(names) != 1)}"
    say(f"{'data:':13}{path} ({describe_format(path)}): {counts} from {image_dir}", sys.stdout)
    return rows


def find_image_dir(path: Path) -> Path:
    """Return the folder of the images of a file: its own, if its first image is found there, otherwise ``images/`` in that.

    Only the folders are looked at if ``path`` is a pattern of shards or a Parquet file.
    """
    folder = path.parent / "images"
    if not folder.is_dir():
        return path.parent
    if path.is_file() and path.suffix != ".parquet":
        for place, line in read_lines(path):
            try:
                names = listed_images(read_conversation(parse_object(line, place), place))
            except InputError:  # loading the file reports it
                break
            if names:
                return path.parent if (path.parent / str(names[0])).is_file() else folder
    return folder


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
    found: dict[str | bytes, str | None | InputError] = {}  # rows may share images; what is suspicious or wrong about them
    known: list[tuple[int, int, int, int]] = []

    def check(index: int) -> None:
        place = rows.place(index)
        try:
            variants = list(conversations(rows[index]))
            if not variants:
                raise InputError("the row has no question: remove it")
        except InputError as error:
            raise error.at(place) from None
        for conversation in variants:
            check_conversation(conversation, place)
        keys = []
        for picture in pictures(variants[0]):
            keys.append(picture if isinstance(picture, str) else picture_content(picture))
            if keys[-1] not in found:
                try:
                    found[keys[-1]] = check_picture(picture, whole=isinstance(picture, str))
                except InputError as error:
                    found[keys[-1]] = error
            if isinstance(result := found[keys[-1]], InputError):
                raise result.at(place)
        known.append((index, content_hash(variants, keys), max(map(max_text_tokens, variants)), len(keys)))

    bad = set(check_all(f"{name}s", range(len(rows)), check, len(rows), bar, skip_bad)[0])
    doubts = [result for result in found.values() if isinstance(result, str)]
    rows = rows.checked(bad, _share(np.array(known, dtype=np.int64).reshape(-1, 4), bad, list(found), doubts))
    if not len(rows):
        raise InputError(f"no {name}s are left: the dataset has fewer rows than requested")
    return rows


def content_hash(conversations: list[Conversation], images: Sequence[str | bytes]) -> int:
    """Return a hash, int64, of the texts and the images of a row that can be converted to any of these conversations."""
    texts = [
        (conversation.get("system"), [(turn["user"], turn["assistant"]) for turn in conversation["conversations"]])
        for conversation in conversations
    ]
    return _hash(repr((texts, images)))


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _share(known: np.ndarray, bad: set[int], files: Sequence[str | bytes], doubts: list[str]) -> Contents:
    """Return contents without bad rows, whose indices are those of the remaining rows."""
    gone = np.array(sorted(bad), dtype=np.int64)
    known = known[~np.isin(known[:, 0], gone)]
    known[:, 0] -= np.searchsorted(gone, known[:, 0])
    return Contents(known, files, doubts)


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
    bad.report(what)
    return [index for index, _ in all_failures], results


def parse_object(line: bytes, place: str | None = None) -> dict[str, Any]:
    """Parse one line of a JSON Lines file.

    Raises
    ------
    InputError
        If the line is not a valid JSON object; the message names its location.
    """
    if len(line) > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes: split the conversation", place)
    return parse_json(line, "write one object per line, in UTF-8", place)


def _prepare(path: Path, skip_bad: bool = False) -> Path:
    """Convert a file of conversations to an Arrow file in the cache, if it is not there yet."""
    if not path.is_file():
        raise InputError(f"{path} is missing: put the file there, or name another file")
    state = path.stat()
    version = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {SCHEMA}{' skip bad' if skip_bad else ''}"
    prepared = cache_file(version, "arrow")
    if not prepared.exists():
        bad, lines = BadRows(skip_bad), read_json_lines(path)
        num_workers = cores_per_process() * local_world_size() if state.st_size > SMALL_FILE else 0
        chunks = iter(lambda: list(islice(lines, LINES_AT_ONCE)), [])

        def tables() -> Iterator[pa.Table]:
            for table, errors in in_parallel(partial(_convert, path), chunks, num_workers):
                for error in errors:
                    bad.add(error)
                yield table

        write_rows(prepared, SCHEMA, tables())
    return prepared


def _convert(path: Path, lines: list[tuple[str, bytes]]) -> tuple[pa.Table, list[InputError]]:
    """Convert lines of a file to a table of the valid rows, and return the errors of the others."""
    rows, errors = [], []
    for place, line in lines:
        try:
            row = parse_conversation(line, place)
        except InputError as error:
            errors.append(error)
            continue
        images = pictures(row)
        known = {
            "hash": content_hash([row], [str(image) for image in images]),
            "size": max_text_tokens(row),
            "num_images": len(images),
        }
        rows.append(row | known | {"place": place.removeprefix(f"{path}, ")})
    return pa.Table.from_pylist(rows, SCHEMA), errors
