"""convert_ucf101.py: what it writes, what it refuses, and how it resumes."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path, PurePosixPath
from unittest import mock

import av
import huggingface_hub.constants
import numpy as np
import psutil
import pytest
from clips import frame_number, truncate, write_clip
from conftest import ROOT, SHARED, needs_data
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import convert_ucf101
from common.runtime.process import InputError
from tools.clips import convert_clips

SPLITS = ("train", "val", "test")


def make_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """Write an archive of files, or of links, which have no content."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def convert(out_dir: Path, *flags: object, terminal: bool = False, fails: bool = False) -> str:
    """Run the converter in this process and return what it printed."""
    printed = io.StringIO()
    printed.isatty = lambda: terminal
    argv = ["convert_ucf101.py", "--num_workers", "2", "--out_dir", str(out_dir), *map(str, flags)]
    failed = False
    with mock.patch("sys.argv", argv), redirect_stdout(printed), redirect_stderr(printed):
        try:
            convert_ucf101.main(convert_ucf101.parse_args())
        except SystemExit as ended:
            printed.write(str(ended.code))
            failed = True
    assert failed == fails, printed.getvalue()
    return printed.getvalue()


def refuse(out_dir: Path, *flags: object) -> str:
    """Run the converter, which must fail without leaving JSONL files, and return what it printed."""
    printed = convert(out_dir, *flags, fails=True)
    assert not list(out_dir.glob("*.jsonl"))
    return printed


def rows(out_dir: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (out_dir / f"ucf101_{split}.jsonl").read_text("utf-8").splitlines()]


def contents(out_dir: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in out_dir.rglob("*") if path.is_file()}


def frames_of(out_dir: Path, clip: str, num_frames: int = 8) -> list[int]:
    """The numbers of the frames that were extracted from a clip."""
    return [frame_number(out_dir / f"images/{clip}.{index}.jpg") for index in range(num_frames)]


@pytest.fixture
def source(tmp_path):
    """Two classes with four clips."""
    for clip, num_frames in {"train/Run/b": 30, "train/Run/a": 20, "val/Jump/c": 16, "test/Run/d": 9}.items():
        write_clip(tmp_path / f"source/{clip}.avi", num_frames)
    return tmp_path / "source"


def test_the_documented_files_are_written(source, tmp_path):
    out = tmp_path / "out"
    printed = convert(out, "--source", source)
    clips = ("train/Run/a", "train/Run/b", "val/Jump/c", "test/Run/d")
    pictures = {f"images/{clip}.{i}.jpg" for clip in clips for i in range(8)}
    assert set(contents(out)) == pictures | {f"ucf101_{split}.jsonl" for split in SPLITS}
    assert "4 clips of 2 classes (train 2, val 1, test 1)" in printed
    assert "4 of 4 clips" in printed.splitlines()  # plain lines, because stderr is no terminal
    question = "Classify the video into one of the following classes: Jump, Run."
    assert (out / "ucf101_val.jsonl").read_text("utf-8") == (
        '{"id": "val-0000000002", "source": "ucf101", "conversations": [{"images": ['
        + ", ".join(f'"val/Jump/c.{i}.jpg"' for i in range(8))
        + f'], "user": "{question}", "assistant": "Jump"}}]}}\n'
    )
    ids = [row["id"] for split in SPLITS for row in rows(out, split)]
    assert ids == ["train-0000000000", "train-0000000001", "val-0000000002", "test-0000000003"]
    images = [row["conversations"][0]["images"] for row in rows(out, "train")]
    assert images == [[f"train/Run/{clip}.{i}.jpg" for i in range(8)] for clip in "ab"]


def test_frames_are_taken_evenly_from_what_decodes(source, tmp_path):
    """Also where the header states another number of frames, and from truncated clips."""
    lengths = {"train/Run/b": 30, "test/Run/d": 9, "train/Run/short": 3}
    write_clip(source / "train/Run/short.avi", 3)
    for stated in (0, 5, 2000):
        clip = write_clip(source / f"train/Run/{stated}.avi", 40, stated=stated)
        lengths[f"train/Run/{stated}"] = 40
        with av.open(str(clip)) as container:
            assert container.streams.video[0].frames == stated
    with av.open(str(truncate(write_clip(source / "train/Run/cut.avi", 60), 0.8))) as container:
        assert container.streams.video[0].frames == 60
        lengths["train/Run/cut"] = sum(1 for _ in container.decode(video=0))
    assert 8 < lengths["train/Run/cut"] < 60
    for num_frames in (8, 1, 12):
        convert(tmp_path / "out", "--source", source, "--num_frames", num_frames)
        for clip, length in lengths.items():
            assert frames_of(tmp_path / "out", clip, num_frames) == [i * length // num_frames for i in range(num_frames)], clip
        assert all(len(row["conversations"][0]["images"]) == num_frames for row in rows(tmp_path / "out", "train"))


def test_class_names_with_spaces_and_other_scripts(source, tmp_path):
    write_clip(source / "train/Saut à la perche/clip n° 1.avi", 8)
    write_clip(source / "test/跳水/v.1.avi", 8)
    out = tmp_path / "out"
    convert(out, "--source", source)
    turns = [row["conversations"][0] for split in SPLITS for row in rows(out, split)]
    assert [turn["assistant"] for turn in turns] == ["Run", "Run", "Saut à la perche", "Jump", "Run", "跳水"]
    assert turns[2]["user"].endswith("classes: Jump, Run, Saut à la perche, 跳水.")
    assert all((out / "images" / name).is_file() for turn in turns for name in turn["images"])
    assert "跳水" in (out / "ucf101_test.jsonl").read_text("utf-8")


def test_folder_parent_archive_and_hub_give_the_same_result(source, tmp_path, monkeypatch):
    (tmp_path / "parent").mkdir()
    subset = source.rename(tmp_path / "parent/UCF101_subset")
    (subset / "train/Run/._a.avi").write_bytes(b"macOS metadata")
    (subset / "README.txt").write_text("no clip")
    snapshots = tmp_path / "hub/datasets--sayakpaul--ucf101-subset"
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs/main").write_text("0" * 40)
    (snapshots / "snapshots" / ("0" * 40)).mkdir(parents=True)
    with tarfile.open(snapshots / "snapshots" / ("0" * 40) / "UCF101_subset.tar.gz", "w:gz") as archive:
        archive.add(subset, "./UCF101_subset")
    with tarfile.open(tmp_path / "flat.tar", "w") as archive:
        for split in ("val", "test", "train"):
            archive.add(subset / split, split)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    results = []
    for number, given in enumerate((subset, tmp_path / "parent", tmp_path / "flat.tar", None)):
        convert(tmp_path / f"out{number}", *(["--source", given] if given else []))
        results.append(contents(tmp_path / f"out{number}"))
    assert len(results[0]) == 4 * 8 + 3
    assert all(result == results[0] for result in results[1:])


@needs_data
def test_real_clips(tmp_path):
    out, real = tmp_path / "out", SHARED / "data/ucf101/UCF101_subset.tar.gz"
    convert(out, "--source", real)
    files = contents(out)
    assert sum(name.endswith(".jpg") for name in files) == 320
    assert len(files) == 320 + 3
    assert [len(rows(out, split)) for split in SPLITS] == [20, 10, 10]

    with tarfile.open(real) as archive:
        clips = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    for name, clip in list(clips.items())[::5]:
        with av.open(io.BytesIO(clip)) as container:
            frames = list(container.decode(video=0))
        for i in range(8):
            picture = Image.open(out / "images" / f"{name.removeprefix('UCF101_subset/').removesuffix('.avi')}.{i}.jpg")
            expected = io.BytesIO()
            frames[i * len(frames) // 8].to_image().save(expected, "JPEG", quality=95)
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(expected)))


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, and run again
# --------------------------------------------------------------------------------------------------------------------


def test_a_killed_conversion_resumes(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    video = write_clip(tmp_path / "clip.avi", 75).read_bytes()
    for split, count in {"train": 20, "val": 10, "test": 10}.items():  # which take seconds to convert
        for i in range(count):
            path = source / f"{split}/Class{i % 4}/clip{i:02d}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(video)
    command = [sys.executable, ROOT / "convert_ucf101.py", "--num_workers", "2", "--source", source, "--out_dir", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("images/*/*/*.jpg"))) < 160:
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(workers, timeout=10)[1], "workers outlive a killed script"
    assert not list(out.glob("*.jsonl"))
    for path in out.glob("images/*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
    (out / "images/train/Class0/.0123abcd.host.name-99999.part").write_bytes(b"half an image")

    printed = convert(out, "--source", source)
    assert 15 <= int(printed.split(" up to date")[0].split()[-1]) < 40
    convert(tmp_path / "whole", "--source", source)
    assert contents(out) == contents(tmp_path / "whole")


# Python's own thread that feeds the worker may fail as well.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_is_killed_while_the_next_clip_is_read(tmp_path):
    video = write_clip(tmp_path / "a.avi", 9).read_bytes()

    def kill_worker():
        [worker] = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        worker.kill()
        time.sleep(1)
        return video

    readers = {PurePosixPath("a.avi"): lambda: video, PurePosixPath("b.avi"): kill_worker}
    args = Namespace(out_dir=tmp_path, num_frames=1, num_workers=1, skip_broken=False, tqdm=False)
    with pytest.raises(InputError, match=r"a worker process died, .* one of: a\.avi"):
        convert_clips(readers, args)


def test_only_lost_and_damaged_images_are_converted_again(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert "(0 converted, 4 up to date)" in convert(out, "--source", source)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == times
    (out / "images/train/Run/a.3.jpg").unlink()
    (out / "images/train/Run/b.0.jpg").write_bytes(b"")
    cut = out / "images/val/Jump/c.7.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    assert "(3 converted, 1 up to date)" in convert(out, "--source", source)
    assert contents(out) == before


def test_other_settings_and_another_source_replace_all_images_and_no_other_files(source, tmp_path):
    out = tmp_path / "out"
    convert(tmp_path / "fresh", "--source", source)
    for num_frames in (3, 8):
        convert(out, "--source", source, "--num_frames", num_frames)
    assert contents(out) == contents(tmp_path / "fresh")
    info = PngInfo()
    info.add_text("comment", "mine")
    for name in ("mine.jpg", "mine.png"):
        Image.new("RGB", (8, 8)).save(out / "images/train/Run" / name, pnginfo=info)
    other = tmp_path / "other"
    write_clip(other / "train/Run/a.avi", 50)  # of the same name
    write_clip(other / "val/Swim/x.avi", 20)
    write_clip(other / "test/Run/y.avi", 20)
    convert(out, "--source", other)
    convert(tmp_path / "fresh of the other", "--source", other)
    left = contents(out)
    assert left.pop("images/train/Run/mine.jpg") and left.pop("images/train/Run/mine.png")
    assert left == contents(tmp_path / "fresh of the other")
    assert not (out / "images/val/Jump").exists()


def test_progress_on_a_terminal(source, tmp_path):
    bar = convert(tmp_path / "out", "--source", source, terminal=True)
    lines = convert(tmp_path / "out", "--source", source, "--no-tqdm", terminal=True)
    assert "clip/s" in bar and "4 of 4 clips" not in bar
    assert "clip/s" not in lines and "4 of 4 clips" in lines


# --------------------------------------------------------------------------------------------------------------------
# Invalid input
# --------------------------------------------------------------------------------------------------------------------


def test_broken_clips_are_all_named_and_skipped_on_request(source, tmp_path):
    out = tmp_path / "out"
    convert(out, "--source", source)
    (source / "train/Run/a.avi").write_bytes(b"no video at all")
    truncate(write_clip(source / "train/Walk/w.avi", 10), 0.1)
    message = refuse(out, "--source", source)  # which removes the JSONL files
    for part in ("Broken clip: train/Run/a.avi", "Broken clip: train/Walk/w.avi", "2 of 5 clips cannot be", "--skip_broken"):
        assert part in message
    printed = convert(out, "--source", source, "--skip_broken")
    assert "Broken clip: train/Run/a.avi" in printed and "(listed above) and skipped" in printed
    ids = [row["id"] for split in SPLITS for row in rows(out, split)]
    assert ids == ["train-0000000000", "val-0000000001", "test-0000000002"]
    assert len(contents(out)) == 3 * 8 + 3
    assert all("Walk" not in row["conversations"][0]["user"] for row in rows(out, "train"))  # none of its clips is left
    (source / "val/Jump/c.avi").write_bytes(b"")
    images = set(out.rglob("*.jpg"))
    message = refuse(out, "--source", source, "--skip_broken")
    assert "no clip of split 'val' can be decoded" in message
    assert set(out.rglob("*.jpg")) == images  # none is removed if the conversion fails


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
def test_an_archive_member_outside_the_target_is_refused(tmp_path, name, member):
    archive = make_tar(tmp_path / "bad.tar.gz", {"train/Run/a.avi": b"x", name: member})
    assert f"member {name!r} would be extracted outside" in refuse(tmp_path / "out", "--source", archive)
    assert set(contents(tmp_path)) == {"bad.tar.gz"}


def test_archives_made_to_take_memory_or_time_are_refused(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "header.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("train/Run/a.avi")
        member.pax_headers = {"comment": "a" * 2**19}
        archive.addfile(member)
    assert "headers of 524," in refuse(tmp_path / "out", "--source", tmp_path / "header.tar.gz")
    with tarfile.open(tmp_path / "headers.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"train/Run/{number}.avi")
            member.pax_headers = {"comment": "a" * 1000}
            archive.addfile(member)
    with monkeypatch.context() as patch:
        patch.setattr(convert_ucf101, "LARGEST_HEADERS", 3000)
        assert "headers of 3,0" in refuse(tmp_path / "out", "--source", tmp_path / "headers.tar")
    sparse = tarfile.TarInfo("train/Run/a.avi")
    sparse.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "old.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    for name, headers in (("0.1.tar", {"map": "0,1"}), ("1.0.tar", {"major": "1", "minor": "0"})):
        sparse = tarfile.TarInfo("train/Run/a.avi")
        sparse.pax_headers = {f"GNU.sparse.{key}": value for key, value in headers.items()}
        (tmp_path / name).write_bytes(sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    for name in ("old.tar", "0.1.tar", "1.0.tar"):
        assert "'train/Run/a.avi' is a sparse file" in refuse(tmp_path / "out", "--source", tmp_path / name)
    archive = make_tar(tmp_path / "a.tar.gz", {f"train/Run/{number}.avi": b"x" for number in range(4)})
    for limit in ("MOST_MEMBERS", "LARGEST_ARCHIVE"):
        with monkeypatch.context() as patch:
            patch.setattr(convert_ucf101, limit, 3)
            assert "pass a smaller archive" in refuse(tmp_path / "out", "--source", archive)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1
    nested = (long_name.tobuf() + b"a".ljust(512, b"\0")) * 2000
    (tmp_path / "nested.tar").write_bytes(nested)
    assert "not a tar archive, or damaged" in refuse(tmp_path / "out", "--source", tmp_path / "nested.tar")


def test_invalid_sources_and_flags(source, tmp_path, monkeypatch):
    out, files = tmp_path / "out", {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.avi")}
    whole = make_tar(tmp_path / "whole.tar.gz", files).read_bytes()
    damaged = {"half.tar.gz": whole[: len(whole) // 2], "garbled.tar.gz": whole[:200] + b"\xff" * 200 + whole[400:]}
    for name, content in (damaged | {"text.txt": b"hello"}).items():
        (tmp_path / name).write_bytes(content)
        assert f"--source {tmp_path / name}: not a tar archive, or damaged" in refuse(out, "--source", tmp_path / name)
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
    (source / "test/Run/d.AVI").unlink()
    for flag in ("--num_frames", "--num_workers"):
        assert f"argument {flag}: must be at least 1" in refuse(out, "--source", source, flag, 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    message = refuse(out)
    assert "UCF101_subset.tar.gz of sayakpaul/ucf101-subset cannot be downloaded from the Hub" in message
    assert "--source" in message and not out.exists()
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refuse(tmp_path / "file", "--source", source)
