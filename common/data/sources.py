"""Where rows come from: the hub, JSON-lines files, and the general format as an Arrow file that is read where it lies on disk.

Every function gives the same rows, or raises the same error, on all processes that find the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_dataset
from pyarrow import json as arrow_json

from common.runtime import InputError, Progress, first_on_each_machine, gather, rank, replacing, say, world_size

from .conversations import Conversation, check_conversation, conversation_faults, pictures
from .pictures import Picture, check_picture

T = TypeVar("T")

TURN = pa.struct([("images", pa.list_(pa.string())), ("user", pa.string()), ("assistant", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("conversations", pa.list_(TURN))])
BLOCK_SIZE = 16 * 2**20  # bytes read at once, and the longest line


def load_hub(*name: str, **options: Any) -> Any:
    """Load a data set of the hub; one process a machine downloads it.

    Parameters
    ----------
    name, options
        As ``datasets.load_dataset`` takes them.

    Raises
    ------
    InputError
        If the hub can't be reached, or has no such data set.
    """

    def load() -> Any:
        say(f"Fetching {' '.join(name)} from the hub, or from its cache")
        try:
            return load_dataset(*name, **options)
        except (OSError, ConnectionError, ValueError) as error:
            raise InputError(
                f"the hub's data set {' '.join(name)} can't be loaded ({error}); on a machine without access use --data_dir"
            ) from None

    return first_on_each_machine(load)


def read_json_lines(path: Path, release: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSON-lines file.

    Parameters
    ----------
    path : Path
    release : str, optional
        The data set to whose official release it belongs, for messages.

    Yields
    ------
    tuple of (str, dict)
        File and line, for messages, and the row.

    Raises
    ------
    InputError
        If there is no such file, it holds no rows, or a line is no JSON object.
    """
    if not path.is_file():
        remedy = f"--data_dir takes the folder of {release}'s official files" if release else "name a JSON-lines file"
        raise InputError(f"{path} is missing: {remedy}")
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", parse_object(line, f"{path}, line {number}")
                empty = False
    if empty:
        raise InputError(f"{path} is empty: it must hold one JSON object a line")


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


def load_conversations(path: Path, image_dir: Path, limit: int | None = None, bar: bool = True) -> Dataset:
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

    Returns
    -------
    datasets.Dataset
        Rows that are conversations, with ``id`` (None where the file has none) and whole paths of pictures.

    Raises
    ------
    InputError
        Naming the file and line, or the picture, and the remedy.
    """
    rows = Dataset.from_file(str(first_on_each_machine(lambda: _to_arrow(path))))
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    chunks = rows.data.column("conversations").chunks
    names = pa.chunked_array([pc.struct_field(turns.flatten(), "images").flatten() for turns in chunks]).unique()
    check_pictures((image_dir / name.as_py() for name in names), bar, len(names), whole=False)

    def with_paths(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for turns in batch["conversations"]:
            for turn in turns:
                turn["images"] = [os.path.join(image_dir, name) for name in turn["images"] or []]
        return batch

    return rows.with_transform(with_paths)


def check_pictures(images: Iterable[Picture], bar: bool = True, count: int | None = None, whole: bool = True) -> None:
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

    Raises
    ------
    InputError
        Naming the first picture that is not.
    """
    _check_all("pictures", images, partial(check_picture, whole=whole), len(images) if count is None else count, bar)


def check_rows(
    rows: Sequence[Any], conversations: Callable[[Any], Iterable[Conversation]], name: str, bar: bool = True
) -> None:
    """Check rows that hold their pictures: texts, tags, and that pictures can be decoded; each process a share of them.

    Parameters
    ----------
    rows : sequence
    conversations : callable
        All conversations that a row can become, on the same pictures.
    name : str
        What messages call a row.
    bar : bool
        False for ``--no-tqdm``.

    Raises
    ------
    InputError
        Naming a row, and what is wrong with it.
    """

    def check(number: int) -> None:
        try:
            found = list(conversations(rows[number]))
            if not found:
                raise InputError("nothing is asked: take the row out")
        except IndexError:
            raise InputError("it lacks a picture or a text: take the row out", f"{name} {number}") from None
        except InputError as error:
            raise error.at(f"{name} {number}") from None
        for conversation in found:
            check_conversation(conversation, f"{name} {number}")
        try:
            for picture in pictures(found[0]):
                check_picture(picture)
        except InputError as error:
            raise error.at(f"{name} {number}") from None

    if not len(rows):
        raise InputError(f"no {name}s are left: the data set is smaller than what is asked of it")
    _check_all(f"{name}s", range(len(rows)), check, len(rows), bar)


def _check_all(what: str, items: Iterable[T], check: Callable[[T], Any], count: int, bar: bool) -> None:
    """Check items, each process a share; an error that one of them finds is raised by all."""
    problem: InputError | None = None
    try:
        with Progress(f"Checking {what}", what, len(range(rank(), count, world_size())), bar) as progress:
            for item in islice(items, rank(), None, world_size()):
                check(item)
                progress.update()
    except InputError as error:
        problem = error
    for found in gather(problem):
        if found is not None:
            raise found


def parse_object(line: bytes, place: str) -> dict[str, Any]:
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


def _to_arrow(path: Path) -> Path:
    """Convert a file of the general format to an Arrow file in the cache, unless that was done before."""
    if not path.is_file():
        raise InputError(
            f"{path} is missing: put the data's JSONL file there (convert_ucf101.py writes UCF-101's), or name another"
        )
    state = path.stat()
    version = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {SCHEMA}".encode()).hexdigest()
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
        _explain(path)
        raise InputError(
            f"{path} can't be read ({error}): write one JSON object a line, with nothing but the format's fields"
        ) from None
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
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                parse_conversation(line, f"{path}, line {number}")
                empty = False
    if empty:
        raise InputError(f"{path} is empty: it must hold one conversation a line")
