"""tools.frames: clips of any folder, questions from folder names or a table."""

import json
import sys

import pytest
from clips import frame_number, write_clip

import tools.frames


@pytest.fixture
def clips(tmp_path):
    for clip, num_frames in {"run/a": 20, "jump/deep/b": 16, "c": 9}.items():
        write_clip(tmp_path / f"clips/{clip}.avi", num_frames)
    return tmp_path / "clips"


def frames(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["frames", *map(str, flags), "--num_workers", "1"])
    tools.frames.main()


def rows(out):
    return [json.loads(line) for line in (out / "clips.jsonl").read_text("utf-8").splitlines()]


def test_folder_names_are_the_answers(clips, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    frames(monkeypatch, "--clips", clips, "--out_dir", out, "--question", "What?", "--num_frames", 4)
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
    capsys.readouterr()
    frames(monkeypatch, "--clips", clips, "--out_dir", out, "--table", tmp_path / "table.csv", "--num_frames", 4)
    assert "2 questions about 1 of 3 clips" in (said := capsys.readouterr().out)
    assert "2 rows, 4 images of 1 clip (0 converted, 1 up to date)" in said
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
def test_what_cannot_be_converted_is_named(table, message, clips, tmp_path, monkeypatch):
    (tmp_path / "table.csv").write_text(table)
    (clips / "broken.avi").write_bytes(b"no video")
    with pytest.raises(SystemExit, match=message):
        frames(monkeypatch, "--clips", clips, "--out_dir", tmp_path / "out", "--table", tmp_path / "table.csv")
    assert not (tmp_path / "out/clips.jsonl").exists()


def test_clips_that_would_share_their_images_are_refused(clips, tmp_path, monkeypatch):
    write_clip(clips / "run/a.mkv.avi", 9).rename(clips / "run/a.mkv")
    flags = ("--out_dir", tmp_path / "out", "--question", "What?")
    with pytest.raises(SystemExit, match=r"a\.avi and .*a\.mkv would have the same image names"):
        frames(monkeypatch, "--clips", clips, *flags)
    with pytest.raises(SystemExit, match="no such file or folder"):
        frames(monkeypatch, "--clips", clips / "none", *flags)
