"""finetune_hf_trainer_ucf101.py on what convert_ucf101.py writes."""

import json
import sys

import datasets
import pytest
import torch
from conftest import TINY
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import finetune_hf_trainer_ucf101 as script
from common.data.collator import Collator
from common.data.samples import TrainingData

CLASSES = ("Archery", "Surfing", "Typing")
QUESTION = "Classify the video into one of the following classes: Archery, Surfing, Typing."


def load_rows(args):
    splits = (("train", args.max_train_samples), (args.eval_split, args.max_eval_samples))
    return [script.load_rows(args.data_dir, split, limit, args.tqdm, args.on_bad_sample == "skip") for split, limit in splits]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache that other tests do not use."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data_dir(tmp_path):
    """Clips of two plain frames in the converter's layout, with a colour per class."""
    number = 0
    for split in ("train", "val", "test"):
        lines = []
        for kind, name in enumerate(CLASSES):
            frames = [f"{split}/{name}/v_{name}.{frame}.jpg" for frame in (0, 1)]
            for frame in frames:
                path = tmp_path / "data/images" / frame
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 48), tuple(255 * (channel == kind) for channel in range(3))).save(path)
            turn = {"images": frames, "user": QUESTION, "assistant": name}
            lines.append({"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]})
            number += 1
        (tmp_path / f"data/ucf101_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def flags(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    return script.parse_args()


def ids(rows):
    return [row["id"] for row in rows]


def test_splits_and_defaults(data_dir, monkeypatch):
    args = flags(monkeypatch, "--data_dir", data_dir)
    assert args.num_crops == 4
    train_rows, eval_rows = load_rows(args)
    assert ids(train_rows) == ["train-0000000000", "train-0000000001", "train-0000000002"]
    assert ids(eval_rows) == ["val-0000000003", "val-0000000004", "val-0000000005"]
    turn = script.to_conversation(eval_rows[1], None)["conversations"][0]
    frames = [str(data_dir / f"images/val/Surfing/v_Surfing.{frame}.jpg") for frame in (0, 1)]
    assert turn == {"images": frames, "user": QUESTION, "assistant": "Surfing"}
    test_split = flags(monkeypatch, "--data_dir", data_dir, "--eval_split", "test", "--max_train_samples", 2)
    assert [ids(rows)[0] for rows in load_rows(test_split)] == ["train-0000000000", "test-0000000006"]
    assert len(load_rows(test_split)[0]) == 2


def test_missing_files_are_named(data_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"elsewhere/ucf101_train\.jsonl is missing"):
        load_rows(flags(monkeypatch, "--data_dir", data_dir / "elsewhere"))
    (data_dir / "images/val/Typing/v_Typing.1.jpg").unlink()
    with pytest.raises(ValueError, match=r"images/val/Typing/v_Typing\.1\.jpg is missing"):
        load_rows(flags(monkeypatch, "--data_dir", data_dir))


def test_evaluation_overall_and_per_class(data_dir, monkeypatch):
    args = flags(monkeypatch, "--data_dir", data_dir, "--max_new_tokens", 12, "--dataloader_num_workers", 0, "--no-tqdm")
    processor = AutoProcessor.from_pretrained(TINY, num_crops=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    train_rows, eval_rows = load_rows(args)
    # Until it always answers with one class.
    data = TrainingData(train_rows, script.to_conversation, processor, seed=0)
    batch = Collator(processor)([data[0, 0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(15):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = script.evaluate(model, processor, eval_rows, args)
    right = [entry.prediction == name.lower() for entry, name in zip(found.predictions, CLASSES, strict=True)]
    assert [entry.id for entry in found.predictions] == ["val-0000000003", "val-0000000004", "val-0000000005"]
    assert right == [True, False, False]
    assert found.values == {
        "accuracy": pytest.approx(1 / 3),
        "accuracy_per_class": {"Archery": 1.0, "Surfing": 0.0, "Typing": 0.0},
    }
