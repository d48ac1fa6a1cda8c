"""The memory estimate against what batches really store, and the summary of a run."""

import argparse
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from common.arguments import Setup, training_parser
from common.data.batches import Lengths, PlannedBatches
from common.model.loading import count_parameters, set_gradient_checkpointing
from common.model.lora import add_lora
from common.phi3v import Phi3VConfig
from common.phi3v.flops import TrainingFlops
from common.phi3v.image_processing import CROP_SIZE, num_image_tokens
from common.training import memory
from common.training.deepspeed import zero_stage
from common.training.memory import (
    MODES,
    USABLE_SHARE,
    Footprint,
    Trial,
    estimate_memory,
    fastest_budget,
    kept_bytes,
    least_recomputation,
    recomputation_modes,
    state_bytes,
    step_bytes,
)
from common.training.optimizer import split_parameters
from common.training.summary import summarize

CPU = torch.device("cpu")


def flags(**changes):
    defaults = training_parser("", task="test", metric="anls").parse_args([])
    return argparse.Namespace(**(vars(defaults) | changes))


def settled(bf16=False, packing=True, deepspeed=None):
    precision = "bf16" if bf16 else "fp32"
    return Setup(CPU, precision, "varlen", "on a CPU", packing, deepspeed, zero_stage(deepspeed))


@pytest.fixture
def load(random_model):
    """Loads the random model."""

    def load(frozen=False):
        model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32, attn_implementation="varlen")
        if frozen:
            model.model.vision_embed_tokens.requires_grad_(False)
        return model

    return load


def batch(texts, packing):
    """Samples of a text and an image of two crops each."""
    image_tokens = num_image_tokens(CROP_SIZE, 2 * CROP_SIZE)
    lengths = [image_tokens + text for text in texts]
    if packing:
        rows = [sum(([-1 - i] * image_tokens + [9] * text for i, text in enumerate(texts)), [])]
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        layout = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
    else:
        assert len(set(texts)) == 1
        rows = [[-1] * image_tokens + [9] * text for text in texts]
        layout = {"attention_mask": torch.ones(len(texts), lengths[0], dtype=torch.long)}
    ids = torch.tensor(rows)
    from_end = (
        torch.cat([torch.arange(length, 0, -1) for length in lengths])[None] if packing else torch.arange(lengths[0], 0, -1)
    )
    labels = torch.where(from_end <= 16, 9, -100).expand_as(ids)
    crops = torch.zeros(2 * len(texts), 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8)
    sizes = torch.tensor([[CROP_SIZE, 2 * CROP_SIZE]] * len(texts))
    return {"input_ids": ids, "labels": labels, "pixel_values": crops, "image_sizes": sizes} | layout


@pytest.mark.parametrize(("packing", "bf16", "frozen"), [(True, False, False), (False, False, False), (True, True, True)])
def test_the_trial_predicts_what_a_batch_stores(packing, bf16, frozen, load):
    model, setup = load(frozen), settled(bf16, packing)
    flops = TrainingFlops(model)
    random_state = torch.get_rng_state()
    trial = estimate_memory(model, setup, "adamw_torch", flops)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    model.train()
    for texts in ([40, 40], [300, 300, 300]):
        inputs = batch(texts, packing)
        sizes = flops.sizes(inputs)
        kept = {}
        for mode in MODES:
            set_gradient_checkpointing(model, mode)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                kept[mode] = kept_bytes(model, inputs)
        for mode, footprint in (("none", trial.keeping), ("elementwise", trial.elementwise), ("full", trial.recomputing)):
            assert footprint.bytes(sizes.tokens, sizes.views) == pytest.approx(kept[mode], rel=0.03)
        assert kept["full"] < kept["selective"] < kept["none"]
        assert kept["full"] < kept["elementwise"] < kept["none"]
        assert kept["selective"] < kept["vision"] <= kept["none"]
    assert trial.recomputing.per_token < 0.2 * trial.keeping.per_token
    assert (trial.keeping.per_view < 10_000) == frozen  # a frozen tower stores nothing
    assert trial.flops_per_second > 0 and trial.launching > 0


@pytest.mark.parametrize(
    ("deepspeed", "by_autocast"),
    [(None, True), (str(ROOT / "common/deepspeed/zero2.json"), False)],
    ids=["fp32 weights", "DeepSpeed's, in bf16"],
)
def test_the_trial_uses_the_precision_of_training(deepspeed, by_autocast, load):
    model, setup = load(), settled(bf16=True, deepspeed=deepspeed)
    model.to(torch.float32 if by_autocast else torch.bfloat16)
    seen = set()
    model.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    estimate_memory(model, setup, "adamw_torch", TrainingFlops(model))
    assert seen == {by_autocast}


FOOTPRINTS = Footprint(0, 100, 60), Footprint(0, 75, 30), Footprint(0, 4, 1)
TRIAL = Trial(*FOOTPRINTS, num_layers=4, states=1000, step=50, free=0, flops_per_second=1, launching=0)


def test_the_least_recomputation_that_fits_is_chosen():
    needed = [TRIAL.needed(mode, 100, 10) for mode in MODES]
    assert needed == sorted(needed, reverse=True) and needed[-1] > 1000
    kept, recomputed = (TRIAL.keeping.bytes(100, 10), TRIAL.recomputing.bytes(100, 10))
    assert needed[-1] == 1000 + recomputed + (kept - recomputed) / 4  # and one of the four layers in its backward pass
    for mode, bytes_needed in zip(MODES, needed, strict=True):
        assert least_recomputation(dataclasses.replace(TRIAL, free=bytes_needed / 0.85 + 1), 100, 10) == mode
    assert least_recomputation(TRIAL, 100, 10) == "full"
    assert least_recomputation(dataclasses.replace(TRIAL, free=10**9), 100, 10) == "none"
    assert least_recomputation(None, 100, 10) == "full"
    modes = recomputation_modes(flags(torch_compile=True))
    assert modes == recomputation_modes(flags(fused_layers=False)) == ("none", "vision", "selective", "full")
    assert recomputation_modes(flags(freeze_vision_model=True)) == ("none", "elementwise", "selective", "full")
    assert recomputation_modes(flags()) == MODES
    assert recomputation_modes(flags(gradient_checkpointing="elementwise")) == ("elementwise",)
    assert least_recomputation(dataclasses.replace(TRIAL, free=needed[1] / 0.85 + 1), 100, 10, modes) == "vision"
    # At the optimizer step, the activations have been freed.
    assert [dataclasses.replace(TRIAL, step=10**6).needed(mode, 100, 10) for mode in MODES] == [1000 + 10**6] * 5


@pytest.mark.parametrize("free", [3000, 20_000, 10**6, 10**8])
@pytest.mark.parametrize("launching", [0, 1e6])
def test_the_largest_micro_batch_that_fits_and_is_fastest(free, launching):
    """Without launches, with the least recomputation; where launching takes all the time, in the fewest micro-batches."""
    lengths = Lengths(tokens=np.array([10, 7, 8]), views=np.array([2, 0, 1]))
    trial = dataclasses.replace(TRIAL, free=free, launching=launching)
    most = {mode: trial.most_tokens(mode, lengths) for mode in MODES}
    assert list(most.values()) == sorted(most.values())
    for mode, tokens in most.items():
        needed = [trial.needed(mode, tokens + more, math.ceil(0.2 * (tokens + more))) for more in (0, 3)]
        assert needed[0] <= USABLE_SHARE * free < needed[1]
    budget = fastest_budget(trial, MODES, lengths, (1000, 2000), lambda tokens: -(-1000 // tokens))
    fitting = [tokens for tokens in most.values() if tokens >= 10]
    if not fitting:
        assert budget is None
    elif launching:
        assert -(-1000 // budget) == -(-1000 // max(fitting))
    else:
        assert budget == fitting[0]
    assert fastest_budget(trial, ("full",), lengths, (1000, 2000), lambda tokens: 1) == (most["full"] if fitting else None)
    assert dataclasses.replace(trial, step=10**9).most_tokens("full", lengths) == 0


def test_all_processes_decide_by_the_one_with_the_least_memory(monkeypatch):
    trials = [dataclasses.replace(TRIAL, free=free) for free in (7, 3, 5)]
    monkeypatch.setattr(memory, "world_size", lambda: 3)
    monkeypatch.setattr(memory, "gather", lambda own: trials)
    sharded = settled(deepspeed=str(ROOT / "common/deepspeed/zero3.json"))
    assert estimate_memory(None, sharded, "adamw_torch", None).free == 3
    trials[1] = None
    assert estimate_memory(None, sharded, "adamw_torch", None) is None


@pytest.mark.parametrize(("sizes", "lists"), [((3, 4, 2, 9, 1), 2), ((5, 5, 5), 2), ((0, 0), 1), ((), 0)])
def test_groups_of_parameters_are_limited(sizes, lists):
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    split = split_parameters(parameters, 10)
    assert len(split) == lists and all(sum(parameter.numel() for parameter in some) <= 10 for some in split)
    assert [id(parameter) for some in split for parameter in some] == list(map(id, parameters))


def test_states_by_optimizer_and_sharding(load, tmp_path):
    model = load(frozen=True)
    count = sum(trained for trained, _ in count_parameters(model).values())
    assert state_bytes(model, "adamw_torch_fused", settled()) == (4 + 8) * count  # gradient, two moments
    assert state_bytes(model, "adamw_8bit", settled()) == (4 + 2) * count
    assert state_bytes(model, "adafactor", settled()) == 4 * count
    zero = tmp_path / "zero2.json"
    zero.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 10}}')
    sharded = settled(bf16=True, deepspeed=str(zero))
    assert state_bytes(model, "adamw_torch_fused", sharded) == (2 + 4 + 8) * count + 2 * 2 * 10
    assert state_bytes(model, "paged_adamw_8bit", sharded) == (2 + 4) * count + 2 * 2 * 10
    assert step_bytes(model, sharded) == 4 * count
    zero.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    bucket = min(model.config.hidden_size**2, count)
    assert state_bytes(model, "adamw_torch_fused", sharded) == (2 + 4 + 8) * count + 2 * 2 * bucket
    zero.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 10}}')
    assert step_bytes(model, settled()) == step_bytes(model, settled(deepspeed=str(zero))) == 0
    model.bfloat16()  # DDP: gradient, master weight, two moments, and a copy of the gradient in fp32
    assert state_bytes(model, "adamw_torch_fused", settled(bf16=True)) == (2 + 4 + 8) * count
    assert step_bytes(model, settled(bf16=True)) == 4 * count


def published_model(args):
    """The published model on the meta device, as one GPU trains it in bf16 without DeepSpeed, and the bytes of its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Phi3VConfig(), dtype=torch.bfloat16)
        model = add_lora(model, args, None) if args.use_lora else model
    loaded = 0
    for name, parameter in model.named_parameters():
        # All but head and projector: half a byte per weight, and four bytes of scale per 64 weights.
        quantized = args.use_qlora and ".base_layer.weight" in name and not re.search("lm_head|img_projection", name)
        loaded += parameter.numel() * (1 / 2 + 4 / 64) if quantized else parameter.nbytes
    return model, loaded


LORA = {"use_lora": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full, DDP (`--deepspeed none`)", {}),
        ("full, DDP, `--optim adamw_bnb_8bit`", {"optim": "adamw_bnb_8bit"}),
        ("LoRA, DDP", LORA),
        ("QLoRA, DDP", LORA | {"use_qlora": True}),
    ],
)
def test_states_of_the_published_model_are_documented(name, changes, monkeypatch):
    args = flags(bf16=True, **changes)
    model, loaded = published_model(args)
    found = [loaded + state_bytes(model, args.optim, settled(bf16=True))]
    monkeypatch.setattr(memory, "world_size", lambda: 4)
    found.append(loaded + state_bytes(model, args.optim, settled(bf16=True)))
    document = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    row = next(line for line in document.splitlines() if line.startswith(f"| {name} |"))
    assert found[0] == found[1]  # DDP shards nothing
    assert row.split(" | ")[2:4] == [f"{found[0] / 1e9:.1f} GB", "the same"]


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_the_tower_can_run_in_chunks(recomputation, load):
    """Loss and gradients of nine views, in chunks of two and at once."""
    found = []
    for crops_per_chunk in (2, load().model.vision_embed_tokens.crops_per_chunk):
        model = load().train()
        set_gradient_checkpointing(model, recomputation)
        model.model.vision_embed_tokens.crops_per_chunk = crops_per_chunk
        inputs = batch([40, 50, 60], packing=True)
        inputs["pixel_values"] = torch.randint(
            256, (6, 3, CROP_SIZE, CROP_SIZE), generator=torch.Generator().manual_seed(0)
        ).byte()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys() and any("vision_model" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_adapters_do_not_cast_their_inputs(load):
    """PEFT would cast them to fp32, which autocast reverts."""
    args = flags(bf16=True, **LORA | {"lora_dropout": 0.1})
    model = add_lora(load().to(torch.bfloat16), args, None).train()
    seen = set()
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default"):
            assert module.weight.dtype == torch.float32
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch([40], packing=True))
    assert seen == {torch.bfloat16}


def test_summary_of_a_run(load):
    model, setup = load(), dataclasses.replace(settled(), batch_size_per_gpu=2)
    given = {"learning_rate": 1e-4, "vision_learning_rate": 1e-5, "warmup_steps": 2, "batch_size": 8, "num_train_epochs": 3}
    lengths = Lengths(tokens=np.array([300, 500]), views=np.array([2, 3]))
    batches = PlannedBatches(16, 8, seed=0, rank=0, world_size=1, accumulation=4)
    flops = TrainingFlops(model)

    def summary(setup=setup, batches=batches, trial=TRIAL, **changes):
        text = summarize(flags(**given | changes), setup, model, 16, batches, lengths, "none", trial, flops)
        assert text.count("\n") == 11 and all(len(line) < 130 for line in text.splitlines())
        return {name: said.strip() for name, said in (line.split(":", 1) for line in text.splitlines())}

    said = summary()
    assert said["batch"] == "8 samples per step = 1 process × 2 per micro-batch × 4 accumulation"
    assert said["steps"] == "6 on 16 rows, learning rate warmup for 2, then linear"
    assert "learning rate 0.0001, vision 1e-05" in said["optimizer"]
    assert said["samples"] == "300 to 500 tokens (mean 400), 2.5 crops and global views on average"
    assert "GiB" in said["memory"] and "about" in said["time"]
    budget = PlannedBatches(16, 8, seed=0, rank=0, world_size=1, accumulation=2, max_tokens=2000)
    auto = dataclasses.replace(setup, max_tokens_per_batch="auto")
    assert "1 process × 2 micro-batches of up to 2,000 tokens (auto)" in summary(auto, budget)["batch"]
    assert "warmup for 3, then cosine" in summary(warmup_steps=0.5, lr_scheduler_type="cosine")["steps"]
    assert "all of them warmup (--warmup_steps 6)" in summary(warmup_steps=6)["steps"]
    untried = summary(trial=None)
    assert untried["memory"] == untried["time"] == "not estimated: not even a small batch fits"
    # As PEFT gets it.
    assert "LoRA, rank 5, alpha 2," in summary(use_lora=True, lora_rank=5, lora_alpha_ratio=0.3)["method"]
    sharded = summary(settled(deepspeed=str(ROOT / "common/deepspeed/zero3.json")), trial=None)
    assert sharded["memory"].startswith("about 0.0 GiB per process for weights and states")
    assert "under ZeRO-3" in sharded["time"] and "zero3.json" in sharded["optimizer"]
