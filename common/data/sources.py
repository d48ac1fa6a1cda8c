"""Loading rows: from the Hub, from JSON Lines files, and conversations as a memory-mapped Arrow file.

On all processes that see the same files, a function returns the same rows or raises the same error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from common.runtime.collectives import first_on_each_machine, gather
from common.runtime.files import read_json, write_file
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, counted, local_world_size, rank, say, world_size

from .checks import check_all, content_hash, hash_text
from .conversations import max_text_tokens, pictures
from .formats import describe_format, read_lines
from .loader import in_parallel
from .pictures import check_picture, picture_path
from .prepared import PreparedRows, cache_file, can_be_opened, write_rows
from .reading import listed_images, parse_conversation, parse_object, read_conversation
from .rows import BadRows, Rows

TURN = pa.struct([("images", pa.list_(pa.string())), ("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("system", pa.string()), ("conversations", pa.list_(TURN)), ("place", pa.string())]
    + [(name, pa.int64()) for name in ("hash", "size", "num_images", "hash_by_name")]  # see Contents
)
LINES_AT_ONCE = 1000
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
        If the Hub cannot be reached, the dataset does not exist, or its images are not stored in it.
    """

    def load() -> Dataset:
        say(f"Loading {' '.join(name)} from the Hub or its cache")
        try:
            return load_dataset(*name, split=split).select_columns(columns)
        except (OSError, ValueError, DatasetGenerationError) as error:
            reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # it does not say why itself
            raise InputError(
                f"dataset {' '.join(name)} cannot be loaded from the Hub ({reason}): without access to the Hub, use --data_dir"
            ) from None

    rows = first_on_each_machine(load)
    require_stored_images(rows.features.arrow_schema, " ".join(name))
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            rows = rows.cast_column(column, [Image(decode=False)])
    place = partial("{}, {}, row {}".format, " ".join(name), split)
    if each is None:
        return Rows(rows, place)
    entries = _Entries(rows, each)
    return Rows(entries, lambda index: place(entries.numbers[index]))


class _Entries(Sequence[dict[str, Any]]):
    """The rows of a dataset, once for each entry of a column of lists, with only this entry."""

    def __init__(self, rows: Dataset, column: str) -> None:
        self.rows, self.column = rows, column
        counts = [len(found or []) for found in rows[column]]
        self.numbers = np.repeat(np.arange(len(rows)), counts)
        self.entries = np.array([entry for count in counts for entry in range(count)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.rows.__getitems__(self.numbers[indices].tolist())
        entries = self.entries[indices].tolist()
        return [row | {self.column: [row[self.column][entry]]} for row, entry in zip(rows, entries, strict=True)]


def require_stored_images(schema: pa.Schema, source: str) -> None:
    """Refuse a dataset from elsewhere that only names its images: it could name any file of this machine."""
    for field in schema:
        kind = getattr(field.type, "value_type", field.type)
        if field.name in ("image", "images") and not pa.types.is_struct(kind):
            raise InputError(f'the column "{field.name}" does not contain images, but {kind}: store them in it', source)


def read_json_lines(path: Path, release: str | None = None) -> Iterator[tuple[str, bytes | InputError]]:
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


def read_rows(
    path: Path,
    release: str,
    to_row: Callable[[dict[str, Any]], dict[str, Any]],
    limit: int | None,
    skip_bad: bool,
    field: str | None = None,
) -> Rows:
    """Read a file of a dataset's official release: a JSON object with a list of rows in ``field``, otherwise JSON Lines.

    Parameters
    ----------
    path : Path
    release : str
        Name of the dataset, for messages.
    to_row : callable
        Converts an object of the file to a row, or raises an :class:`InputError`.
    limit : int, optional
        Use only the first ``limit`` rows.
    skip_bad : bool
        Skip invalid rows instead of raising the first error.
    field : str, optional
    """
    entries: Iterable[tuple[str, Any]] = read_json_lines(path, release)
    if field:
        found = read_json(path, f"--data_dir must be the folder of {release}'s official files; download it again").get(field)
        if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
            raise InputError(f'{path} does not have the {release} format: expected an object with a list "{field}" of objects')
        entries = ((f'{path}, entry {number} of "{field}"', entry) for number, entry in enumerate(found))
    rows, places, bad = [], [], BadRows(skip_bad)
    for place, entry in entries:
        try:
            rows.append(to_row(entry if field else parse_object(entry)))
            places.append(place)
        except InputError as error:
            bad.add(error.at(place))
        if len(rows) == limit:
            break
    bad.report("reading")
    return Rows(rows, places.__getitem__)


def load_conversations(path: Path, image_dir: Path, limit: int | None = None, bar: bool = True, skip_bad: bool = False) -> Rows:
    """Load a file of conversations; :func:`~.reading.read_conversation` lists the formats.

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
    prepared = first_on_each_machine(lambda: _prepare(path, skip_bad))
    source = PreparedRows(prepared, limit)
    bad_rows = BadRows(skip_bad)
    for rows_before, message in json.loads(_errors_of(prepared).read_text()):
        if limit is None or rows_before < limit:
            bad_rows.add(InputError(message))
    table = source.columns("conversations", "hash", "size", "num_images", "hash_by_name")
    names = pc.list_flatten(pc.struct_field(pc.list_flatten(table["conversations"]), "images")).unique()

    def check(name: str) -> tuple[str | None, int]:
        file = picture_path(image_dir, name)
        doubt, state = check_picture(file), os.stat(file)
        return doubt, hash_text(f"{name} {state.st_size} {state.st_mtime_ns}")

    num_workers = cores_per_process() if len(names) > world_size() * FEW_IMAGES else 0
    bad_files, found = check_all("images", (name.as_py() for name in names), check, len(names), bar, skip_bad, num_workers)
    unusable = {names[index].as_py() for index in bad_files}
    bad = {index for index, row in enumerate(source if unusable else []) if not unusable.isdisjoint(pictures(row))}
    for index in sorted(bad):
        bad_rows.add(InputError("one of its images cannot be used", f"{path}, {source[index]['place']}"))
    bad_rows.report(str(path))

    folder = str(image_dir)

    def with_paths(row: dict[str, Any], _: str) -> dict[str, Any]:
        for turn in row["conversations"]:
            turn["images"] = [os.path.join(folder, name) for name in turn["images"] or []]
        return {name: row[name] for name in ("id", "system", "conversations")}

    share = slice(rank(), None, world_size())
    columns = [table[name].to_numpy() for name in ("hash", "size", "num_images", "hash_by_name")]
    known = np.stack([np.arange(len(source)), *columns], axis=1)
    # Images of the same name in different folders are not the same.
    known[known[:, 3] > 0, 1] ^= hash_text(str(image_dir))
    files = [os.path.join(image_dir, name.as_py()) for name in names[share] if name.as_py() not in unusable]
    images = sum(gather(sum(state for _, state in found)))
    rows = Rows(
        source,
        lambda index: f"{path}, {source[index]['place']}",
        convert=with_paths,
        fingerprint=f"{source.path.stem} {image_dir} {len(source)} {images}",
    )
    rows = rows.checked(bad, known[share], files, [doubt for doubt, _ in found if doubt])
    if not len(rows):
        raise InputError("no rows are left", str(path))
    counts = f"{counted(len(rows), 'row')} with {counted(len(names) - len(unusable), 'image')}"
    say(f"{'data:':13}{path} ({describe_format(path)}): {counts} from {image_dir}", sys.stdout)
    return rows


def find_image_dir(path: Path) -> Path:
    """Return the folder of the images of a file: its own, if its first image is found there, otherwise ``images/`` in that.

    Only the folders are looked at if ``path`` is a Parquet file.
    """
    folder = path.parent / "images"
    if not folder.is_dir():
        return path.parent
    if path.is_file() and path.suffix != ".parquet":
        for place, line in read_lines(path):
            try:
                names = listed_images(read_conversation(parse_object(line, place), place))
            except InputError:  # loading the file reports or skips it
                continue
            if names:
                return path.parent if os.path.isfile(path.parent / str(names[0])) else folder
    return folder


def _prepare(path: Path, skip_bad: bool = False) -> Path:
    """Convert a file of conversations to an Arrow file in the cache, if it is not there yet."""
    if not path.is_file():
        raise InputError(f"{path} is missing: put the file there, or name another file")
    state = path.stat()
    version = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {SCHEMA}{' skip bad' if skip_bad else ''}"
    prepared = cache_file(version, "arrow")
    if not can_be_opened(prepared) or not _errors_of(prepared).is_file():
        lines, total = read_json_lines(path), 0
        messages: list[tuple[int, str]] = []
        num_workers = cores_per_process() * local_world_size() if state.st_size > SMALL_FILE else 0
        chunks = iter(lambda: list(islice(lines, LINES_AT_ONCE)), [])

        def tables() -> Iterator[pa.Table]:
            nonlocal total
            for table, errors in in_parallel(partial(_convert, path), chunks, num_workers):
                if errors and not skip_bad:
                    raise errors[0][1]
                messages.extend((total + before, str(error)) for before, error in errors)
                total += len(table)
                yield table

        write_rows(prepared, SCHEMA, tables())
        write_file(_errors_of(prepared), json.dumps(messages))
    return prepared


def _errors_of(prepared: Path) -> Path:
    """The file beside an Arrow file with the errors of the rows that were skipped, each with the number of rows before it."""
    return prepared.with_suffix(".json")


def _convert(path: Path, lines: list[tuple[str, bytes | InputError]]) -> tuple[pa.Table, list[tuple[int, InputError]]]:
    """Return the valid rows among lines of a file, and the errors of the others, each with the number of rows before it."""
    rows: list[dict[str, Any]] = []
    errors: list[tuple[int, InputError]] = []
    prefix = f"{path}, "
    for place, line in lines:
        try:
            row = parse_conversation(line, place)
        except InputError as error:
            errors.append((len(rows), error))
            continue
        images = pictures(row)
        known = {
            "hash": content_hash([row], [str(image) for image in images]),
            "size": max_text_tokens(row),
            "num_images": len(images),
            "hash_by_name": content_hash([row], [os.path.basename(str(image)) for image in images]),
        }
        rows.append(row | known | {"place": place.removeprefix(prefix)})
    return pa.Table.from_pylist(rows, SCHEMA), errors
