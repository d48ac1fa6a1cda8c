"""The notebook, cell by cell, with the tiny checkpoint on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

NOTEBOOK = ROOT / "notebooks/finetune_on_a_T4.ipynb"
SCRIPT = "finetune_hf_trainer_jsonl.py"


def shell(command: str, scope: dict, folder: Path) -> str:
    """Run a line that starts with ! as IPython does: {expression} is replaced by its value."""
    command = re.sub(r"\{(.+?)\}", lambda match: str(eval(match[1], scope)), command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, f"{command}\n{run.stdout[-4000:]}"
    return run.stdout


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / SCRIPT).is_file(), reason=f"{SCRIPT} is not here")
def test_from_pictures_to_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    for name in (SCRIPT, "common", "tools", "assets", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = {"MODEL": TINY, "NUM_CROPS": 1, "FLAGS": "--batch_size 4 --max_steps 2 --max_new_tokens 4 --lora_rank 4"}
    scope: dict = {"__name__": "__main__"}
    printed = []
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells].count(["install"]) == 1
    for cell in cells:
        source = "".join(cell["source"])
        assert not cell["outputs"] and cell["execution_count"] is None
        if cell["metadata"].get("tags") == ["install"]:
            assert f"torch=={re.search(r'^torch==(.+)', (ROOT / 'requirements.txt').read_text(), re.M)[1]}" in source
            continue
        for part in re.split(r"^(!(?:.*\\\n)*.*)$", source, flags=re.M):
            if part.startswith("!"):
                printed.append(shell(part[1:], scope, tmp_path))
            else:
                exec(part, scope)
        if cell["metadata"].get("tags") == ["parameters"]:
            scope |= small
    shown = capsys.readouterr().out
    assert re.search(r"anls before: \d\.\d{3} on \d+ questions\nanls after: ", shown)
    assert "->" in shown
    assert (tmp_path / "output/mine/adapter_model.safetensors").is_file()
    assert (
        "adapter_model.safetensors"
        in subprocess.run(["tar", "-tzf", "adapter.tar.gz"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    )
