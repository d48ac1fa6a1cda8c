"""DeepSpeed on two processes: each ZeRO stage trains as ZeRO-2 does, and resumes exactly."""

import json
import os
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
from forked import be_process, finetune_forked
from runs import CURVE_TOLERANCE, CURVES, METHODS, QLORA_TOLERANCE, SCRIPT, flags, validation_batch, weights
from transformers import AutoModelForCausalLM, AutoProcessor

import finetune_hf_trainer_docvqa as docvqa
from assets.draw_samples import draw_samples

pytestmark = pytest.mark.slow

NORM = "model.layers.0.input_layernorm.weight"


def config(name):
    return ROOT / "common" / "deepspeed" / f"{name}.json"


def assert_follows_the_curve(log, method):
    curve = json.loads(CURVES.read_text())[method]
    for key in ("loss", "grad_norm"):
        tolerance = QLORA_TOLERANCE[key] if method == "qlora" else CURVE_TOLERANCE
        assert [entry[key] for entry in log] == pytest.approx(curve[key], rel=tolerance), key


@pytest.mark.parametrize(("name", "method"), [("zero1", "full"), ("zero2", "qlora")])
def test_loss_follows_the_saved_curve(name, method, train, tmp_path):
    assert_follows_the_curve(train(tmp_path, deepspeed=config(name), **METHODS[method]), method)


@pytest.fixture(scope="module")
def extensions(tmp_path_factory):
    """A folder for compiled extensions, with a compiler that neither optimizes nor reads unused headers of PyTorch.

    DeepSpeed's CPU Adam is compiled as one file, which takes half the time.
    """
    directory = tmp_path_factory.mktemp("extensions")
    (directory / "g++").write_text('#!/bin/sh\nexec g++ -DTORCH_INDUCTOR_CPP_WRAPPER "$@" -O0 -g0\n')
    (directory / "g++").chmod(0o755)
    builder = CPUAdamBuilder()
    sources = [builder.deepspeed_src_path(source) for source in builder.sources()]
    (directory / "adam.cpp").write_text("".join(f'#include "{source}"\n' for source in sources))
    return directory


def be_process_with(variables, *arguments):
    os.environ |= variables
    be_process(*arguments)


def be_process_that_compiles(directory, *arguments):
    CPUAdamBuilder.sources = lambda _: [str(directory / "adam.cpp")]
    be_process_with({"CXX": str(directory / "g++"), "TORCH_EXTENSIONS_DIR": str(directory)}, *arguments)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU Adam with g++")
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offloading_follows_the_saved_curve(name, train, extensions, tmp_path):
    log = train(tmp_path, deepspeed=config(name), target=partial(be_process_that_compiles, extensions))
    assert_follows_the_curve(log, "full")


def test_zero3_gives_the_weights_of_zero2_and_resumes_exactly(train, tmp_path):
    """ZeRO-2 requires no compiler: it runs without ninja, g++ and a cache of compiled extensions."""
    no_compiler = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    reference = train(tmp_path / "zero2", target=partial(be_process_with, no_compiler))
    assert "DeepSpeed zero2.json" in (tmp_path / "zero2.log").read_text()
    options = {"deepspeed": config("zero3"), "save_strategy": "steps", "save_steps": 3}
    log = train(tmp_path / "straight", **options)
    for entry, expected in zip(log, reference, strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    saved, expected = weights(tmp_path / "straight"), weights(tmp_path / "zero2")
    assert saved.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(saved[name], expected[name], rtol=0, atol=1e-5)

    shutil.copytree(tmp_path / "straight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert train(tmp_path / "resumed", resume_from_checkpoint="auto", **options) == log
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)


def test_answers_under_zero3_are_those_of_one_process(tmp_path, monkeypatch):
    """The processes have different numbers of prompts, and answers of different lengths."""
    draw_samples("docvqa", tmp_path / "data", train=2, val=3)
    release = tmp_path / "data/val_v1.0_withQT.json"
    release.write_text(json.dumps({"data": json.loads(release.read_text())["data"][4:]}))  # about the second and third page
    options = {"model_name_or_path": TINY, "max_new_tokens": 16, "eval_batch_size": 2, "max_eval_samples": 5}
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags(tmp_path / "data", tmp_path / "run", **options)])
    args = docvqa.parse_args()
    args.dataloader_num_workers = 0
    rows = docvqa.load_official(args.data_dir, "val", args.max_eval_samples)
    processor = AutoProcessor.from_pretrained(TINY, num_crops=1)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    expected = [entry.prediction for entry in docvqa.evaluate(model, processor, rows, args).predictions]
    assert len({len(answer) for answer in expected}) > 1
    with torch.no_grad():
        loss = model(**validation_batch(tmp_path / "data", processor, limit=5)).loss.item()

    # The learning rate of the first step is 0.
    options |= {"max_steps": 1, "deepspeed": config("zero3"), "eval_strategy": "steps", "eval_steps": 1}
    finetune_forked(tmp_path / "data", tmp_path / "run", **options)
    for when in ("before", "after"):
        found = json.loads((tmp_path / f"run/eval_{when}.json").read_text())["predictions"]
        assert [entry["prediction"] for entry in found] == expected
    assert {t.dtype for t in weights(tmp_path / "run").values()} == {t.dtype for t in weights(TINY).values()}
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) == pytest.approx(loss, rel=1e-5)


def test_bf16_keeps_fp32_master_weights(train, tmp_path):
    """Under DDP and ZeRO-2 alike: a weight of 1.0 changes at a learning rate of 1e-5, which bf16 could not represent."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    options = {"bf16": True, "learning_rate": 1e-5, "batch_size_per_gpu": 1, "max_steps": 3}
    options |= {"save_strategy": "steps", "save_steps": 1}
    ddp = options | {"deepspeed": "none"}
    log, sharded_log = train(tmp_path / "ddp", **ddp), train(tmp_path / "zero2", **options)
    for entry, expected in zip(log, sharded_log, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    masters = weights(tmp_path / "ddp" / "checkpoint-3")
    for found in (masters, get_fp32_state_dict_from_zero_checkpoint(tmp_path / "zero2" / "checkpoint-3")):
        changes = found[NORM].detach() - 1
        assert found[NORM].dtype == torch.float32
        assert changes.all() and changes.abs().max() < 1e-4
    assert torch.equal(weights(tmp_path / "ddp")[NORM], masters[NORM].bfloat16().float())
    states = torch.load(tmp_path / "ddp/checkpoint-3/optimizer.pt", weights_only=False)["state"].values()
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}

    shutil.copytree(tmp_path / "ddp" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert train(tmp_path / "resumed", resume_from_checkpoint="auto", **ddp) == log
    resumed = weights(tmp_path / "resumed" / "checkpoint-3")
    assert resumed.keys() == masters.keys() and all(torch.equal(resumed[name], masters[name]) for name in masters)
