"""tools.predict: answers, and messages for invalid rows and flags."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import TINY

import tools.predict


def conversations(receipts: list[Path]) -> list[dict]:
    names = [path.name for path in receipts]
    return [
        {"id": "one", "conversations": [{"images": names[:1], "user": "What is the total?"}]},
        {"id": "two", "conversations": [{"images": names[1:], "user": "Which is larger?", "assistant": "The second."}]},
        {"id": "none", "conversations": [{"user": "Say something."}]},
        {
            "id": "turns",
            "conversations": [
                {"images": names[2:], "user": "What is this?", "assistant": "A receipt."},
                {"user": "And its total?"},
            ],
        },
    ]


def test_predictions_do_not_depend_on_the_batch(lora, receipts, predict, tmp_path):
    rows = conversations(receipts)
    data_file = tmp_path / "data.jsonl"
    data_file.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    flags = ("--model", lora, "--data_file", data_file, "--image_dir", receipts[0].parent, "--max_new_tokens", 6)
    predict(*flags, "--output_file", tmp_path / "out" / "batched.jsonl", "--eval_batch_size", 4)
    batched = [json.loads(line) for line in (tmp_path / "out" / "batched.jsonl").read_text().splitlines()]
    predictions, scores = ([row.pop(name, None) for row in batched] for name in ("prediction", "scores"))
    assert batched == rows
    assert scores == [None, {"exact": 0.0}, None, None]  # of the rows, one has an answer
    assert all(predictions)
    one_by_one = predict(*flags, "--eval_batch_size", 1, "--no-tqdm").splitlines()
    assert [json.loads(line)["prediction"] for line in one_by_one] == predictions
    single = predict("--model", lora, "--images", *receipts[1:], "--prompt", "Which is larger?", "--max_new_tokens", 6)
    assert single == f"{predictions[1]}\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[]", "line 2: expected a JSON object, got list"),
        ('{"conversations": [{"user": " "}]}', 'line 2, turn 1: "user" must be'),
        ('{"conversations": [{"user": "a"}, {"user": "b"}]}', 'line 2, turn 1: "assistant" must be'),
        ('{"conversations": [{"user": "a", "images": ["no.png"]}]}', "line 2: image .*no.png is missing"),
    ],
)
def test_invalid_rows_are_named(row, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"conversations": [{{"user": "fine"}}]}}\n{row}\n')
    with pytest.raises(ValueError, match=message):
        tools.predict.read_questions(path, tmp_path, bar=False)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--prompt a --data_file b",
        "--data_file b --images c",
        "--prompt a --image_dir b",
        "--prompt a --max_new_tokens 0",
        "--data_file b --dataloader_num_workers -1",
    ],
)
def test_contradicting_flags_are_refused(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "--model", str(TINY), *flags.split()])
    with pytest.raises(SystemExit):
        tools.predict.parse_args()
    assert re.search("error: .*--(prompt|images|image_dir|max_new_tokens|dataloader_num_workers)", capsys.readouterr().err)
