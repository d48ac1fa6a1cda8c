"""Files that are written whole or not at all."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, whose file takes the place of the one at `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may write the same file of a shared file system.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | dict[str, Any]) -> None:
    """Write a text, or an object as JSON, whole or not at all."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
