"""The notebook, cell by cell, with the tiny checkpoint on the CPU."""

import json
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from forked import run_program, torchrun

from assets import draw_samples

NOTEBOOK = ROOT / "notebooks/finetune_on_a_T4.ipynb"
SCRIPT = "finetune_hf_trainer_jsonl.py"


def shell(command: str, scope: dict, folder: Path) -> None:
    """Run a line that starts with ! as IPython does: {expression} is replaced by its value."""
    command = re.sub(r"\{(.+?)\}", lambda match: str(eval(match[1], scope)), command.replace("\\\n", ""))
    launcher, *words = shlex.split(command)
    if launcher == "python":
        run = run_program(*words, folder=folder)
    elif launcher == "torchrun":
        assert words[0] == "--nproc_per_node=1"
        run = torchrun(*words[1:], processes=1, folder=folder)
    else:
        run = subprocess.run([launcher, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout[-4000:]}"


@pytest.mark.slow
def test_from_pictures_to_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    draw = draw_samples.draw_samples
    monkeypatch.setattr(draw_samples, "draw_samples", lambda task, folder, train, val: draw(task, folder, train // 4, val))
    for name in (SCRIPT, "common", "tools", "assets", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    small = {"MODEL": TINY, "NUM_CROPS": 1, "FLAGS": "--batch_size 4 --max_steps 2 --max_new_tokens 4 --lora_rank 4"}
    scope: dict = {"__name__": "__main__"}
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
                shell(part[1:], scope, tmp_path)
            else:
                exec(part, scope)
        if cell["metadata"].get("tags") == ["parameters"]:
            scope |= small
    shown = capsys.readouterr().out
    assert re.search(r"anls before: \d\.\d{3} on \d+ questions\nanls after: ", shown)
    assert "->" in shown
    assert (tmp_path / "output/mine/adapter_model.safetensors").is_file()
    with tarfile.open(tmp_path / "adapter.tar.gz") as archive:
        assert "./adapter_model.safetensors" in archive.getnames()
