"""Atomic writes of files, and strict reading of JSON."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .process import InputError, excerpt


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; its file replaces ``path`` when the block completes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on several machines may write the same file on a shared file system.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
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
        return parse_json(path.read_bytes(), remedy, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): {remedy}") from None


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


def reject_duplicate_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of these fields; an ``object_pairs_hook``, with which Python would keep the last one."""
    if len(found := dict(fields)) < len(fields):
        names = [name for name, _ in fields]
        raise InputError(f'duplicate key "{excerpt(max(names, key=names.count))}"')
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)
