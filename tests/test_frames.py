"""tools.frames: clips of any folder, questions from folder names or a table."""

import json
import struct
from functools import partial

import av
import numpy as np
import pytest
from clips import frame_number, write_clip

import tools.frames
from tools.clips import sample_frames


@pytest.fixture
def clips(tmp_path):
    for clip, num_frames in {"run/a": 20, "jump/deep/b": 16, "c": 9}.items():
        write_clip(tmp_path / f"clips/{clip}.avi", num_frames)
    return tmp_path / "clips"


@pytest.fixture
def frames(run_main):
    """Runs the tool in this process and returns what it printed."""
    return partial(run_main, tools.frames, "--num_workers", 1)


def rows(out):
    return [json.loads(line) for line in (out / "clips.jsonl").read_text("utf-8").splitlines()]


def test_folder_names_are_the_answers(clips, tmp_path, frames):
    out = tmp_path / "out"
    frames("--clips", clips, "--out_dir", out, "--question", "What?", "--num_frames", 4)
    assert {row["id"]: row["conversations"][0]["assistant"] for row in rows(out)} == {
        "c.avi": "clips",
        "jump/deep/b.avi": "deep",
        "run/a.avi": "run",
    }
    images = rows(out)[2]["conversations"][0]["images"]
    assert images == [f"run/a.{i}.jpg" for i in range(4)]
    assert [frame_number(out / "images" / name) for name in images] == [0, 5, 10, 15]
    # A table with two questions about one clip; the images of the others go, those of this one stay.
    (tmp_path / "table.csv").write_text('clip,question,answer\nrun/a.avi,Who?,"She, or he"\nrun/a.avi,Where?,There\n')
    (out / "images/mine.txt").write_text("kept")
    said = frames("--clips", clips, "--out_dir", out, "--table", tmp_path / "table.csv", "--num_frames", 4)
    assert "2 questions about 1 of 3 clips" in said
    assert "4 images of 1 clip (0 converted, 1 up to date)" in said and "clips.jsonl: 2 rows" in said
    turns = [row["conversations"][0] for row in rows(out)]
    assert [(turn["images"], turn["user"], turn["assistant"]) for turn in turns] == [
        (images, "Who?", "She, or he"),
        (images, "Where?", "There"),
    ]
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert left == ["clips.jsonl", *(f"images/{name}" for name in ["mine.txt", *images])]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("clip,question\n", "table.csv: expected the columns clip, question and answer in the first line"),
        ("clip,question,answer\nrun/a.avi,Who?\n", "table.csv, line 2: expected clip, question and answer"),
        ("clip,question,answer\nrun/z.avi,Who?,She\n", "table.csv, line 2: there is no clip run/z.avi among --clips"),
        ("clip,question,answer\nbroken.avi,Who?,She\n", "1 of 1 clip cannot be decoded"),
        ("clip,question,answer\n", "table.csv: no rows"),
    ],
)
def test_what_cannot_be_converted_is_named(table, message, clips, tmp_path, frames):
    (tmp_path / "table.csv").write_text(table)
    (clips / "broken.avi").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=message):
        frames("--clips", clips, "--out_dir", tmp_path / "out", "--table", tmp_path / "table.csv")
    assert not (tmp_path / "out/clips.jsonl").exists()


def test_clips_that_would_share_their_images_are_refused(clips, tmp_path, frames):
    write_clip(clips / "run/a.mkv.avi", 9).rename(clips / "run/a.mkv")
    flags = ("--out_dir", tmp_path / "out", "--question", "What?")
    with pytest.raises(SystemExit, match=r"a\.avi and .*a\.mkv would have the same image names"):
        frames("--clips", clips, *flags)
    with pytest.raises(SystemExit, match="no such file or folder"):
        frames("--clips", clips / "none", *flags)
    (clips / "run/a.mkv").rename(clips / "\udcff.mkv")
    with pytest.raises(SystemExit, match=r"udcff\.mkv' is not valid UTF-8: rename it"):
        frames("--clips", clips, *flags)


def test_links_and_folders_keep_their_names(clips, tmp_path, frames):
    (tmp_path / "sorted/swim.mov").mkdir(parents=True)
    (tmp_path / "sorted/swim.mov/c.avi").symlink_to(clips / "c.avi")
    frames("--clips", tmp_path / "sorted", "--out_dir", tmp_path / "out", "--question", "What?")
    [row] = rows(tmp_path / "out")
    assert (row["id"], row["conversations"][0]["assistant"]) == ("swim.mov/c.avi", "swim.mov")


def test_frames_are_turned_as_a_player_shows_them(tmp_path):
    """A clip with a white upper half; its header says that it is to be turned to the right."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24] = 255
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    video = bytearray((tmp_path / "a.mp4").read_bytes())
    [lying] = sample_frames(bytes(video), 1)
    matrix = video.index(b"tkhd") + 44  # behind type, version, times, id, duration, layer and volume
    assert struct.unpack_from(">9i", video, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", video, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    [upright] = sample_frames(bytes(video), 1)
    assert lying.size == (64, 48) and upright.size == (48, 64)
    assert lying.getpixel((32, 2))[0] > 200 > 50 > lying.getpixel((32, 45))[0]
    assert upright.getpixel((45, 32))[0] > 200 > 50 > upright.getpixel((2, 32))[0]
