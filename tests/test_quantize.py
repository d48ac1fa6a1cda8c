"""Quantized exports of the tiny checkpoint, and what the real model would weigh."""

import json

import pytest
import torch
from adapters import logits
from conftest import ROOT, TINY
from runs import message, write_docvqa
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tools.quantize
from common.model.inference import load_for_inference
from common.model.loading import avoid_avx512_kernel
from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.runtime.process import InputError

# Bits per weight: NF4 has an 8-bit scale per 64 weights and a 32-bit scale per 256 of those, fp8 a 32-bit scale per block.
BITS = {"bf16": 16, "nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8, "fp8": 8}


def predicted_bytes(config: Phi3VConfig, scheme: str) -> float:
    """Size of a checkpoint: the decoder's linear layers quantized, and everything else in bf16."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    linears = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))
    return (linears * BITS[scheme] + (total - linears) * 16) / 8


def published_config() -> Phi3VConfig:
    return Phi3VConfig(vocab_size=32064, max_position_embeddings=131072, original_max_position_embeddings=4096)


@pytest.mark.parametrize(("scheme", "closeness"), [("nf4", 0.25), ("int8", 0.05), ("fp8", 0.08)])
def test_a_quantized_model_is_smaller_and_answers_nearly_the_same(
    scheme, closeness, tmp_path, receipts, monkeypatch, run_main, predict
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    row = {"conversations": [{"images": [receipts[0].name], "user": "What is the total?", "assistant": "07.50"}]}
    (receipts[0].parent / "val.jsonl").write_text(json.dumps(row))
    quantized = tmp_path / "quantized"
    flags = ["--model", TINY, "--scheme", scheme, "--output_dir", quantized, "--no-tqdm"]
    said = run_main(tools.quantize, *flags, "--data_file", receipts[0].parent / "val.jsonl")
    scores = json.loads((quantized / "quantization.json").read_text())
    assert f"ANLS of 1 answer: {scores['before']:.4f} -> {scores['after']:.4f}" in said

    size = (quantized / "model.safetensors").stat().st_size
    config = Phi3VForCausalLM.config_class.from_pretrained(TINY)
    assert size == pytest.approx(predicted_bytes(config, scheme), rel=0.02)
    by_transformers = AutoModelForCausalLM.from_pretrained(quantized).eval()
    avoid_avx512_kernel(by_transformers)
    ours, processor = load_for_inference(quantized, "cpu")
    assert ours.is_quantized == (scheme != "fp8")
    expected = logits(*load_for_inference(TINY, "cpu"), receipts)
    for model in (by_transformers, ours):
        error = (logits(model, processor, receipts).float() - expected).norm() / expected.norm()
        assert 0 < error < closeness, f"relative error {error:.3f}"
    assert predict("--model", quantized, "--images", receipts[0], "--prompt", "What is the total?", "--no-tqdm").strip()

    said = message(monkeypatch, write_docvqa(tmp_path / "data", 4, 2), tmp_path / "out", model_name_or_path=quantized)
    assert "quantized checkpoints can only be evaluated" in said and "--use_qlora" in said
    with pytest.raises(InputError, match="already quantized"):
        tools.quantize.quantize(str(quantized), "nf4", tmp_path / "twice")
    tensors = load_file(quantized / "model.safetensors")
    scale = next(name for name in tensors if name.endswith((".absmax", ".SCB", "_scale_inv")))
    save_file({name: tensor for name, tensor in tensors.items() if name != scale}, quantized / "model.safetensors")
    with pytest.raises(InputError, match=f"weight {scale} is missing"):
        load_for_inference(quantized, "cpu")


def test_the_table_of_sizes_is_right():
    """docs/serving.md: weights in GB, and how many tokens of keys and values fit beside them."""
    text = (ROOT / "docs/serving.md").read_text()
    config = published_config()
    per_token = 2 * 2 * config.num_hidden_layers * config.hidden_size  # keys and values in bf16
    weights = {scheme: predicted_bytes(config, scheme) for scheme in BITS}
    assert f"| weights, GB | {' | '.join(f'{size / 1e9:.2f}' for size in weights.values())} |" in text
    # Below compute capability 8.9, fp8 weights are converted.
    for card, memory, sizes in (("a T4", 15, weights | {"fp8": weights["bf16"]}), ("an L4", 22.5, weights)):
        tokens = [round((0.9 * memory * 2**30 - size - 1.5e9) / per_token / 1000) for size in sizes.values()]
        assert f"| tokens on {card} | {' | '.join(f'{number},000' for number in tokens)} (" in text
