"""Atomic writes of files, and strict reading and checking of JSON."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .process import InputError, excerpt

# What is expected of a value in a JSON file, and whether it is that.
Check = tuple[str, Callable[[Any], bool]]
TEXT: Check = ("a string", lambda value: isinstance(value, str))
OPTIONAL_PATH: Check = ("a name, a path or null", lambda value: value is None or is_path(value))
OBJECT: Check = ("an object", lambda value: isinstance(value, dict))
OBJECTS: Check = (
    "a list of objects",
    lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
)
NUMBER: Check = ("a number", lambda value: is_number(value))
COUNT: Check = ("an integer from 0", lambda value: type(value) is int and 0 <= value < 2**63)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; its file replaces ``path`` when the block completes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may write the same file on a shared file system; its own name may already be the longest.
    name = zlib.crc32(os.fsencode(path.name))
    temporary = path.with_name(f".{name:08x}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | dict[str, Any]) -> None:
    """Write a text, or a dict as JSON, atomically."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : Path
    remedy : str
        How to fix an invalid file, for the message.

    Raises
    ------
    InputError
        If the file is missing or does not contain a JSON object; the message names the file.
    """
    if not path.is_file():  # opening a FIFO would wait
        raise InputError(f"{path} is {'not a file' if path.exists() else 'missing'}: {remedy}")
    try:
        text = path.read_text(encoding="utf-8")  # with a byte order mark, other libraries could not read it
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}") from None
    return parse_json(text, remedy, str(path))


def parse_json(text: str | bytes, remedy: str, place: str | None = None) -> dict[str, Any]:
    """Parse a JSON object; ``place`` is its location, for messages, and otherwise as :func:`read_json`."""
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        content = _DECODER.decode(text)
        if not text.isascii() or "\\" in text:
            json.dumps(content, ensure_ascii=False).encode()  # fails for lone surrogates, which escapes can produce
    except (ValueError, RecursionError) as error:
        raise InputError(f"invalid JSON ({error}): {remedy}", place) from None
    if not isinstance(content, dict):
        raise InputError(f"expected a JSON object, got {type(content).__name__}: {remedy}", place)
    return content


def check_config(
    content: dict[str, Any], fields: dict[str, Check], path: str | Path, remedy: str = "copy it again", required: bool = False
) -> None:
    """Check the values of the JSON object in a file, where it has them; if ``required``, it must have all.

    Raises
    ------
    InputError
        For the first value that is not as expected.
    """
    for key, (expected, accepts) in fields.items():
        if required and key not in content:
            raise InputError(f"{path} has no {key}: {remedy}")
        if key in content and not accepts(content[key]):
            raise InputError(f"{key} must be {expected}, got {str(content[key])[:50]!r}: {remedy}", str(path))


def is_path(value: Any) -> bool:
    """Whether a JSON value is a text that can be the name of a file or directory; the system fails for others."""
    return (
        isinstance(value, str)
        and len(value) < 4096
        and "\0" not in value
        and all(len(part.encode("utf-8", "surrogatepass")) < 256 for part in value.split("/"))
    )


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, possibly not finite, that a float can hold."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def reject_duplicate_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of these fields; an ``object_pairs_hook``, with which Python would keep the last one."""
    if len(found := dict(fields)) < len(fields):
        names = [name for name, _ in fields]
        raise InputError(f'duplicate key "{excerpt(max(names, key=names.count))}"')
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)
