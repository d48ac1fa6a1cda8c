"""Every command in docs/custom_dataset.md is run unchanged."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from forked import run_program, torchrun

from common.data.sources import parse_conversation

GUIDE = (ROOT / "docs/custom_dataset.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_finetune_a_model(tmp_path):
    for item in ("assets", "common", "tools", "finetune_hf_trainer_jsonl.py"):
        (tmp_path / item).symlink_to(ROOT / item)
    draw, check, train, ask = re.findall(r"^```bash\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    program = re.fullmatch(r"python - <<'EOF'\n(.+)EOF\n", draw, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    for command in (check, train, ask):
        launcher, *words = shlex.split(command.replace("\\\n", ""))
        if launcher == "torchrun":
            assert words.pop(0) == "--nproc_per_node=2"
        result = (torchrun if launcher == "torchrun" else run_program)(*words, folder=tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stdout}"
    assert "<img " in (tmp_path / "data/mine/sheet.html").read_text()
    after = json.loads((tmp_path / "output/mine/eval_after.json").read_text())
    assert after["samples"] == 12
    assert after["exact"] > 0.9


def test_the_example_of_the_format_is_valid():
    [example] = re.findall(r"^```json\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(parse_conversation(example.encode(), "the guide")["conversations"]) == 2
