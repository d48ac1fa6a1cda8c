"""Finding the base model of an adapter, and checking it."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from adapters import save_adapter
from conftest import TINY
from forked import be_process, server
from runs import flags, free_port
from safetensors.torch import load_file, save_file

from common.model.adapters import fingerprint
from common.model.checkpoint import base_revision
from common.model.inference import load_for_inference
from tools.merge_lora import merge


@pytest.fixture
def moved_base(tmp_path) -> tuple[Path, Path]:
    """A copy of the tiny checkpoint and an adapter that names it."""
    base = shutil.copytree(TINY, tmp_path / "base")
    return base, save_adapter(tmp_path / "adapter", "--use_lora", "--freeze_vision_model", base=base)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_base_is_named(moved_base, predict, tmp_path, capsys):
    base, adapter = moved_base
    base.rename(tmp_path / "elsewhere")
    missing = f"error: adapter {adapter} requires its base model, {base}, which cannot be loaded: .*--base DIR"
    with pytest.raises(SystemExit):
        predict("--model", adapter, "--prompt", "Total?")
    assert re.search(missing, capsys.readouterr().err)
    model, _ = load_for_inference(adapter, "cpu", base=str(tmp_path / "elsewhere"))
    assert model.get_base_model().name_or_path == str(tmp_path / "elsewhere")


def test_base_named_relative_to_another_folder_is_found(moved_base):
    base, adapter = moved_base
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    model, _ = load_for_inference(adapter, "cpu")
    assert model.get_base_model().name_or_path == str(base)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """Snapshot of the Hub model `someone/tiny` in a cache of its own."""
    cache, commit = tmp_path / "hub", 40 * "a"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    reference = cache / "models--someone--tiny" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    return shutil.copytree(TINY, reference.parents[1] / "snapshots" / commit)


def test_base_on_the_hub_is_found_at_its_revision(hub_cache, tmp_path, receipts):
    adapter = save_adapter(tmp_path / "adapter", "--use_lora", base="someone/tiny")
    description = json.loads((adapter / "base_model.json").read_text())
    assert (description["name"], description["revision"]) == ("someone/tiny", hub_cache.name)
    assert description["path"] is None
    assert base_revision("someone/tiny") == hub_cache.name
    assert base_revision(str(TINY)) is None
    model, _ = load_for_inference(adapter, "cpu")
    assert model.get_base_model().name_or_path == "someone/tiny"
    assert load_for_inference("someone/tiny", "cpu")[1].image_processor.num_crops == 1
    merge(str(adapter), tmp_path / "merged")
    # The processor of the base is read at the same revision, though the Hub has a newer one.
    (adapter / "tokenizer.json").unlink()
    shutil.copytree(hub_cache, hub_cache.with_name(40 * "b"), ignore=lambda *_: ["tokenizer.json"])
    (hub_cache.parents[1] / "refs" / "main").write_text(40 * "b")
    load_for_inference(adapter, "cpu")
    shutil.rmtree(hub_cache.with_name(40 * "b"))
    edit_json(adapter / "adapter_config.json", revision=40 * "b")
    with pytest.raises(ValueError, match="requires its base model, someone/tiny, which cannot be loaded"):
        load_for_inference(adapter, "cpu")


def be_process_with_cache(cache, *arguments):
    huggingface_hub.constants.HF_HUB_CACHE = str(cache)
    be_process(*arguments)


@pytest.mark.slow
def test_a_model_that_changes_on_the_hub_during_a_run(hub_cache, docvqa_data, tmp_path):
    """The run records the commit that it loaded."""
    output, repository = tmp_path / "run", hub_cache.parents[1]
    options = {"model_name_or_path": "someone/tiny", "max_steps": 1, "use_lora": True, "lora_rank": 4}
    words = flags(docvqa_data, output, **options, dataloader_num_workers=0)
    arguments = (repository.parent, 0, 1, free_port(), words, tmp_path / "log")
    run = server().Process(target=be_process_with_cache, args=arguments)
    run.start()
    while not (output / "eval_before.json").exists() and run.is_alive():
        time.sleep(0.05)
    # Another program has looked the model up after a new commit.
    (repository / "snapshots" / (40 * "b")).mkdir()
    shutil.copy(hub_cache / "config.json", repository / "snapshots" / (40 * "b"))
    (repository / "refs" / "main").write_text(40 * "b")
    run.join(timeout=300)
    assert run.exitcode == 0, (tmp_path / "log").read_text()
    assert json.loads((output / "run.json").read_text())["base_revision"] == hub_cache.name
    assert json.loads((output / "adapter_config.json").read_text())["revision"] == hub_cache.name
    assert json.loads((output / "base_model.json").read_text())["weights"] == fingerprint(hub_cache)


def test_another_configuration_is_refused(moved_base):
    base, adapter = moved_base
    scaling = json.loads((base / "config.json").read_text())["rope_scaling"]
    edit_json(base / "config.json", rope_scaling=scaling | {"short_factor": [1.5] * len(scaling["short_factor"])})
    with pytest.raises(ValueError, match="has different rope_scaling: pass the right one with --base"):
        load_for_inference(adapter, "cpu")


def test_other_weights_are_noticed(moved_base):
    base, adapter = moved_base
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in weights.items()}, base / "model.safetensors")
    load_for_inference(adapter, "cpu")  # the same in fp32
    weights["model.norm.weight"][5] += 1
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ValueError, match="has different weights.*--base"):
        load_for_inference(adapter, "cpu")
    with pytest.warns(UserWarning, match="has different weights"):
        load_for_inference(adapter, "cpu", base=str(base))


def test_adapter_of_another_size_is_refused_without_a_description(moved_base):
    _, adapter = moved_base
    (adapter / "base_model.json").unlink()
    load_for_inference(adapter, "cpu")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    save_file(weights | {name: torch.zeros(8, 3072)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj expect 3072 features, but the base model has 192"):
        load_for_inference(adapter, "cpu")


def test_damaged_weights_are_named(moved_base, tmp_path):
    base, adapter = moved_base
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{path} is corrupted"):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    path.unlink()
    with pytest.raises(ValueError, match="is missing adapter_model.safetensors"):
        load_for_inference(adapter, "cpu")
    path.write_bytes(whole)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="requires its base model.*cannot be loaded"):
        load_for_inference(adapter, "cpu")
