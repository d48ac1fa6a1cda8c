"""Files that are written whole or not at all, and by one process of a machine."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState

T = TypeVar("T")


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


def first_on_each_machine(prepare: Callable[[], T]) -> T:
    """Call a function on each machine's first process, then on the others; an error of the first must not keep them waiting."""
    with PartialState().local_main_process_first():
        try:
            return prepare()
        except ValueError as error:
            failure = error
    raise failure
