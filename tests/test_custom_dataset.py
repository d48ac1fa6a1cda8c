"""docs/custom_dataset.md: its commands are run unchanged, and its steps are walked with a file of each format."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from forked import finetune_forked, run_program, torchrun
from PIL import Image

from common.data.conversations import pictures
from common.data.reading import read_conversation

GUIDE = (ROOT / "docs/custom_dataset.md").read_text(encoding="utf-8").replace("\\\n", "")
EXAMPLES = [json.loads(text) for text in re.findall(r"^```json\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)]


def run(*words, folder=ROOT):
    result = run_program(*words, folder=folder)
    assert result.returncode == 0, f"{words}\n{result.stdout}"
    return result.stdout


@pytest.mark.slow
def test_the_commands_finetune_a_model(tmp_path):
    for item in ("assets", "common", "tools", "finetune_hf_trainer_jsonl.py"):
        (tmp_path / item).symlink_to(ROOT / item)
    draw, check, train, ask, others = re.findall(r"^```bash\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    program = re.fullmatch(r"python - <<'EOF'\n(.+)EOF\n", draw, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    run(*shlex.split(check)[1:], folder=tmp_path)
    result = torchrun(*shlex.split(train)[2:], folder=tmp_path)
    assert shlex.split(train)[1] == "--nproc_per_node=2" and result.returncode == 0, result.stdout
    assert "<img " in (tmp_path / "data/mine/sheet.html").read_text()
    after = json.loads((tmp_path / "output/mine/eval_after.json").read_text())
    assert after["samples"] == 8
    assert after["exact"] > 0.9
    run(*shlex.split(ask)[1:], folder=tmp_path)

    (tmp_path / "data/more").mkdir()
    (tmp_path / "data/more/images").symlink_to(tmp_path / "data/mine/images")
    rows = (tmp_path / "data/mine/labels.csv").read_text().splitlines()[:7]
    (tmp_path / "data/more/labels.csv").write_text("\n".join(rows))
    shutil.copytree(tmp_path / "output/mine", tmp_path / "output/mine-2")
    install, demo, *commands = map(shlex.split, others.splitlines())
    assert (install[0], demo[2]) == ("pip", "tools.demo")  # test_demo_browser.py runs the demo
    evaluate, predict, report = (run(*words[1:], folder=tmp_path) for words in commands)
    assert "on 6 samples" in evaluate and "6 answers written to answers.jsonl" in predict and "comparison.html" in report


def test_a_table_of_fields_becomes_questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "receipts.csv").write_text("file,date,total\n1.jpg,May 3,17.50\n")
    exec(re.search(r"^```python\n(.+?)^```", GUIDE, re.MULTILINE | re.DOTALL)[1], {})
    rows = (tmp_path / "labels.csv").read_text().splitlines()
    assert rows == ["image,question,answer", "1.jpg,What is the date?,May 3", "1.jpg,What is the total?,17.50"]


def test_every_format_is_checked_trained_on_and_answered(tmp_path, random_model):
    """With the examples of the guide, by one run."""
    general, llava, messages = EXAMPLES
    for row in EXAMPLES:
        for name in pictures(read_conversation(row, "the guide")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (90 + len(name), 90), "red").save(tmp_path / name)
    contents = {
        "general.jsonl": f"{json.dumps(general)}\n",
        "llava.json": json.dumps([llava]),
        "messages.jsonl": f"{json.dumps(messages)}\n",
        "table.csv": re.search(r"^image,question,answer\n.+\n", GUIDE, re.MULTILINE)[0],
    }
    files = [tmp_path / name for name in contents]
    for file, content in zip(files, contents.values(), strict=True):
        file.write_text(content)
    said = run("-m", "tools.check_data", "--data_file", *files, "--model_name_or_path", random_model, "--num_crops", 1)
    assert "No problems." in said
    formats = ("general format", "LLaVA or ShareGPT, a JSON array", "chat messages (OpenAI, TRL)", "CSV")
    assert all(f"{file} ({name}" in said for file, name in zip(files, formats, strict=True))
    flags = {"train_file": list(contents), "eval_file": "table.csv", "model_name_or_path": random_model, "max_steps": 1}
    flags |= {"use_lora": True, "lora_rank": 4}
    [step] = finetune_forked(tmp_path, tmp_path / "out", 1, "finetune_hf_trainer_jsonl.py", **flags)
    assert step["grad_norm"] > 0
    words = ["--model", tmp_path / "out", "--max_new_tokens", 4, "--dataloader_num_workers", 0]
    assert "on 1 sample" in run("-m", "tools.evaluate", *words, "--data_file", files[1])
    answers = tmp_path / "answers.jsonl"
    assert "1 answer written" in run("-m", "tools.predict", *words, "--data_file", files[0], "--output_file", answers)
