"""docs/custom_dataset.md: every command in it, run as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from common.data.sources import parse_conversation

GUIDE = (ROOT / "docs/custom_dataset.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_from_pictures_and_a_table_to_a_finetuned_model(tmp_path):
    for item in ("assets", "common", "tools", "finetune_hf_trainer_ucf101.py"):
        (tmp_path / item).symlink_to(ROOT / item)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    commands = re.findall(r"^```bash\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(commands) == 5
    for command in commands:
        result = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    after = json.loads((tmp_path / "output/mine/eval_after.json").read_text())
    assert after["samples"] == 12
    assert after["accuracy"] > 0.9


def test_the_example_of_the_format_is_in_the_format():
    [example] = re.findall(r"^```json\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(parse_conversation(example.encode(), "the guide")["conversations"]) == 2
