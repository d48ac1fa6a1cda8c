"""The layouts of a file of conversations: one JSON object per line, a JSON array, or a CSV table.

Whatever the layout, a row is passed on as the JSON text of one row, which :func:`~.reading.read_conversation` reads.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from common.runtime.files import reject_duplicate_keys
from common.runtime.process import InputError

from .reading import check_fields, format_name, parse_object

COLUMNS = ("image", "question", "answer")
OPTIONAL_COLUMNS = ("id", "system")
DELIMITERS = ",;\t"


def read_lines(path: Path) -> Iterator[tuple[str, bytes | InputError]]:
    """Read the rows of a file: the non-blank lines of a JSON Lines file, the entries of a JSON array, the rows of a CSV table.

    Yields
    ------
    tuple of (str, bytes or InputError)
        Location (file and line, or entry) of the row, and the row as JSON, or what is wrong with it.

    Raises
    ------
    InputError
        If a JSON array is invalid, or a CSV table is not as :func:`read_table` requires it.
    """
    if is_table(path):
        yield from read_table(path)
    elif is_array(path):
        try:
            entries = json.loads(path.read_bytes(), object_pairs_hook=reject_duplicate_keys)
            rows = [json.dumps(entry).encode() for entry in entries]
        except (ValueError, RecursionError) as error:
            raise InputError(f"invalid JSON ({error}): write one object per line, or one array of objects", str(path)) from None
        yield from ((f"{path}, entry {number}", row) for number, row in enumerate(rows, start=1))
    else:
        with path.open("rb") as file:
            yield from ((f"{path}, line {number}", line) for number, line in enumerate(file, start=1) if line.strip())


def read_table(path: Path) -> Iterator[tuple[str, bytes | InputError]]:
    """Read the rows of a CSV table with the columns ``image``, ``question``, ``answer`` and, optionally, ``id`` and ``system``.

    An empty ``image`` is a row of text only. The delimiter is the comma, semicolon or tab that is most frequent in the header.
    A row with more or fewer fields than the header is yielded as an :class:`InputError`, so that it can be skipped.

    Raises
    ------
    InputError
        If the file is not UTF-8, its quotes do not match, or a column is missing or unknown.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error}): save it as CSV UTF-8", str(path)) from None
    header = text.partition("\n")[0]
    table = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=header.count), strict=True)
    names: list[str] = []
    first = 1
    try:
        for fields in table:
            place, first = f"{path}, line {first}", table.line_num + 1
            if not names:
                names = _check_header([name.strip().lower() for name in fields], place)
            elif any(field.strip() for field in fields):
                if len(fields) != len(names):
                    remedy = "put quotes around texts that contain the delimiter"
                    yield place, InputError(f"{len(fields)} fields, but the header has {len(names)}: {remedy}", place)
                    continue
                yield place, json.dumps(_row_of_table(dict(zip(names, fields, strict=True)))).encode()
    except csv.Error as error:
        raise InputError(
            f"invalid CSV ({error}): quote texts, and double the quotes in them", f"{path}, line {first}"
        ) from None


def _check_header(names: list[str], place: str) -> list[str]:
    check_fields(names, (*COLUMNS, *OPTIONAL_COLUMNS), {}, place, "column")
    if missing := [name for name in COLUMNS if name not in names]:
        raise InputError(f'the header has no column "{missing[0]}": expected {", ".join(COLUMNS)}', place)
    if len(set(names)) < len(names):
        raise InputError("the header has a column twice: a row has one image here; for several, use JSON Lines", place)
    return names


def _row_of_table(fields: dict[str, str]) -> dict[str, object]:
    turn: dict[str, object] = {"user": fields["question"], "assistant": fields["answer"]}
    if fields["image"].strip():
        turn["images"] = [fields["image"].strip()]
    return {name: fields[name] for name in OPTIONAL_COLUMNS if fields.get(name)} | {"conversations": [turn]}


def describe_format(path: Path) -> str:
    """Name the layout of a file and the format of its first row, for the summary."""
    if is_table(path):
        return "CSV"
    layout = "a JSON array" if is_array(path) else "one JSON object per line"
    try:
        _, line = next(read_lines(path))
        return f"{format_name(parse_object(line))}, {layout}"
    except (InputError, StopIteration):  # reading the rows reports the error
        return layout


def is_table(path: Path) -> bool:
    """Whether a file is a CSV table, by its name."""
    return path.suffix.lower() in (".csv", ".tsv")


def is_array(path: Path) -> bool:
    """Whether a file is a JSON array, by its first character."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
