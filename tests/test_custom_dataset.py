"""Every command in docs/custom_dataset.md is run unchanged; and its training in each of the formats."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forked import finetune_forked
from PIL import Image
from runs import write_random_model

from common.data.sources import parse_conversation

GUIDE = (ROOT / "docs/custom_dataset.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_finetune_a_model(tmp_path):
    for item in ("assets", "common", "tools", "finetune_hf_trainer_jsonl.py"):
        (tmp_path / item).symlink_to(ROOT / item)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    commands = re.findall(r"^```bash\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(commands) == 4
    for command in commands:
        result = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "<img " in (tmp_path / "data/mine/sheet.html").read_text()
    after = json.loads((tmp_path / "output/mine/eval_after.json").read_text())
    assert after["samples"] == 12
    assert after["exact"] > 0.9


@pytest.mark.slow
def test_every_format_trains_as_the_others(tmp_path):
    """The same questions in each format of the guide: the same split, the same losses and the same answers."""
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        Image.new("RGB", (60 + number, 50), (40 * number, 0, 0)).save(tmp_path / name)
    questions = [f"How red is number {number}?" for number in range(6)]
    asked = list(zip(names, questions, map(str, range(6)), strict=True))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *asked])
    files = {
        "general.jsonl": lambda image, user, assistant: {
            "conversations": [{"images": [image], "user": user, "assistant": assistant}]
        },
        "llava.json": lambda image, user, assistant: {
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{user}"}, {"from": "gpt", "value": assistant}],
        },
        "messages.jsonl": lambda image, user, assistant: {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": user}]},
                {"role": "assistant", "content": assistant},
            ]
        },
    }
    for name, to_row in files.items():
        rows = [to_row(*entry) for entry in asked]
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
    options = {"script": "finetune_hf_trainer_jsonl.py", "model_name_or_path": write_random_model(tmp_path / "model")}
    options |= {"processes": 1, "deepspeed": "none", "max_steps": 1, "eval_fraction": 0.2, "task_name": "reds"}
    logs = {}
    for name in ("table.csv", *files):
        output = tmp_path / f"out-{name}"
        log = finetune_forked(tmp_path, output, train_file=name, **options)
        after = json.loads((output / "eval_after.json").read_text())
        logs[name] = log, after["metric"], [entry["answers"] for entry in after["predictions"]]
        assert f"data:        {tmp_path / name} (" in (tmp_path / f"out-{name}.log").read_text()
    assert all(found == logs["table.csv"] for found in logs.values())


def test_the_example_of_the_format_is_valid():
    [example] = re.findall(r"^```json\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(parse_conversation(example.encode(), "the guide")["conversations"]) == 2
