"""Adapters that are trained further, and parts that are trained fully next to an adapter."""

import json
import shutil

import pytest
import torch
from adapters import save_adapter
from conftest import TINY
from peft import LoraConfig
from runs import message, weights
from safetensors.torch import load_file, save_file

from common.arguments import training_parser
from common.model.adapters import adapter_to_continue
from common.runtime.process import InputError
from tools.merge_lora import merge


def parse(*words):
    return training_parser("", task="test", metric="anls").parse_args([str(word) for word in words])


def test_an_adapter_sets_the_defaults_and_a_conflict_is_refused(lora, qlora, tmp_path):
    args = parse("--model_name_or_path", lora, "--use_lora")
    assert (args.lora_rank, args.lora_alpha_ratio, args.freeze_vision_model) == (8, 2.0, False)
    assert adapter_to_continue(args) == lora
    assert adapter_to_continue(parse("--model_name_or_path", TINY)) is None
    for flags, expected in (
        (
            ("--use_lora", "--lora_rank", 64),
            "--lora_rank 64: the adapter was trained with 8, which cannot change: remove the flag",
        ),
        (("--use_lora", "--use_dora"), "--use_dora True: the adapter was trained with False"),
        (("--use_lora", "--train_fully", "vision"), "--train_fully ('vision',): the adapter was trained with ()"),
        (("--use_qlora",), "the adapter was trained on an unquantized base: use --use_lora"),
        ((), "is an adapter: merge it into its base model first (python -m tools.merge_lora"),
    ):
        with pytest.raises(InputError) as error:
            adapter_to_continue(parse("--model_name_or_path", lora, *flags))
        assert expected in str(error.value)
    with pytest.raises(InputError, match="trained on a 4-bit base: use --use_qlora"):
        adapter_to_continue(parse("--model_name_or_path", qlora, "--use_lora"))


def test_another_base_and_other_modules_are_refused(docvqa_data, random_model, monkeypatch, tmp_path):
    base = shutil.copytree(random_model, tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", "--use_lora", base=base)
    options = {"model_name_or_path": adapter, "use_lora": True}
    config = LoraConfig.from_pretrained(adapter)
    config.target_modules = {"qkv_proj"}
    other = shutil.copytree(adapter, tmp_path / "other")
    config.save_pretrained(other)
    others = {"model_name_or_path": other, "use_lora": True, "freeze_vision_model": True}
    said = message(monkeypatch, docvqa_data, tmp_path / "out", **others)
    assert said.startswith(f"--model_name_or_path {other}: the adapter was trained with other code, and changes other modules")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = message(monkeypatch, docvqa_data, tmp_path / "out", **options)
    assert f"adapter {adapter} was trained on {base}, but {base} has different weights" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{"use_lora": True}, {"use_lora": True, "train_fully": "projector,vision", "projector_learning_rate": 1e-2}],
    ids=["lora", "train_fully"],
)
def test_an_adapter_is_trained_further_resumed_and_merged(flags, train, random_model, tmp_path):
    """The second run begins with the answers that the first one ended with, and leaves one adapter of the same shape."""
    options = {"batch_size_per_gpu": 1, "max_steps": 2, "max_new_tokens": 8} | flags
    train(tmp_path / "first", lora_rank=4, **options)
    options |= {"model_name_or_path": tmp_path / "first", "save_strategy": "steps", "save_steps": 1}
    log = train(tmp_path / "second", **options)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert {name: tensor.shape for name, tensor in first.items()} == {name: tensor.shape for name, tensor in second.items()}
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("lora_B.weight"))
    ended, began = (
        [entry["prediction"] for entry in json.loads((tmp_path / name).read_text())["predictions"]]
        for name in ("first/eval_after.json", "second/eval_before.json")
    )
    assert ended == began
    run = json.loads((tmp_path / "second/run.json").read_text())
    assert (run["base_model"], run["hyperparameters"]["lora_rank"]) == (str(random_model), 4)

    shutil.copytree(tmp_path / "second/checkpoint-1", tmp_path / "resumed/checkpoint-1")
    assert train(tmp_path / "resumed", resume_from_checkpoint="auto", **options) == log
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(second[name], resumed[name]) for name in second)

    merge(str(tmp_path / "second"), tmp_path / "merged")
    merged, base = (load_file(directory / "model.safetensors") for directory in (tmp_path / "merged", random_model))
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert not any("encoder.layers.2." in name or "post_layernorm" in name or "_GN" in name for name in changed)
    if "train_fully" in flags:
        saved = {name for name in second if ".lora_" not in name}
        still = {name.removeprefix("base_model.model.") for name in saved} - changed
        assert all(name.endswith("k_proj.bias") for name in still)  # attention does not depend on it
        assert any("patch_embedding" in name for name in saved) and any("img_projection.2" in name for name in saved)
        assert not any("vision_embed_tokens" in name for name in second if ".lora_" in name)
