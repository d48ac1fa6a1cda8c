"""The example of a new task in CONTRIBUTING.md is short, well formatted, and passes its own test."""

import re
import runpy
import subprocess
import sys
from functools import partial

import conftest
import forked
import pytest
from conftest import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w/.]+\.py)`:\n\n```python\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def checkout(tmp_path):
    """The repository with the example's files added."""
    (tmp_path / "tests").mkdir()
    for name in ("common", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_example_is_a_script_and_a_test_in_at_most_100_lines():
    assert list(FILES) == ["finetune_hf_trainer_folders.py", "tests/test_folders.py"]
    assert sum(content.count("\n") for content in FILES.values()) <= 100


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_the_example_is_well_formatted(command, checkout):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, *FILES], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_the_example_passes_its_test(checkout, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(conftest, "torchrun", partial(forked.torchrun, folder=checkout))
    [test] = [value for name, value in runpy.run_path(checkout / "tests/test_folders.py").items() if name.startswith("test_")]
    test(tmp_path_factory.mktemp("run"))
