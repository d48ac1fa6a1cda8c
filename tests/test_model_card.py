"""Model cards, and the code in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adapters import logits
from conftest import TINY
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from common.report.model_card import write_model_card
from common.report.run import launch_command, write_run
from common.runtime.machine import cpu_name
from common.runtime.process import InputError
from tools.merge_lora import merge

# What the script evaluates on: rows of the Hub, or the official release.
HUB = {"type": "HuggingFaceM4/the_cauldron", "config": "hateful_memes", "split": "train[:500]"}
FILES = {"split": "dev_seen"}


def write_tiny_run(directory: Path, base_model: str = str(TINY), method: str = "LoRA", eval_set: dict = FILES) -> None:
    write_run(
        directory,
        task="Hateful Memes",
        base_model=base_model,
        base_revision="4a0d683eba9f1d0cbfb6151705d1ee73c25a80ca" if base_model != str(TINY) else None,
        method=method,
        data="8,000 rows train, 500 evaluate",
        hyperparameters={"learning_rate": 2e-4, "output_dir": directory, "bf16": True, "prompt": "a|b", "seed": None},
        datasets=["HuggingFaceM4/the_cauldron"],
        eval_set=eval_set,
    )
    for name, score in (("before", 0.125), ("after", 0.75)):
        evaluation = {"metric": "anls", "loss": 1.0, "anls": score, "samples": 1200, "predictions": [], "by_class": {}}
        (directory / f"eval_{name}.json").write_text(json.dumps(evaluation))


def test_run_json(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--output_dir", "my output"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    write_tiny_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "python finetune.py --output_dir 'my output'"
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert run["hyperparameters"]["output_dir"] == str(tmp_path)
    if not torch.cuda.is_available():
        assert run["hardware"] == f"1 CPU process on {os.cpu_count()} cores of {cpu_name()}" and cpu_name()
    described = {"task", "base_model", "base_revision", "method", "data", "datasets", "eval_set", "hyperparameters"}
    assert run.keys() == described | {"command", "date", "hardware", "versions"}

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch_command() == "torchrun --nproc_per_node=8 --nnodes=2 finetune.py --output_dir 'my output'"


@pytest.mark.parametrize(
    ("file", "content", "base", "relation", "eval_set"),
    [
        ("config.json", {}, "microsoft/Phi-3.5-vision-instruct", "finetune", HUB),
        ("adapter_config.json", {}, "microsoft/Phi-3.5-vision-instruct", "adapter", FILES),
        ("config.json", {"quantization_config": {}}, "someone/phi-memes", "quantized", HUB),
    ],
)
def test_the_hubs_library_reads_the_card(tmp_path, file, content, base, relation, eval_set):
    """`ModelCard.validate` asks the Hub itself; this is what its library checks without a network."""
    write_tiny_run(tmp_path, base_model="microsoft/Phi-3.5-vision-instruct", method="full", eval_set=eval_set)
    run = json.loads((tmp_path / "run.json").read_text())
    run["hyperparameters"]["hub_model_id"] = "someone/phi-memes"
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / file).write_text(json.dumps(content))
    write_model_card(tmp_path, name="someone/phi-memes")
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert (data.base_model, data.base_model_relation) == (base, relation)
    assert data.to_dict()["library_name"] == ("peft" if relation == "adapter" else "transformers")
    assert (data.license, data.pipeline_tag, data.model_name) == ("mit", "image-text-to-text", "phi-memes")
    assert data.datasets == ["HuggingFaceM4/the_cauldron"] and {"phi3_v", "hateful-memes", "full"} <= set(data.tags)
    index = metadata_load(tmp_path / "README.md")["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    (result,) = index[0]["results"]
    assert result["task"] == {"type": "image-text-to-text"}
    assert result["dataset"] == {"name": "Hateful Memes, 1,200 samples", "type": "hateful-memes"} | eval_set
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("anls", 0.75), ("loss", 1.0)]

    card = (tmp_path / "README.md").read_text()
    assert "# phi-memes\n" in card
    assert "at revision `4a0d683eba9f1d0cbfb6151705d1ee73c25a80ca`" in card
    assert "| 1,200 samples | before | after |\n| --- | --- | --- |\n| anls | 0.1250 | 0.7500 |\n| loss |" in card
    assert "from_pretrained('someone/phi-memes'" in card
    assert "| learning_rate | 0.0002 |" in card
    assert "| prompt | a\\|b |" in card and "| bf16 | true |" in card and "seed" not in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_a_card_without_results_or_run(tmp_path):
    with pytest.raises(ValueError, match="has no run.json"):
        write_model_card(tmp_path)
    write_tiny_run(tmp_path)
    for path in tmp_path.glob("eval_*.json"):
        path.unlink()
    write_model_card(tmp_path)
    assert "## Results" not in (tmp_path / "README.md").read_text()
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "base_model" not in metadata_load(tmp_path / "README.md"), "a directory is no hub id"


def test_texts_in_a_card_are_not_html(tmp_path):
    write_tiny_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    odd = "<script>alert(1)</script>\n# Title"
    run |= dict.fromkeys(("task", "method", "data", "date", "hardware"), odd) | {"base_model": f"`{odd}`"}
    run |= {"hyperparameters": {odd: odd}, "versions": {odd: odd}, "command": f"```\n{odd}"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    write_model_card(tmp_path, name=odd)
    blocks = re.split(r"^```.*$", ModelCard.load(tmp_path / "README.md").text, flags=re.MULTILINE)
    assert len(blocks) == 5, "texts before, between and after two blocks of code"
    for text in blocks[::2]:
        text = re.sub(r"`[^`\n]*`", "", text)  # code
        assert "<script" not in text and "\n# Title" not in text


@pytest.mark.parametrize("changes", [{"base_model": None}, {"hyperparameters": []}, {"datasets": "a"}, {"versions": 1}])
def test_a_card_of_a_run_that_is_not_described(changes, tmp_path):
    write_tiny_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | changes))
    with pytest.raises(InputError, match=f"run.json.*{next(iter(changes))} must be"):
        write_model_card(tmp_path)


def test_the_code_in_a_card_loads_adapter_and_merged_model(lora, tmp_path, receipts):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    write_tiny_run(adapter)
    write_model_card(adapter)
    merge(str(adapter), tmp_path / "merged")
    found = []
    for directory, library in ((adapter, "peft"), (tmp_path / "merged", "transformers")):
        assert metadata_load(directory / "README.md")["library_name"] == library
        (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
        scope: dict = {}
        exec(code, scope)
        assert scope["processor"].image_processor.num_crops == 2
        found.append(logits(scope["model"].float().eval(), scope["processor"], receipts))
    assert (found[0] - found[1]).abs().max() < 0.5, "bf16 rounds no further than that"
