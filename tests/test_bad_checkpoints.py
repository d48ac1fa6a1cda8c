"""Invalid models and checkpoints are refused before training."""

import json
import shutil

import huggingface_hub
import pytest
import transformers
from conftest import TINY
from huggingface_hub import save_torch_state_dict
from runs import message
from safetensors.torch import load_file, save_file

from common.model.checks import check_checkpoint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_without_a_file_it_needs(name, monkeypatch, docvqa_data, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "is missing" in said and name in said and "copy the checkpoint's files" in said


def test_a_checkpoint_of_another_architecture(monkeypatch, docvqa_data, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "is a llama checkpoint" in said and "Phi-3-vision" in said
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert said == message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "config.json: invalid JSON" in said


def test_the_code_of_a_hub_checkpoint_is_not_run(monkeypatch, docvqa_data, tmp_path):
    snapshot = tmp_path / "hub/models--some--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    config = {"model_type": "phi9_v", "auto_map": {"AutoConfig": "configuration_phi9.Config"}}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "configuration_phi9.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path="some/model")
    assert said.startswith("--model_name_or_path some/model is not a phi3_v checkpoint; these recipes support only")


def test_damaged_checkpoints(monkeypatch, docvqa_data, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=model)
    assert said.startswith(f"{model / 'model.safetensors'} is corrupted") and said.endswith("copy it again")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text("{}")
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=model)
    assert "model.safetensors.index.json is not a valid weight index" in said


def test_a_stale_file_beside_shards(random_model, monkeypatch, docvqa_data, tmp_path):
    """transformers loads only that file, in which weights may be missing."""
    model = shutil.copytree(random_model, tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    save_torch_state_dict(whole, model, max_shard_size=sum(tensor.nbytes for tensor in whole.values()) // 2)
    check_checkpoint(str(model))
    save_file(dict(list(whole.items())[1:]), model / "model.safetensors", {"format": "pt"})
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=model)
    assert f"weight {next(iter(whole))} is missing" in said


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", ": weight {} is missing or has the wrong shape (1 in total)"),
        ("of another shape", ": weight {} is missing or has the wrong shape (1 in total)"),
        ("not finite", ": {} is not finite: copy the files again"),
    ],
)
def test_missing_misshaped_and_nonfinite_weights(how, expected, monkeypatch, docvqa_data, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    whole = tensors.pop(name)
    if how == "of another shape":
        tensors[name] = whole[:-1].clone()
    if how == "not finite":
        tensors[name] = whole.clone()
        tensors[name][-1, -1] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    said = message(monkeypatch, docvqa_data, tmp_path / "out", model_name_or_path=model)
    assert said.startswith(f"--model_name_or_path {model}{expected.format(name)}")
