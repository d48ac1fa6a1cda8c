"""finetune_hf_trainer_nlvr2.py: sources, metrics, invalid data, runs."""

import json
import sys
from collections import defaultdict

import pytest
import torch
from conftest import SHARED, TINY, needs_data
from datasets import Dataset, Features, Image, List, Value
from forked import torchrun
from PIL import Image as PillowImage
from runs import flags as run_flags
from transformers import AutoModelForCausalLM, AutoProcessor

import finetune_hf_trainer_nlvr2 as script

PROMPT = (
    "The first image is the image on the left, the second image is the image on the right. Given the left and right images, "
    'does the statement "There are {2} dogs." hold true? Answer yes or no.'
)


def load_rows(args):
    return script.load_train_rows(args), script.load_eval_rows(args)


def write_release(folder, split, labels):
    """Two sentences of a set, each about several pairs, in the official layout."""
    rows = []
    for number, label in enumerate(labels):
        pair, sentence = number // 2, number % 2
        row = {"identifier": f"{split}-7-{pair}-{sentence}", "sentence": "There are {2} dogs.", "label": label}
        images = folder / "images" / split
        if split == "train":
            row["directory"] = 12
            images /= "12"
        images.mkdir(parents=True, exist_ok=True)
        for side in (0, 1):
            PillowImage.new("RGB", (40 + 20 * side, 40), (200 * side, 40 * pair, 9)).save(
                images / f"{split}-7-{pair}-img{side}.png"
            )
        rows.append(row)
    (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "nlvr2", "train", ["True", "False", "False", "True"])
    write_release(tmp_path / "nlvr2", "dev", ["False", "True", "True", "False", "True", "True"])
    return tmp_path / "nlvr2"


def flags(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    return script.parse_args()


def test_official_rows(release, monkeypatch):
    train_rows, eval_rows = load_rows(flags(monkeypatch, "--data_dir", release))
    assert [row["id"] for row in train_rows] == ["train-7-0-0", "train-7-0-1", "train-7-1-0", "train-7-1-1"]
    folder = release / "images/train/12"
    images = [str(folder / "train-7-1-img0.png"), str(folder / "train-7-1-img1.png")]
    turn = {"images": images, "user": PROMPT, "assistant": "False"}
    assert script.to_conversation(train_rows[2]) == {"conversations": [turn | {"assistant": "No."}]}
    assert script.to_conversation(train_rows[3]) == {"conversations": [turn | {"assistant": "Yes."}]}
    assert eval_rows[0]["images"] == [str(release / f"images/dev/dev-7-0-img{side}.png") for side in (0, 1)]
    limited = flags(monkeypatch, "--data_dir", release, "--max_train_samples", 3, "--max_eval_samples", 1)
    assert [len(rows) for rows in load_rows(limited)] == [3, 1]


@needs_data
def test_real_release(monkeypatch):
    train_rows, eval_rows = load_rows(flags(monkeypatch, "--data_dir", SHARED / "data/nlvr2", "--no-tqdm"))
    assert (len(train_rows), len(eval_rows)) == (299, 91)
    pairs = defaultdict(set)
    for row in eval_rows:
        split, set_number, pair, sentence = row["id"].split("-")
        pairs[split, set_number, sentence].add(pair)
    assert max(map(len, pairs.values())) > 1


def test_hub_rows(tmp_path, monkeypatch):
    rows = [
        {
            "images": [PillowImage.new("RGB", (50 + number, 40)), PillowImage.new("RGB", (30, 40))],
            "texts": [
                {"user": f"Question {number}.{question}", "assistant": "Yes.", "source": "nlvr2"}
                for question in range(number + 1)
            ],
        }
        for number in range(4)
    ]
    texts = [{"user": Value("string"), "assistant": Value("string"), "source": Value("string")}]
    Dataset.from_list(rows, Features({"images": List(Image()), "texts": texts})).to_parquet(tmp_path / "nlvr2/train-0.parquet")
    monkeypatch.setattr(script, "HUB", (str(tmp_path / "nlvr2"),))
    monkeypatch.setattr(script, "HUB_EVAL_ROWS", 2)
    train_rows, eval_rows = load_rows(flags(monkeypatch))
    # The first question of each row evaluates, every question trains.
    assert [row["question"] for row in eval_rows] == ["Question 0.0", "Question 1.0"]
    assert [row["question"] for row in train_rows] == [f"Question {row}.{i}" for row in (2, 3) for i in range(row + 1)]
    turn = script.to_conversation(train_rows[3])["conversations"][0]
    assert (turn["user"], turn["assistant"], len(turn["images"])) == ("Question 3.0", "Yes.", 2)
    assert set(turn["images"][0]) == {"bytes", "path"}  # not decoded
    limited = flags(monkeypatch, "--max_train_samples", 4, "--max_eval_samples", 1)
    assert [len(rows) for rows in load_rows(limited)] == [4, 1]
    args = flags(monkeypatch, "--max_new_tokens", 4, "--dataloader_num_workers", 0, "--no-tqdm")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = script.evaluate(model, AutoProcessor.from_pretrained(TINY, num_crops=1), eval_rows, args)
    assert list(found.values) == ["accuracy"]  # consistency requires statements, which the Hub's rows do not have
    assert [entry.id for entry in found.predictions] == ["0-0", "1-0"]


def test_evaluation(release, monkeypatch):
    args = flags(monkeypatch, "--data_dir", release, "--max_new_tokens", 4, "--dataloader_num_workers", 0, "--no-tqdm")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TINY, num_crops=1)
    found = script.evaluate(model, processor, load_rows(args)[1], args)
    assert list(found.values) == ["accuracy", "consistency"]
    assert [entry.answers for entry in found.predictions] == [["No."], ["Yes."], ["Yes."], ["No."], ["Yes."], ["Yes."]]
    right = [entry.prediction == entry.answers[0].lower().strip(".") for entry in found.predictions]
    assert found.values["accuracy"] == pytest.approx(sum(right) / 6)
    # Rows alternate between the two sentences.
    assert found.values["consistency"] == (all(right[::2]) + all(right[1::2])) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identifier": "dev-7"}, 'dev.json, line 7: requires "identifier", of the form split-set-pair-sentence'),
        ({"identifier": 7}, 'dev.json, line 7: requires "identifier"'),
        ({"sentence": None}, 'dev.json, line 7: requires "sentence" (a string) and "label" ("True" or "False")'),
        ({"label": "Maybe"}, 'dev.json, line 7: requires "sentence" (a string) and "label"'),
        ({"identifier": "dev-9-9-0"}, "dev-9-9-img0.png is missing: put the file there"),
    ],
)
def test_an_invalid_row_is_named(release, monkeypatch, change, message):
    row = {"identifier": "dev-7-0-0", "sentence": "There is a dog.", "label": "True"} | change
    with (release / "dev.json").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError) as raised:
        load_rows(flags(monkeypatch, "--data_dir", release))
    assert message in str(raised.value)


def test_a_row_without_directory_and_a_missing_file_are_named(release, monkeypatch):
    args = flags(monkeypatch, "--data_dir", release)
    (release / "train.json").write_text('{"identifier": "train-7-0-0", "sentence": "So.", "label": "True"}\n')
    with pytest.raises(ValueError, match=r'train\.json, line 1: requires "directory", the folder in images/train/'):
        load_rows(args)
    (release / "train.json").unlink()
    with pytest.raises(ValueError, match=r"train\.json is missing: --data_dir must be the folder of NLVR2's official files"):
        load_rows(args)


@pytest.mark.slow
def test_two_processes_finetune_and_evaluate(release, random_model, tmp_path):
    out = tmp_path / "out"
    options = {"model_name_or_path": random_model, "batch_size": 2, "batch_size_per_gpu": 1, "max_steps": 1}
    words = run_flags(release, out, **options, dataloader_num_workers=0, eval_batch_size=2)
    result = torchrun("finetune_hf_trainer_nlvr2.py", *words)
    assert result.returncode == 0, result.stdout
    after = json.loads((out / "eval_after.json").read_text())
    assert (after["metric"], after["samples"]) == ("accuracy", 6)
    assert {"accuracy", "consistency"} <= set(after)
    expected = [f"dev-7-{pair}-{sentence}" for pair in range(3) for sentence in range(2)]
    assert [entry["id"] for entry in after["predictions"]] == expected
