"""finetune_hf_trainer_nlvr2.py: sources, metrics, invalid data."""

import json
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken_files import stored_picture
from conftest import SHARED, needs_data
from PIL import Image

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
            Image.new("RGB", (40 + 20 * side, 40)).save(images / f"{split}-7-{pair}-img{side}.png")
        rows.append(row)
    (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "nlvr2", "train", ["True", "False", "False", "True"])
    write_release(tmp_path / "nlvr2", "dev", ["False", "True", "True", "False", "True", "True"])
    return tmp_path / "nlvr2"


def evaluate(rows, args, monkeypatch, answers):
    monkeypatch.setattr(script, "generate_answers", lambda *_: answers)
    return script.evaluate(None, None, rows, args)


def test_official_rows_are_evaluated_by_accuracy_and_consistency(release, parse, monkeypatch):
    args = parse(script, "--data_dir", release)
    train_rows, eval_rows = load_rows(args)
    assert [row["id"] for row in train_rows] == ["train-7-0-0", "train-7-0-1", "train-7-1-0", "train-7-1-1"]
    folder = release / "images/train/12"
    turn = {"images": [str(folder / f"train-7-1-img{side}.png") for side in (0, 1)], "user": PROMPT}
    assert script.to_conversation(train_rows[2]) == {"conversations": [turn | {"assistant": "No."}]}
    assert script.to_conversation(train_rows[3]) == {"conversations": [turn | {"assistant": "Yes."}]}
    assert eval_rows[0]["images"] == [str(release / f"images/dev/dev-7-0-img{side}.png") for side in (0, 1)]
    limited = parse(script, "--data_dir", release, "--max_train_samples", 3, "--max_eval_samples", 1)
    assert [len(rows) for rows in load_rows(limited)] == [3, 1]

    found = evaluate(eval_rows, args, monkeypatch, ["No.", "Yes", "yes.", "Yes", "Yes.", "Maybe"])
    assert [entry.answers for entry in found.predictions] == [["No."], ["Yes."], ["Yes."], ["No."], ["Yes."], ["Yes."]]
    # Rows alternate between two sentences, of which only the first has nothing but correct answers.
    assert [entry.score for entry in found.predictions] == [1, 1, 1, 0, 1, 0]
    assert found.values == {"accuracy": pytest.approx(4 / 6), "consistency": 0.5}


@needs_data
def test_real_release(parse):
    train_rows, eval_rows = load_rows(parse(script, "--data_dir", SHARED / "data/nlvr2", "--no-tqdm"))
    assert (len(train_rows), len(eval_rows)) == (299, 91)
    pairs = defaultdict(set)
    for row in eval_rows:
        split, set_number, pair, sentence = row["id"].split("-")
        pairs[split, set_number, sentence].add(pair)
    assert max(map(len, pairs.values())) > 1


@pytest.mark.usefixtures("own_cache")
def test_rows_of_the_hub(tmp_path, parse, monkeypatch):
    picture = {"bytes": stored_picture("PNG"), "path": None}
    texts = [
        [{"user": f"Question {number}.{question}", "assistant": "Yes."} for question in range(number + 1)]
        for number in range(4)
    ]
    (tmp_path / "nlvr2").mkdir()
    table = pa.Table.from_pylist([{"images": [picture] * 2, "texts": questions} for questions in texts])
    pq.write_table(table, tmp_path / "nlvr2/train-0.parquet")
    monkeypatch.setattr(script, "HUB", (str(tmp_path / "nlvr2"),))
    monkeypatch.setattr(script, "HUB_EVAL_ROWS", 2)
    args = parse(script)
    train_rows, eval_rows = load_rows(args)
    # The first question of each row evaluates, every question trains.
    assert [row["question"] for row in eval_rows] == ["Question 0.0", "Question 1.0"]
    assert [row["question"] for row in train_rows] == [f"Question {row}.{i}" for row in (2, 3) for i in range(row + 1)]
    assert train_rows.place(3) == f"{tmp_path}/nlvr2, train, row 3"  # the number in the data set
    turn = {"images": [picture] * 2, "user": "Question 3.0", "assistant": "Yes."}  # images are not decoded
    assert script.to_conversation(train_rows[3]) == {"conversations": [turn]}
    limited = parse(script, "--max_train_samples", 4, "--max_eval_samples", 1)
    assert [len(rows) for rows in load_rows(limited)] == [4, 1]
    found = evaluate(eval_rows, args, monkeypatch, ["Yes.", "No."])
    assert found.values == {"accuracy": 0.5}  # consistency requires statements, which the Hub's rows do not have
    assert [entry.id for entry in found.predictions] == ["0-0", "1-0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identifier": "dev-7"}, 'dev.json, line 7: requires "identifier", of the form split-set-pair-sentence'),
        ({"sentence": None}, 'dev.json, line 7: requires "sentence" (a string) and "label"'),
        ({"label": "Maybe"}, 'dev.json, line 7: requires "sentence" (a string) and "label"'),
        ({"identifier": "dev-9-9-0"}, "dev-9-9-img0.png is missing: put the file there"),
    ],
)
def test_an_invalid_row_is_named(release, parse, change, message):
    row = {"identifier": "dev-7-0-0", "sentence": "There is a dog.", "label": "True"} | change
    with (release / "dev.json").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError) as raised:
        load_rows(parse(script, "--data_dir", release))
    assert message in str(raised.value)


def test_a_row_without_directory_and_a_missing_file_are_named(release, parse):
    args = parse(script, "--data_dir", release)
    (release / "train.json").write_text('{"identifier": "train-7-0-0", "sentence": "So.", "label": "True"}\n')
    with pytest.raises(ValueError, match=r'train\.json, line 1: requires "directory", the folder in images/train/'):
        load_rows(args)
    (release / "train.json").unlink()
    with pytest.raises(ValueError, match=r"train\.json is missing: --data_dir must be the folder of NLVR2's official files"):
        load_rows(args)
