"""Tests that require a GPU: flash kernels, fp16 with gradient scaling, bf16, optimizers of bitsandbytes."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, torchrun
from PIL import Image
from runs import SCRIPT, flags, steps, weights, write_docvqa, write_random_model
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from common.arguments import Setup
from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.model.loading import choose_attention
from common.phi3v.attention import varlen_attention_forward
from common.phi3v.flops import TrainingFlops
from common.phi3v.layers import LeanLayerNorm, LeanRMSNorm
from common.runtime.process import InputError
from common.training.memory import estimate_memory, least_recomputation

ON_GPU = torch.cuda.is_available()
HAS_FLASH = ON_GPU and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU here")]
needs_flash = pytest.mark.skipif(not HAS_FLASH, reason="flash kernels need a GPU of the Ampere generation or later")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CURVES = json.loads(Path(__file__).with_name("curves.json").read_text())


@needs_flash
@HALVES
@pytest.mark.parametrize("key_heads", [4, 2], ids=["as many keys", "grouped keys"])
def test_the_flash_kernel_equals_sdpa_per_sample(dtype, key_heads):
    lengths = [1, 37, 300]
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, sum(lengths), 32) for heads in (4, key_heads, key_heads)]
    states = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    module = torch.nn.Module()
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    packed = {"attention_mask": None, "scaling": 32**-0.5, "cu_seq_lens_q": ends, "max_length_q": max(lengths)}
    exact, _ = varlen_attention_forward(module, *states, **packed)  # fp32: SDPA
    flash, _ = varlen_attention_forward(module, *(tensor.to(dtype) for tensor in states), **packed)
    assert flash.dtype == dtype and flash.shape == exact.shape
    torch.testing.assert_close(flash.float(), exact, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("plain", "lean"), [(Phi3RMSNorm, LeanRMSNorm), (torch.nn.LayerNorm, LeanLayerNorm)])
def test_lean_norms_equal_plain_norms(dtype, plain, lean):
    """Output and gradients in the dtype of the weights, also with autocast."""
    norms = [kind(3072, eps=1e-5).to("cuda", dtype) for kind in (plain, lean)]
    # The gradient must differ from the input, for which the gradient through a norm is zero except for rounding.
    states, gradient = 3 * torch.randn(2, 1, 700, 3072, device="cuda", dtype=dtype)
    found = []
    for norm in norms:
        inputs = states.clone().requires_grad_()
        with torch.autocast("cuda", dtype=torch.float16, enabled=isinstance(norm, lean)):
            output = norm(inputs)
        output.backward(gradient)
        found.append((output, inputs.grad, norm.weight.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for expected, fused in zip(*found, strict=True):
        assert fused.dtype == dtype
        assert (fused.float() - expected.float()).norm() < tolerance * expected.float().norm()


@pytest.fixture(scope="module")
def samples():
    processor = AutoProcessor.from_pretrained(TINY, num_crops=2)

    def sample(user, assistant, *images):
        turn = {"images": list(images), "user": user, "assistant": assistant}
        return encode_conversation({"conversations": [turn]}, processor)

    return processor, [
        sample("Just text.", "Right."),
        sample("What is it?", "Noise.", Image.effect_noise((300, 200), 60).convert("RGB")),
        sample("What is this?", "A long page.", Image.effect_noise((90, 300), 90).convert("RGB")),
    ]


@needs_flash
@HALVES
@pytest.mark.parametrize("flash", ["varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_packed_with_flash_equals_padded_with_sdpa(flash, dtype, samples):
    """Loss and gradients, under autocast with fp32 weights, against those in fp32."""
    try:
        choose_attention(flash, False, torch.device("cuda"))
    except InputError as error:
        pytest.skip(str(error))
    processor, rows = samples
    found = {}
    for attention, packing, enabled in (("sdpa", False, False), (flash, True, True)):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation=attention).cuda().train()
        batch = {
            name: value.cuda() if torch.is_tensor(value) else value
            for name, value in Collator(processor, packing=packing)(rows).items()
        }
        with torch.autocast("cuda", dtype=dtype, enabled=enabled):
            loss = model(**batch).loss
        (1024 * loss).backward()
        found[attention] = loss.item(), {name: p.grad / 1024 for name, p in model.named_parameters() if p.grad is not None}
    (exact, expected), (half, gradients) = found["sdpa"], found[flash]
    assert half == pytest.approx(exact, rel=2e-2)
    assert gradients.keys() == expected.keys()
    difference = sum((gradients[name] - expected[name]).square().sum() for name in expected).sqrt()
    assert difference < 0.1 * sum(gradient.square().sum() for gradient in expected.values()).sqrt()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    model = write_random_model(tmp_path_factory.mktemp("model") / "random")
    return write_docvqa(tmp_path_factory.mktemp("docvqa"), val=5), model


def train(places, output, **options):
    """The log of a run with the settings of tests/test_methods.py, on one GPU."""
    data, model = places
    defaults = {"model_name_or_path": model, "max_steps": 5, "batch_size_per_gpu": 4, "eval_batch_size": 2}
    run = torchrun(SCRIPT, *flags(data, output, **(defaults | options)), processes=1, CUDA_VISIBLE_DEVICES="0")
    assert run.returncode == 0, run.stdout[-6000:]
    return steps(output), run.stdout


@needs_flash
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("full", {"deepspeed": "none"}),
        ("full", {"batch_size_per_gpu": None}),
        ("frozen", {"freeze_vision_model": True}),
        ("lora", {"use_lora": True, "lora_rank": 4}),
        ("qlora", {"use_qlora": True, "lora_rank": 4}),
    ],
    ids=["full", "full, DDP", "full, what fits at once", "frozen", "LoRA", "QLoRA"],
)
def test_bf16_with_flash_follows_the_saved_curve(method, options, places, tmp_path):
    log, printed = train(places, tmp_path, bf16=True, use_flash_attention=True, **options)
    assert ("tokens (auto)" in printed) == ("batch_size_per_gpu" in options)
    assert "required by --use_flash_attention" in printed or "variable-length flash attention kernel" in printed
    assert [entry["loss"] for entry in log] == pytest.approx(CURVES[method]["loss"], rel=2e-2)


@needs_flash
@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "method", "options"),
    [
        ("liger_kernel", "full", {"use_liger_kernel": True}),
        ("liger_kernel", "lora", {"use_liger_kernel": True, "use_lora": True, "lora_rank": 4}),
        ("flash_attn", "full", {"attn_implementation": "flash_attention_2"}),
        ("torch", "full", {"torch_compile": True}),
    ],
    ids=["Liger", "Liger, LoRA", "flash-attn 2", "compiled"],
)
def test_other_kernels_follow_the_saved_curve(package, method, options, places, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    log, _ = train(places, tmp_path, bf16=True, **options)
    assert [entry["loss"] for entry in log] == pytest.approx(CURVES[method]["loss"], rel=2e-2)
    if method == "lora":  # Liger's loss comes after the head, whose adapter must move
        assert all(tensor.any() for name, tensor in weights(tmp_path).items() if "lm_head" in name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"deepspeed": "none"}, {"use_lora": True, "lora_rank": 4}, {"use_qlora": True, "lora_rank": 4}],
    ids=["full", "full, DDP", "LoRA", "QLoRA"],
)
def test_fp16_learns(options, places, tmp_path):
    """Without --bf16; the first steps may be skipped until the loss scale is found."""
    log, printed = train(places, tmp_path, max_steps=16, use_flash_attention=True if HAS_FLASH else None, **options)
    assert "fp16" in printed
    assert log[-1]["loss"] < log[0]["loss"] - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bits_under_zero2(optim, places, tmp_path):
    options = {"optim": optim, "bf16": HAS_FLASH or None, "save_strategy": "steps", "save_steps": 5}
    log, _ = train(places, tmp_path, **options)
    assert log[-1]["loss"] < log[0]["loss"]
    assert len(train(places, tmp_path, **(options | {"resume_from_checkpoint": "auto", "max_steps": 6}))[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "dtype"),
    [("adamw_8bit", torch.uint8), ("paged_adamw_8bit", torch.uint8), ("paged_adamw_32bit", torch.float32)],
)
def test_optimizers_of_bitsandbytes(optim, dtype, places, tmp_path):
    options = {"deepspeed": "none", "optim": optim, "save_strategy": "steps", "save_steps": 5}
    log, _ = train(places, tmp_path, bf16=HAS_FLASH or None, **options)
    assert log[-1]["loss"] < log[0]["loss"]
    states = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=False, map_location="cpu")["state"]
    assert dtype in {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in states.values()}
    resumed, _ = train(
        places, tmp_path, bf16=HAS_FLASH or None, **(options | {"resume_from_checkpoint": "auto", "max_steps": 6})
    )
    assert len(resumed) == 6


@needs_flash
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_memory_trial_frees_its_memory(packing):
    device = torch.device("cuda")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="varlen").to(device)
    setup = Setup(device, "bf16", "varlen", packing=packing)
    model(torch.ones(1, 8, dtype=torch.long, device=device))  # the first matrix product of a process allocates a workspace
    gc.collect()  # otherwise the trial would free memory of earlier tests
    before = torch.cuda.memory_allocated()
    trial = estimate_memory(model, setup, "adamw_torch", TrainingFlops(model))
    assert torch.cuda.memory_allocated() == before
    assert trial.flops_per_second > 0 and least_recomputation(trial, 2000, 4) == "none"


@needs_flash
@pytest.mark.slow
def test_the_benchmark_measures_memory_and_mfu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.train", "--random_weights", "--config", "tiny", "--bf16", "--num_images", "2"]
    command += ["--methods", "full", "qlora", "--checkpointing", "auto", "--batch_size", "4", "--samples_at_once", "2"]
    command += ["--num_crops", "2", "--warmup", "1", "--steps", "2", "--out", str(tmp_path / "train.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    rows = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["method"], row["attention"]) for row in rows] == [("full", "varlen"), ("qlora", "varlen")]
    assert all(row["peak_memory_gb"] > 0 and 0 < row["mfu"] < 1 and 0 <= row["data_wait_share"] < 1 for row in rows)
