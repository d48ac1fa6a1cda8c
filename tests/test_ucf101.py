"""finetune_hf_trainer_ucf101.py on what convert_ucf101.py writes."""

import json

import pytest
from PIL import Image

import finetune_hf_trainer_ucf101 as script

CLASSES = ("Archery", "Surfing", "Typing")
QUESTION = "Classify the video into one of the following classes: Archery, Surfing, Typing."
pytestmark = pytest.mark.usefixtures("own_cache")


def load_rows(args):
    splits = (("train", args.max_train_samples), (args.eval_split, args.max_eval_samples))
    return [script.load_rows(args.data_dir, split, limit, args.tqdm, args.on_bad_sample == "skip") for split, limit in splits]


@pytest.fixture
def data_dir(tmp_path):
    """Clips of two plain frames in the converter's layout."""
    number = 0
    for split in ("train", "val", "test"):
        lines = []
        for name in CLASSES:
            frames = [f"{split}/{name}/v_{name}.{frame}.jpg" for frame in (0, 1)]
            for frame in frames:
                path = tmp_path / "data/images" / frame
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 48)).save(path)
            turn = {"images": frames, "user": QUESTION, "assistant": name}
            lines.append({"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]})
            number += 1
        (tmp_path / f"data/ucf101_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def ids(rows):
    return [row["id"] for row in rows]


def test_splits_and_defaults(data_dir, parse):
    args = parse(script, "--data_dir", data_dir)
    assert args.num_crops == 4
    train_rows, eval_rows = load_rows(args)
    assert ids(train_rows) == ["train-0000000000", "train-0000000001", "train-0000000002"]
    assert ids(eval_rows) == ["val-0000000003", "val-0000000004", "val-0000000005"]
    turn = script.to_conversation(eval_rows[1], None)["conversations"][0]
    frames = [str(data_dir / f"images/val/Surfing/v_Surfing.{frame}.jpg") for frame in (0, 1)]
    assert turn == {"images": frames, "user": QUESTION, "assistant": "Surfing"}
    test_split = parse(script, "--data_dir", data_dir, "--eval_split", "test", "--max_train_samples", 2)
    assert [ids(rows) for rows in load_rows(test_split)] == [
        ["train-0000000000", "train-0000000001"],
        ["test-0000000006", "test-0000000007", "test-0000000008"],
    ]


def test_missing_files_are_named(data_dir, parse):
    with pytest.raises(ValueError, match=r"elsewhere/ucf101_train\.jsonl is missing"):
        load_rows(parse(script, "--data_dir", data_dir / "elsewhere"))
    (data_dir / "images/val/Typing/v_Typing.1.jpg").unlink()
    with pytest.raises(ValueError, match=r"images/val/Typing/v_Typing\.1\.jpg is missing"):
        load_rows(parse(script, "--data_dir", data_dir))


def test_accuracy_overall_and_per_class(data_dir, parse, monkeypatch):
    args = parse(script, "--data_dir", data_dir)
    monkeypatch.setattr(script, "generate_answers", lambda model, processor, rows, args: [" archery"] * len(rows))
    found = script.evaluate(None, None, load_rows(args)[1], args)
    assert [entry.id for entry in found.predictions] == ["val-0000000003", "val-0000000004", "val-0000000005"]
    assert [entry.score for entry in found.predictions] == [1, 0, 0]
    per_class = {"Archery": 1.0, "Surfing": 0.0, "Typing": 0.0}
    assert found.values == {"accuracy": pytest.approx(1 / 3), "accuracy_per_class": per_class}
