"""Merging adapters into their base."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shutil
import signal
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
import torch
from adapters import logits, save_adapter
from conftest import GOLDEN, TINY, needs_golden
from peft import PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tools.merge_lora
from common.model.inference import load_for_inference
from tools.merge_lora import merge


def tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora",),
        ("--use_lora", "--use_dora", "--use_rslora", "--freeze_vision_model"),
        ("--use_lora", "--train_fully", "vision,projector"),
        ("--use_qlora", "--train_fully", "projector"),
    ],
    ids=" ".join,
)
def test_merged_equals_adapter(flags, tmp_path, receipts):
    adapter = save_adapter(tmp_path / "adapter", *flags)
    merge(str(adapter), tmp_path / "merged", torch.float32)
    model, processor = load_for_inference(adapter, "cpu", torch.float32)
    expected = logits(model, processor, receipts)
    with model.disable_adapter():
        base = logits(model, processor, receipts)
    merged = logits(*load_for_inference(tmp_path / "merged", "cpu", torch.float32), receipts)
    assert (merged - expected).abs().max() <= 1e-4
    assert (merged - base).abs().max() > 0.1, "the adapter changes nothing"


@pytest.fixture
def merge_lora(monkeypatch, run_main):
    """Runs the tool in this process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which the tool sets
    return partial(run_main, tools.merge_lora)


@pytest.mark.parametrize("flags, bar", [((), True), (("--no-tqdm",), False)])
def test_progress_on_a_terminal(lora, merge_lora, monkeypatch, tmp_path, flags, bar):
    terminal, its_end = pty.openpty()
    termios.tcsetwinsize(its_end, (24, 100))
    with open(its_end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        merge_lora("--adapter", lora, "--output_dir", tmp_path / "merged", *flags)
        print("end", file=stderr, flush=True)
        shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert f"Loading the base model of {lora}" in shown and "Merging the adapter" in shown
    assert ("Unloading and merging model" in shown) == bar


def test_a_merged_checkpoint_has_the_layout_of_its_base(lora, merge_lora, tmp_path):
    said = merge_lora("--adapter", lora, "--output_dir", tmp_path / "merged")
    assert said == f"Wrote {tmp_path / 'merged'}\n"
    assert tensors(tmp_path / "merged") == tensors(TINY)
    config, base_config = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", TINY))
    assert config.keys() == base_config.keys()
    for key in ("architectures", "auto_map", "model_type", "rope_scaling", "torch_dtype", "vision_config", "vocab_size"):
        assert config[key] == base_config[key]
    processor_files = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert processor_files <= {path.name for path in (tmp_path / "merged").iterdir()}
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert len(modes) == 1, "some files cannot be read by others"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "temporary files are left"


@needs_golden
def test_a_merged_published_checkpoint_keeps_names_and_shapes(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", "--use_qlora", base=GOLDEN / "tiny_checkpoint")
    merge(str(adapter), tmp_path / "merged")
    reference = json.loads((GOLDEN / "param_names.json").read_text())
    merged = tensors(tmp_path / "merged")
    assert {name: shape for name, (_, shape) in merged.items()} == reference["shapes"]
    assert {dtype for dtype, _ in merged.values()} == {"BF16"}
    patterns = {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in merged}
    assert patterns == set(reference["real_hub_index"]["name_patterns"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "su"
    assert "quantization_config" not in config


def test_qlora_merges_into_the_dequantized_or_the_original_base(qlora, tmp_path):
    merge(str(qlora), tmp_path / "dequantized", torch.float32)
    merge(str(qlora), tmp_path / "original", torch.float32, original_base=True)
    base, dequantized, original = (
        load_file(path / "model.safetensors") for path in (TINY, tmp_path / "dequantized", tmp_path / "original")
    )
    adapter = load_file(qlora / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    delta = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    torch.testing.assert_close(original[f"{name}.weight"], base[f"{name}.weight"].float() + 2 * delta)
    # NF4 has 16 levels per block of 64 weights.
    levels = (dequantized[f"{name}.weight"] - 2 * delta).reshape(-1, 64)
    assert all(len(block.div(block.abs().max()).mul(1e3).round().unique()) <= 16 for block in levels)


def test_an_adapter_contains_no_copy_of_the_head(lora, tmp_path, monkeypatch):
    names = load_file(lora / "adapter_model.safetensors").keys()
    assert {name for name in names if "lm_head" in name} == {
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    }
    (tmp_path / "merged").mkdir()
    monkeypatch.chdir(tmp_path / "merged")
    merge(str(lora), Path())  # into the working directory, which is empty
    head, base_head = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (tmp_path / "merged", TINY))
    assert not torch.equal(head, base_head)


def test_a_directory_in_use_is_refused(lora, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} is not empty"):
        merge(str(lora), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def no_space(source, destination):
    raise OSError(errno.ENOSPC, "No space left on device")


def terminate(source, destination):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(no_space, "error: --output_dir {} cannot be written .*No space left"), (terminate, "Writing {}")],
)
def test_an_end_while_writing_leaves_no_files(fault, message, lora, merge_lora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "replace", fault)
    with pytest.raises(SystemExit):
        merge_lora("--adapter", lora, "--output_dir", tmp_path / "merged")
    assert re.search(message.format(tmp_path / "merged"), capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_run_json_of_another_program_is_refused_before_merging(lora, tmp_path, monkeypatch):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    (adapter / "run.json").write_text('{"name": "mine"}')
    monkeypatch.setattr(tools.merge_lora, "load_base", None)
    with pytest.raises(ValueError, match=f"{adapter}/run.json has no base_model: delete it"):
        merge(str(adapter), tmp_path / "merged")


def test_an_adapter_that_is_not_finite_is_refused(lora, tmp_path):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("inf")
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"--adapter {adapter} cannot be merged"):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_type_is_refused(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TINY)
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="peft_type must be LORA, the only type that is supported, got 'PROMPT_TUNING'"):
        merge(str(tmp_path / "prompt"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_full_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--adapter {TINY} is not an adapter"):
        merge(str(TINY), tmp_path / "merged")
    with pytest.raises(ValueError, match="is not an adapter .* remove --base"):
        load_for_inference(TINY, "cpu", base=str(TINY))
    with pytest.raises(ValueError, match="nowhere.* no such directory"):
        load_for_inference("./nowhere", "cpu")
