"""convert_ucf101.py, run as its users run it."""

import io
import os
import pty
import signal
import subprocess
import tarfile
import termios
import time

import av
import numpy as np
import psutil
import pytest
from clips import truncate, write_clip
from conftest import SHARED, needs_data
from converter import SCRIPT, contents, convert, many_clips, refuse, rows, shown, write_source
from PIL import Image

REAL_ARCHIVE = SHARED / "data/ucf101/UCF101_subset.tar.gz"


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


# --------------------------------------------------------------------------------------------------------------------
# What it writes
# --------------------------------------------------------------------------------------------------------------------


def test_writes_exactly_the_documented_files(source, tmp_path):
    out = tmp_path / "out"
    result = convert(out, "--source", source)
    pictures = [
        f"images/{clip}.{i}.jpg" for clip in ("train/Run/a", "train/Run/b", "val/Jump/c", "test/Run/d") for i in range(8)
    ]
    assert sorted(contents(out)) == sorted([*pictures, *(f"ucf101_{split}.jsonl" for split in ("train", "val", "test"))])
    assert "4 clips of 2 classes (train 2, val 1, test 1)" in result.stdout
    assert "4 of 4 clips" in result.stdout.splitlines()  # no terminal: plain lines
    assert result.stderr == ""


def test_rows(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    question = "Classify the video into one of the following classes: Jump, Run."
    assert (out / "ucf101_val.jsonl").read_text("utf-8") == (
        '{"id": "val-0000000002", "source": "ucf101", "conversations": [{"images": ['
        + ", ".join(f'"val/Jump/c.{i}.jpg"' for i in range(8))
        + f'], "user": "{question}", "assistant": "Jump"}}]}}\n'
    )
    ids = [row["id"] for split in ("train", "val", "test") for row in rows(out, split)]
    assert ids == ["train-0000000000", "train-0000000001", "val-0000000002", "test-0000000003"]
    first, second = rows(out, "train")
    assert first["conversations"][0]["images"][0] == "train/Run/a.0.jpg"
    assert second["conversations"][0]["images"][7] == "train/Run/b.7.jpg"


def test_takes_frames_evenly(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source, "--num_frames", "8")
    assert shown(out, "train/Run/b") == [i * 30 // 8 for i in range(8)]
    assert shown(out, "test/Run/d") == [i * 9 // 8 for i in range(8)]


@pytest.mark.parametrize("stated", [0, 5, 2000])
def test_does_not_trust_the_stated_frame_count(source, tmp_path, stated):
    clip = write_clip(source / "train/Run/a.avi", 40, stated=stated)
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == stated
    convert(tmp_path / "out", "--source", source)
    assert shown(tmp_path / "out", "train/Run/a") == [i * 40 // 8 for i in range(8)]


def test_uses_what_decodes_of_a_truncated_clip(source, tmp_path):
    clip = truncate(write_clip(source / "train/Run/a.avi", 60), 0.8)
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == 60
        left = sum(1 for _ in container.decode(video=0))
    assert 8 < left < 60
    convert(tmp_path / "out", "--source", source)
    assert shown(tmp_path / "out", "train/Run/a") == [i * left // 8 for i in range(8)]


@pytest.mark.parametrize("num_frames", [1, 8, 12])
def test_clip_shorter_than_the_frames_asked_for(source, tmp_path, num_frames):
    write_clip(source / "train/Run/a.avi", 3)
    convert(tmp_path / "out", "--source", source, "--num_frames", str(num_frames))
    assert shown(tmp_path / "out", "train/Run/a", num_frames) == [i * 3 // num_frames for i in range(num_frames)]
    assert len(rows(tmp_path / "out", "train")[0]["conversations"][0]["images"]) == num_frames


def test_class_names_with_blanks_and_accents(source, tmp_path):
    write_clip(source / "train/Saut à la perche/clip n° 1.avi", 8)
    write_clip(source / "test/跳水/v.1.avi", 8)
    out = tmp_path / "out"
    convert(out, "--source", source)
    row = rows(out, "train")[-1]
    assert row["conversations"][0]["assistant"] == "Saut à la perche"
    assert row["conversations"][0]["user"].endswith("classes: Jump, Run, Saut à la perche, 跳水.")
    for split in ("train", "val", "test"):
        for row in rows(out, split):
            assert all((out / "images" / name).is_file() for name in row["conversations"][0]["images"])
    assert "跳水" in (out / "ucf101_test.jsonl").read_text("utf-8")


def test_same_result_from_folder_parent_and_archive(source, tmp_path):
    (tmp_path / "parent").mkdir()
    subset = source.rename(tmp_path / "parent/UCF101_subset")
    (subset / "train/Run/._a.avi").write_bytes(b"what macOS leaves")
    (subset / "README.txt").write_text("no clip")
    with tarfile.open(tmp_path / "clips.tar.gz", "w:gz") as archive:
        archive.add(subset, "./UCF101_subset")
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        for split in ("val", "test", "train"):
            archive.add(subset / split, split)
    results = []
    for given in (subset, tmp_path / "parent", tmp_path / "clips.tar.gz", tmp_path / "flat.tar"):
        convert(tmp_path / f"out-{given.name}", "--source", given)
        results.append(contents(tmp_path / f"out-{given.name}"))
    assert len(results[0]) == 4 * 8 + 3
    assert all(result == results[0] for result in results[1:])


def test_default_source_is_the_hub_subset(source, tmp_path):
    snapshots = tmp_path / "hf/hub/datasets--sayakpaul--ucf101-subset"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs/main").write_text("0" * 40)
    (snapshots / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with tarfile.open(snapshots / "snapshots" / ("0" * 40) / "UCF101_subset.tar.gz", "w:gz") as archive:
        archive.add(source, "UCF101_subset")
    convert(tmp_path / "out", env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf/hub")})
    assert len(contents(tmp_path / "out")) == 4 * 8 + 3


@needs_data
def test_real_clips(tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", REAL_ARCHIVE)
    files = contents(out)
    assert sum(name.endswith(".jpg") for name in files) == 320
    assert len(files) == 320 + 3
    assert [len(rows(out, split)) for split in ("train", "val", "test")] == [20, 10, 10]

    with tarfile.open(REAL_ARCHIVE) as archive:
        clips = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    wrong_counts = 0
    for name, clip in clips.items():
        with av.open(io.BytesIO(clip)) as container:
            frames = list(container.decode(video=0))
            wrong_counts += container.streams.video[0].frames != len(frames)
        for i in range(8):
            picture = Image.open(out / "images" / f"{name.removeprefix('UCF101_subset/').removesuffix('.avi')}.{i}.jpg")
            expected = io.BytesIO()
            frames[i * len(frames) // 8].to_image().save(expected, "JPEG", quality=95)
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(expected)))
    assert wrong_counts > 0  # such clips occur in practice


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, and run again
# --------------------------------------------------------------------------------------------------------------------


def kill_when(condition, *flags):
    """Start the script, SIGKILL it as soon as `condition` holds, and wait until its workers are gone too."""
    process = subprocess.Popen([*SCRIPT, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not condition():
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1], "decoding processes outlive a killed script"
    return process.returncode


def test_killed_at_any_moment_it_goes_on(tmp_path):
    source, out = many_clips(tmp_path / "source"), tmp_path / "out"
    flags = ["--source", str(source), "--out_dir", str(out)]
    convert(tmp_path / "whole", "--source", source)

    for stop_at in (1, 100, 300):
        started = time.monotonic()
        returncode = kill_when(lambda stop_at=stop_at: len(list(out.glob("images/*/*/*.jpg"))) >= stop_at, *flags)
        assert returncode == -signal.SIGKILL, f"ended by itself after {time.monotonic() - started:.1f} s"
        assert not list(out.glob("*.jsonl"))
        for path in out.glob("images/*/*/*.jpg"):
            with Image.open(path) as image:
                image.load()
    (out / "images/train/Class0/.99999.part").write_bytes(b"half a picture")

    result = convert(out, "--source", source)
    assert contents(out) == contents(tmp_path / "whole")
    there_before = int(result.stdout.split(" up to date")[0].split()[-1])
    assert 30 <= there_before < 60

    # ... and while the lines are being written
    for path in out.glob("*.jsonl"):
        path.unlink()
    kill_when(lambda: bool(list(out.glob("*.jsonl"))), *flags)
    for path in out.glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    convert(out, "--source", source)
    assert contents(out) == contents(tmp_path / "whole")


def test_finished_run_is_not_done_again(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert "(0 converted, 4 up to date)" in convert(out, "--source", source).stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == times


def test_lost_and_damaged_pictures_are_made_again(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    before = contents(out)
    (out / "images/train/Run/a.3.jpg").unlink()
    (out / "images/train/Run/b.0.jpg").write_bytes(b"")
    cut = out / "images/val/Jump/c.7.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    assert "(3 converted, 1 up to date)" in convert(out, "--source", source).stdout
    assert contents(out) == before


@pytest.mark.parametrize("first, second", [(8, 3), (3, 8)])
def test_other_number_of_frames_replaces_all_pictures(source, tmp_path, first, second):
    convert(tmp_path / "out", "--source", source, "--num_frames", str(first))
    convert(tmp_path / "out", "--source", source, "--num_frames", str(second))
    convert(tmp_path / "fresh", "--source", source, "--num_frames", str(second))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_source_replaces_its_pictures_and_leaves_foreign_files(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    Image.new("RGB", (8, 8)).save(out / "images/train/Run/mine.jpg")
    other = tmp_path / "other"
    write_clip(other / "train/Run/a.avi", 50)  # of the same name
    write_clip(other / "val/Swim/x.avi", 20)
    write_clip(other / "test/Run/y.avi", 20)
    convert(out, "--source", other)
    convert(tmp_path / "fresh", "--source", other)
    left = contents(out)
    assert left.pop("images/train/Run/mine.jpg")
    assert left == contents(tmp_path / "fresh")
    assert not (out / "images/val/Jump").exists()


def test_lines_are_withdrawn_before_pictures_change(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    (source / "val/Jump/c.avi").write_bytes(b"broken")
    refuse(out, "--source", source)


# --------------------------------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, bars", [((), True), (("--no-tqdm",), False)])
def test_progress_bar_on_a_terminal(source, tmp_path, flags, bars):
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 100))
    command = [*SCRIPT, "--source", str(source), "--out_dir", str(tmp_path / "out"), *flags]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=its_end, text=True)
    os.write(its_end, b"end")
    shown_there = os.read(terminal, 65536).decode()
    os.close(terminal)
    os.close(its_end)
    assert ("clip/s" in shown_there) == bars
    assert ("4 of 4 clips" in result.stdout) != bars
