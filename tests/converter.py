"""convert_ucf101.py, run in this process on small clips."""

import io
import json
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from clips import frame_number, write_clip
from conftest import ROOT

import convert_ucf101

COMMAND = [sys.executable, str(ROOT / "convert_ucf101.py"), "--num_workers", "2"]


def write_source(folder: Path) -> Path:
    """Write two classes with four clips."""
    for clip, num_frames in {"train/Run/b": 30, "train/Run/a": 20, "val/Jump/c": 16, "test/Run/d": 9}.items():
        write_clip(folder / f"{clip}.avi", num_frames)
    return folder


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """Write an archive of files, or of links, which have no content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def convert(out_dir: Path, *flags: object) -> str:
    """Run the converter in this process and return what it printed."""
    printed = io.StringIO()
    argv = ["convert_ucf101.py", "--num_workers", "2", "--out_dir", str(out_dir), *map(str, flags)]
    with mock.patch("sys.argv", argv), redirect_stdout(printed), redirect_stderr(printed):
        try:
            convert_ucf101.main()
        except SystemExit as ended:
            printed.write(str(ended.code))
            raise ConversionFailed(printed.getvalue()) from None
    return printed.getvalue()


class ConversionFailed(Exception):
    """The converter exited with an error."""


def refuse(out_dir: Path, *flags: object) -> str:
    """Run the converter, which must fail without leaving JSONL files, and return what it printed."""
    with pytest.raises(ConversionFailed) as failed:
        convert(out_dir, *flags)
    assert not list(out_dir.glob("*.jsonl"))
    return str(failed.value)


def rows(out_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").read_text("utf-8").splitlines()]


def contents(out_dir: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}


def frames_of(out_dir: Path, clip: str, num_frames: int = 8) -> list[int]:
    """The numbers of the frames that were extracted from a clip."""
    return [frame_number(out_dir / f"images/{clip}.{index}.jpg") for index in range(num_frames)]
