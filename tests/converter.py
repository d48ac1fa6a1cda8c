"""convert_ucf101.py, run as its users run it, on a small source."""

import io
import json
import signal
import subprocess
import sys
import tarfile

from clips import frame_number, write_clip
from conftest import ROOT

SCRIPT = [sys.executable, str(ROOT / "convert_ucf101.py"), "--num_workers", "2"]


def run(out_dir, *flags, env=None):
    command = [*SCRIPT, "--out_dir", out_dir, *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=120)


def convert(out_dir, *flags, env=None):
    """Run the script; it must succeed."""
    result = run(out_dir, *flags, env=env)
    assert result.returncode == 0, result.stderr
    return result


def refuse(out_dir, *flags, env=None):
    """Run the script; it must fail with one message, which is returned, and list no pictures."""
    result = run(out_dir, *flags, env=env)
    assert result.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in result.stderr
    assert not list(out_dir.glob("*.jsonl"))
    return result.stderr


def rows(out_dir, split):
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").read_text("utf-8").splitlines()]


def contents(out_dir):
    """Every file below a folder, by its path there."""
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}


def shown(out_dir, clip, num_frames=8):
    """Which frames a clip's pictures show."""
    return [frame_number(out_dir / f"images/{clip}.{i}.jpg") for i in range(num_frames)]


def make_tar(path, members):
    """Write an archive; `members` maps names to bytes, or to a TarInfo that needs none."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(info)
    return path


def write_source(folder):
    """Two classes, four clips."""
    for clip, num_frames in {"train/Run/b": 30, "train/Run/a": 20, "val/Jump/c": 16, "test/Run/d": 9}.items():
        write_clip(folder / f"{clip}.avi", num_frames)
    return folder


def many_clips(folder):
    """60 clips to convert, a few seconds' work."""
    write_clip(folder / "val/Class0/v.avi", 75)
    for split, count in {"train": 40, "val": 10, "test": 10}.items():
        for i in range(count):
            path = folder / f"{split}/Class{i % 4}/clip{i:02d}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((folder / "val/Class0/v.avi").read_bytes())
    (folder / "val/Class0/v.avi").unlink()
    return folder
