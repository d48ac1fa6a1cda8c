"""What convert_ucf101.py refuses, or leaves out when told to: clips, archives, folders and flags."""

import os
import subprocess
import tarfile
import time

import psutil
import pytest
from clips import truncate, write_clip
from converter import SCRIPT, contents, convert, make_tar, many_clips, refuse, rows, write_source


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def test_broken_clips_are_all_named(source, tmp_path):
    (source / "train/Run/a.avi").write_bytes(b"no video at all")
    truncate(source / "test/Run/d.avi", 0.1)
    message = refuse(tmp_path / "out", "--source", source)
    assert "Broken clip: train/Run/a.avi" in message
    assert "Broken clip: test/Run/d.avi" in message
    assert "2 of 4 clips cannot be decoded" in message
    assert "--skip_broken" in message


def test_skip_broken_leaves_out_and_counts(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    write_clip(source / "train/Walk/w.avi", 10)
    truncate(source / "train/Walk/w.avi", 0.1)
    (source / "train/Run/a.avi").write_bytes(b"")
    result = convert(out, "--source", source, "--skip_broken")
    assert "Broken clip: train/Run/a.avi" in result.stderr
    assert "Skipped 2 broken clips" in result.stdout
    assert [row["id"] for split in ("train", "val", "test") for row in rows(out, split)] == [
        "train-0000000000",
        "val-0000000001",
        "test-0000000002",
    ]
    assert len(contents(out)) == 3 * 8 + 3
    assert all("Walk" not in row["conversations"][0]["user"] for row in rows(out, "train"))  # no clip of it is left


def test_skip_broken_needs_one_good_clip_a_split(source, tmp_path):
    (source / "val/Jump/c.avi").write_bytes(b"")
    message = refuse(tmp_path / "out", "--source", source, "--skip_broken")
    assert "no clip of split 'val' can be decoded" in message


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name, member",
    [
        ("UCF101_subset/train/../../../evil.avi", b"x"),
        ("../train/Run/evil.avi", b"x"),
        ("/train/Run/evil.avi", b"x"),
        ("train/../evil.avi", b"x"),
        ("train/Evil", link("train/Evil", "/etc")),
        ("train/Evil", link("train/Evil", "../../..")),
        ("train/Run/e.avi", link("train/Run/e.avi", "../../etc/passwd", tarfile.LNKTYPE)),
    ],
)
def test_archive_member_outside_the_target_is_refused(source, tmp_path, name, member):
    clips = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.avi")}
    before = set(contents(tmp_path))
    archive = make_tar(tmp_path / "bad.tar.gz", {**clips, name: member})
    message = refuse(tmp_path / "out", "--source", archive)
    assert f"member {name!r} would be extracted outside" in message
    assert set(contents(tmp_path)) == before | {"bad.tar.gz"}


def test_damaged_archives(source, tmp_path):
    whole = make_tar(
        tmp_path / "whole.tar.gz", {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.avi")}
    ).read_bytes()
    half, garbled, text = tmp_path / "half.tar.gz", tmp_path / "garbled.tar.gz", tmp_path / "text.txt"
    half.write_bytes(whole[: len(whole) // 2])
    garbled.write_bytes(whole[:200] + b"\xff" * 200 + whole[400:])
    text.write_text("hello")
    for archive in (half, garbled, text):
        message = refuse(tmp_path / "out", "--source", archive)
        assert f"--source {archive}: not a tar archive, or damaged" in message


def test_unusable_sources(source, tmp_path):
    out = tmp_path / "out"
    assert "no such file or folder" in refuse(out, "--source", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no clips; expected {train,val,test}/<class>/*.avi" in refuse(out, "--source", tmp_path / "empty")
    assert "no clips" in refuse(out, "--source", make_tar(tmp_path / "empty.tar.gz", {}))
    assert "no clips" in refuse(out, "--source", source / "train")
    write_clip(tmp_path / "parent/one/train/Run/a.avi", 5)
    write_clip(tmp_path / "parent/two/train/Run/a.avi", 5)
    assert "more than one dataset (one and two)" in refuse(out, "--source", tmp_path / "parent")
    (source / "val/Jump/c.avi").rename(source / "val/c.avi")
    assert "split 'val' is missing" in refuse(out, "--source", source)
    (source / "val/c.avi").rename(source / "val/Jump/c.avi")
    write_clip(source / "test/Run/d.AVI", 5)
    assert "test/Run/d.AVI and test/Run/d.avi would have the same image names" in refuse(out, "--source", source)
    assert not out.exists()


def test_hub_out_of_reach(tmp_path):
    message = refuse(tmp_path / "out", env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")})
    assert "UCF101_subset.tar.gz of sayakpaul/ucf101-subset cannot be downloaded from the Hub" in message
    assert "--source" in message


@pytest.mark.parametrize("flag", ["--num_frames", "--num_workers"])
def test_counts_below_one(source, tmp_path, flag):
    assert f"argument {flag}: must be at least 1" in refuse(tmp_path / "out", "--source", source, flag, "0")


def test_out_dir_that_is_a_file(source, tmp_path):
    (tmp_path / "out").write_text("in the way")
    assert str(tmp_path / "out") in refuse(tmp_path / "out", "--source", source)


def test_killed_worker_ends_the_run(tmp_path):
    source, out = many_clips(tmp_path / "source"), tmp_path / "out"
    command = [*SCRIPT, "--source", str(source), "--out_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("images/*/*/*.jpg")):
        time.sleep(0.001)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "a worker process died" in message
    assert "Traceback" not in message
