"""Where rows come from: the hub, JSON-lines files, and the general format as an Arrow file that is read where it lies on disk.

Every function gives the same rows, or raises the same error, on all processes that find the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
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

from common.runtime import InputError, Progress, first_on_each_machine, gather, rank, replacing, say, world_size

from .conversations import Conversation, check_conversation, conversation_faults, pictures
from .pictures import Picture, check_picture
from .rows import BadRows, Rows

T = TypeVar("T")

TURN = pa.struct([("images", pa.list_(pa.string())), ("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("conversations", pa.list_(TURN))])
BLOCK_SIZE = 16 * 2**20  # bytes read at once, and the longest line


def load_hub(*name: str, columns: list[str], split: str = "train", each: str | None = None) -> Rows:
    """Load a split of a data set of the hub, one process of a machine downloading it; pictures stay encoded.

    Parameters
    ----------
    name
        Hub id or directory, and the configuration's name where there are several.
    columns : list of str
        What to read of each row.
    split : str
    each : str, optional
        Of these columns, one of lists: every entry becomes a row, its list holding that entry alone.

    Raises
    ------
    InputError
        If the hub can't be reached, or has no such data set.
    """

    def load() -> Dataset:
        say(f"Fetching {' '.join(name)} from the hub, or from its cache")
        try:
            return load_dataset(*name, split=split).select_columns(columns)
        except (OSError, ConnectionError, ValueError) as error:
            raise InputError(
                f"the hub's data set {' '.join(name)} can't be loaded ({error}); on a machine without access use --data_dir"
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
    """Read the lines of a JSON-lines file that are not blank.

    Parameters
    ----------
    path : Path
    release : str, optional
        The data set to whose official release it belongs, for messages.

    Yields
    ------
    tuple of (str, bytes)
        File and line, for messages, and the line.

    Raises
    ------
    InputError
        If there is no such file, or it holds no rows.
    """
    if not path.is_file():
        remedy = f"--data_dir takes the folder of {release}'s official files" if release else "name a JSON-lines file"
        raise InputError(f"{path} is missing: {remedy}")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line
                empty = False
    if empty:
        raise InputError(f"{path} is empty: it must hold one JSON object a line")


def collect_rows(
    entries: Iterable[tuple[str, Any]], to_row: Callable[[Any], dict[str, Any]], limit: int | None, skip_bad: bool = False
) -> Rows:
    """Turn the entries of a file into rows.

    Parameters
    ----------
    entries : iterable of (str, Any)
        Places, for messages, and what stands there.
    to_row : callable
        Turns an entry into a row, or raises an :class:`~common.runtime.InputError` that says what is wrong with it.
    limit : int, optional
        Take the first so many rows.
    skip_bad : bool
        Leave out bad entries instead of ending at the first.
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
    """Read a JSON-lines file of a data set's official release; parameters as :func:`collect_rows`."""
    return collect_rows(read_json_lines(path, release), lambda line: to_row(parse_object(line)), limit, skip_bad)


def parse_conversation(line: bytes, place: str) -> Conversation:
    """Read and check one line of the general format, in which pictures are names of files.

    Parameters
    ----------
    line : bytes
    place : str
        File and line, for messages.

    Raises
    ------
    InputError
        Naming the place, what is wrong, and what belongs there.
    """
    conversation = parse_object(line, place)
    for fault in row_faults(conversation, place):
        raise fault
    return conversation


def row_faults(row: dict[str, Any], place: str) -> Iterator[InputError]:
    """All that is wrong with a row of the general format; of its pictures only their names."""
    yield from conversation_faults(row, place)
    if not isinstance(row.get("id") or "", str):
        yield InputError('"id" must be a text: put it in quotes', place)
    if any(isinstance(name, dict) for name in picture_names(row)):
        yield InputError('"images" must hold names of files', place)


def picture_names(row: dict[str, Any]) -> list[Any]:
    """What stands where a row should name its pictures."""
    turns = row.get("conversations")
    found = [turn.get("images") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [name for images in found if isinstance(images, list) for name in images]


def load_conversations(
    path: Path, image_dir: Path, limit: int | None = None, bar: bool = True, skip_bad: bool = False
) -> Dataset:
    """Read a file of the general format; see :mod:`common.data.conversations`.

    The file is converted to Arrow once, in the cache of ``datasets``, and mapped into memory from there: a million rows start
    in seconds and take no memory of their own. Every row and every picture is checked.

    Parameters
    ----------
    path : Path
        JSONL file.
    image_dir : Path
        Folder that the names of pictures start from.
    limit : int, optional
        Take the first so many rows.
    bar : bool
        False for ``--no-tqdm``.
    skip_bad : bool
        Leave out bad rows instead of ending at the first.

    Returns
    -------
    datasets.Dataset
        Rows that are conversations, with ``id`` (None where the file has none) and whole paths of pictures.

    Raises
    ------
    InputError
        Naming the file and line, or the picture, and the remedy.
    """
    rows = Dataset.from_file(str(first_on_each_machine(lambda: _to_arrow(path, skip_bad))))
    if skip_bad and (count := sum(1 for _ in read_json_lines(path)) - len(rows)):
        say(f"{path}: {count:,} bad rows left out (--skip_bad_rows)")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    chunks = rows.data.column("conversations").chunks
    names = pa.chunked_array([pc.struct_field(turns.flatten(), "images").flatten() for turns in chunks]).unique()
    images = (image_dir / name.as_py() for name in names)
    if bad := check_pictures(images, bar, len(names), whole=False, skip_bad=skip_bad):
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
    """Check rows: texts, tags, and that pictures are there and can be decoded; each process a share of them.

    Parameters
    ----------
    rows : Rows
    conversations : callable
        All conversations that a row can become, on the same pictures.
    name : str
        What a row is, for messages: ``"training row"``.
    bar : bool
        False for ``--no-tqdm``.
    skip_bad : bool
        Leave out bad rows instead of ending at the first.

    Returns
    -------
    Rows
        All of them, or those that are not bad.

    Raises
    ------
    InputError
        Naming a row, and what is wrong with it.
    """
    checked: dict[Picture, InputError | None] = {}  # files, of which several rows may ask

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
                raise InputError("nothing is asked: take the row out")
        except IndexError:
            raise InputError("it lacks a picture or a text: take the row out", place) from None
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
        raise InputError(f"no {name}s are left: the data set is smaller than what is asked of it")
    return rows


def check_pictures(
    images: Iterable[Picture], bar: bool = True, count: int | None = None, whole: bool = True, skip_bad: bool = False
) -> list[int]:
    """Check that pictures are there and can be decoded, each process a share of them.

    Parameters
    ----------
    images : iterable
    bar : bool
        False for ``--no-tqdm``.
    count : int, optional
        How many pictures there are, where they don't know it themselves.
    whole : bool
        As :func:`~common.data.pictures.check_picture` takes it.
    skip_bad : bool
        Return which are bad instead of ending at the first.

    Returns
    -------
    list of int
        Numbers of the bad pictures.

    Raises
    ------
    InputError
        Naming the first picture that is not.
    """
    check = partial(check_picture, whole=whole)
    return _check_all("pictures", images, check, len(images) if count is None else count, bar, skip_bad)


def _check_all(
    what: str, items: Iterable[T], check: Callable[[T], Any], count: int, bar: bool, skip_bad: bool = False
) -> list[int]:
    """Check items, each process a share; an error that one of them finds is raised by all, or the items' numbers returned."""
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
    everywhere = sorted(chain.from_iterable(gather(found)), key=lambda bad: bad[0])
    bad = BadRows(skip_bad)
    for _, error in everywhere:
        bad.add(error)
    bad.report(what)
    return [index for index, _ in everywhere]


def parse_object(line: bytes, place: str | None = None) -> dict[str, Any]:
    """Read one line of a JSON-lines file.

    Raises
    ------
    InputError
        If it is no JSON object; names the place.
    """
    if len(line) > BLOCK_SIZE:
        raise InputError(f"longer than {BLOCK_SIZE:,} bytes: split the conversation", place)
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
        json.dumps(row, ensure_ascii=False).encode()  # escapes can spell half characters
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error}): write one object a line, in UTF-8", place) from None
    if not isinstance(row, dict):
        raise InputError(f"must be a JSON object, not {type(row).__name__}: write one object a line", place)
    return row


def _without_repeats(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, each of whose fields may stand there once."""
    if len(found := dict(fields)) < len(fields):
        [(name, _)] = Counter(name for name, _ in fields).most_common(1)
        raise InputError(f'"{name}" is there twice')
    return found


def _to_arrow(path: Path, skip_bad: bool = False) -> Path:
    """Convert a file of the general format to an Arrow file in the cache, unless that was done before."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: put the data's JSONL file there (convert_ucf101.py writes UCF-101's), or name another"
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
                # With a schema given, an answer like 2020-01-01 stays the text that it is.
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
                    raise InputError("it must hold one conversation a line")  # Arrow takes several, or one over several lines
    except (pa.ArrowInvalid, UnicodeError, InputError) as error:
        if skip_bad:
            return _good_lines_to_arrow(path, arrow)
        _explain(path)
        raise InputError(
            f"{path} can't be read ({error}): write one JSON object a line, with nothing but the format's fields"
        ) from None
    return arrow


def _good_lines_to_arrow(path: Path, arrow: Path) -> Path:
    """As :func:`_to_arrow`, one line after the other, without those that are bad."""
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
    """Check rows as :func:`parse_conversation` does, all at once; the message does not say which."""
    conversations = batch.column("conversations")
    turns = conversations.flatten()
    texts = pa.chunked_array([pc.struct_field(turns, "user"), pc.struct_field(turns, "assistant")])
    names = pc.struct_field(turns, "images").flatten()
    lengths = pc.fill_null(pc.list_value_length(conversations), 0)
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    if pc.any(pc.equal(lengths, 0)).as_py() or pc.any(empty).as_py() or names.null_count:
        raise InputError("a row is not in the general format")
    marked = (pc.match_substring_regex(pc.struct_field(turns, field), r"<[|/su]") for field in ("user", "assistant"))
    rows = pc.list_parent_indices(conversations).filter(pc.or_(*marked)).unique()
    for conversation in batch.take(rows).to_pylist():
        check_conversation(conversation, "a row")


def _explain(path: Path) -> None:
    """Read a file that can't be converted line by line, and raise an error that names the line."""
    for place, line in read_json_lines(path):
        parse_conversation(line, place)
