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

NOTEBOOK = ROOT / "notebooks/finetune_on_a_T4.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
SMALL = {"MODEL": TINY, "NUM_CROPS": 1, "FLAGS": "--batch_size 2 --max_steps 1 --max_new_tokens 4 --lora_rank 4"}


def code(tag: str) -> str:
    """The code of the only cell with a tag."""
    [cell] = [cell for cell in CELLS if cell["metadata"].get("tags") == [tag]]
    return "".join(cell["source"])


def run_cell(source: str, scope: dict) -> None:
    """Run a cell as IPython does: a line that starts with ! is a command, in which {expression} is replaced by its value."""

    def shell(command: str) -> None:
        command = re.sub(r"\{(.+?)\}", lambda match: str(eval(match[1], scope)), command.replace("\\\n", ""))
        launcher, *words = shlex.split(command)
        if launcher == "python":
            run = run_program(*words, folder=Path.cwd())
        elif launcher == "torchrun":
            assert words[0] == "--nproc_per_node=1"
            run = torchrun(*words[1:], processes=1, folder=Path.cwd())
        else:
            run = subprocess.run([launcher, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout[-4000:]}"

    scope["shell"] = shell
    exec(re.sub(r"^( *)!((?:.*\\\n)*.*)$", lambda line: f"{line[1]}shell({line[2]!r})", source, flags=re.MULTILINE), scope)


def test_the_installation_is_that_of_the_makefile():
    """With the pinned torch, and without the packages that are built for another one."""
    uninstall, install, *_ = code("install").splitlines()
    assert uninstall.startswith("!pip uninstall ") and install.startswith("!pip install ")
    assert re.search(r"pip uninstall .*--yes (.+)", (ROOT / "Makefile").read_text())[1] in uninstall
    assert re.search(r"^torch==.+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[0] in install.split()


@pytest.mark.slow
def test_from_a_clone_and_pictures_to_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="set REPOSITORY"):
        run_cell(code("repository"), {})
    origin = tmp_path / "origin"
    origin.mkdir()
    for name in ("finetune_hf_trainer_jsonl.py", "common", "tools", "assets"):
        (origin / name).symlink_to(ROOT / name)
    for command in ("init", "add .", "-c user.name=me -c user.email=me@here commit -m all"):
        subprocess.run(["git", "-C", origin, *command.split()], check=True, capture_output=True)

    scope: dict = {}
    for cell in CELLS:
        assert not cell["outputs"] and cell["execution_count"] is None
        source = (
            "".join(cell["source"]).replace('REPOSITORY = ""', f'REPOSITORY = "{origin}"').replace("--train 40", "--train 10")
        )
        tags = cell["metadata"].get("tags")
        if tags != ["install"]:
            run_cell(source, scope)
        if tags == ["repository"]:
            assert Path.cwd() == tmp_path / "finetuning"
        if tags == ["parameters"]:
            scope |= SMALL
    shown = capsys.readouterr().out
    assert re.search(r"anls before: \d\.\d{3} on \d+ questions\nanls after: ", shown)
    assert "->" in shown
    assert Path("output/mine/adapter_model.safetensors").is_file()
    with tarfile.open("adapter.tar.gz") as archive:
        assert "./adapter_model.safetensors" in archive.getnames()
