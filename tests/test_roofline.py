"""Predicted time and memory, against layers counted by hand and a micro-batch measured on a GPU."""

import re
from collections import Counter

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import roofline, table
from benchmarks.meter import GPUS, SHORTEST_KERNEL, Kernel, Meter
from benchmarks.roofline import Predictor, as_on_a_gpu
from benchmarks.train import random_config
from common.model.loading import base_model
from common.model.lora import FusedLoraLinear
from common.phi3v import fused
from common.phi3v.attention import flash_attention

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
TOKENS, WIDTH, RANK = 1000, 256, 32


def fake(*shape, dtype=torch.bfloat16, **options):
    with FAKE:
        return torch.empty(shape, dtype=dtype, **options)


def count(run, exempt=()):
    meter = Meter(list(exempt))
    with as_on_a_gpu(meter), meter:
        run()
    return meter


def test_a_linear_layer_is_counted_by_hand():
    states, weight = fake(TOKENS, WIDTH, requires_grad=True), fake(4 * WIDTH, WIDTH, requires_grad=True)
    kept = []
    meter = count(lambda: kept.append(nn.functional.linear(states, weight)), [states, weight])
    flops, moved = 2 * TOKENS * WIDTH * 4 * WIDTH, 2 * (TOKENS * WIDTH + 4 * WIDTH**2 + TOKENS * 4 * WIDTH)
    assert meter.phases == [Counter({Kernel("matrix products", "products", flops, moved): 1})]
    assert meter.live == meter.peak == 2 * TOKENS * 4 * WIDTH
    kept.clear()
    assert meter.live == 0
    meter = count(lambda: nn.functional.linear(states, weight).backward(fake(TOKENS, 4 * WIDTH)), [states, weight])
    assert meter.phases == [Counter({Kernel("matrix products", "products", flops, moved): 3})]


def test_a_fused_function_is_one_kernel_forward_and_backward():
    states = fake(1, TOKENS, 2 * WIDTH, requires_grad=True)
    gradient = fake(1, TOKENS, WIDTH)
    meter = count(lambda: fused.swiglu(states).backward(gradient), [states, gradient])
    forward, backward = 2 * TOKENS * WIDTH * 3, 2 * TOKENS * WIDTH * 5
    group = "norms, activations, rotary"
    assert meter.phases == [Counter({Kernel(group, "products", 0.0, moved): 1 for moved in (forward, backward)})]
    assert fused._swiglu(torch.ones(2, 4)).shape == (2, 2)  # outside, the function is unchanged


def test_attention_is_counted_below_the_diagonal_of_each_sample():
    heads, size, lengths = 4, 96, (300, 700)
    ends = torch.tensor([0, 300, 1000], dtype=torch.int32)
    query, key, value = (fake(TOKENS, heads, size, requires_grad=True) for _ in range(3))
    meter = count(lambda: flash_attention(query, key, value, ends, 700, None).backward(fake(TOKENS, heads, size)))
    flops = 4 * heads * size * sum(length * (length + 1) / 2 for length in lengths)
    assert {kernel.rate: kernel.flops for kernel in meter.phases[0] if kernel.flops} == {
        "attention": flops,
        "attention_backward": 2.5 * flops,
    }
    states = fake(2, heads, 577, 64)  # as in the vision tower: all pairs
    [kernel] = [each for each in count(lambda: scaled_dot_product_attention(states, states, states)).phases[0] if each.flops]
    assert kernel.flops == 4 * 2 * heads * 577**2 * 64


def small(**changes):
    config = random_config("tiny")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_a_kernel_takes_the_longest_of_its_times():
    gpu = GPUS["H100"]._replace(products=1.0, bandwidth=1.0, to_launch=0.0)
    assert Kernel("", "products", 3e12, 1e12).seconds(gpu) == 3
    assert Kernel("", "products", 3e12, 5e12).seconds(gpu) == 5
    assert Kernel("", "products", 0, 0).seconds(gpu) == SHORTEST_KERNEL
    phases = [Counter({Kernel("", "products", 1e12, 0): 2}), Counter({Kernel("", "products", 0.1e12, 0): 4})]
    found = roofline.MicroBatch(phases, 4, 1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)
    assert found.seconds(gpu) == pytest.approx(2.4)
    assert found.seconds(gpu._replace(to_launch=0.5)) == pytest.approx(2 + 2)


@pytest.mark.parametrize(("method", "gpus"), [("full", 1), ("full", 8), ("frozen", 1), ("lora", 1), ("qlora", 1)])
def test_every_method_and_recomputation_is_predicted(method, gpus):
    predictor = Predictor(method, gpus, small())
    found = [predictor.predict(mode, 2, num_crops=2) for mode in roofline.memory.MODES]
    none, elementwise, vision, selective, full = (each.activations for each in found)
    assert none > elementwise > selective > full > 0
    assert none >= vision > selective and (none == vision) == (method == "frozen")
    assert len({each.flops for each in found}) == 1
    launches = [sum(phase.total() for phase in each.phases) for each in found]
    assert launches[0] < launches[1] and launches[0] <= launches[2] < launches[3] < launches[4]
    dequantizes = any(kernel.group == "dequantization" for phase in found[0].phases for kernel in phase)
    assert dequantizes == (method == "qlora")
    said = roofline.report(found[0], GPUS["H100"], gpus)
    assert "predicted, not measured" in said and "fits into 95%" in said


def test_a_lora_layer_writes_its_output_once_per_product():
    """Base product, x Aᵀ, and the addition of the adapter's output, forward; twice that, less the base's gradient, backward."""
    model = Predictor("lora", config=small()).model
    layers = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert layers and all(parameter.dtype == torch.float32 for parameter in layers[0].lora_A.parameters())
    rows, width, wide = TOKENS, layers[0].in_features, layers[0].out_features
    cast = [fake(RANK, width), fake(RANK, width), fake(wide, RANK), fake(wide, RANK)]
    layers[0].casts = tuple(cast)
    states = fake(1, rows, width, requires_grad=True)
    meter = count(lambda: layers[0](states).backward(fake(1, rows, wide)))
    products = [kernel for kernel in meter.phases[0].elements() if kernel.group == "matrix products"]
    base, down, up = (2.0 * rows * size for size in (width * wide, width * RANK, wide * RANK))
    assert sorted(kernel.flops for kernel in products) == sorted([base, base, *[down] * 3, *[up] * 3])


@pytest.mark.slow
def test_predictions_agree_with_the_measured_micro_batch():
    """LoRA without recomputation, four pages at once, on one H100: measured 607 ms and 71.3 GB; the documents show both."""
    predictor = Predictor("lora")
    base_model(predictor.model).model.vision_embed_tokens.crops_per_chunk = 64  # as it was measured
    found = predictor.predict("none", 4)
    seconds = found.seconds(GPUS["H100"])
    gradients = sum(parameter.nbytes for parameter in predictor.model.parameters() if parameter.requires_grad)
    peak = found.weights + gradients + found.activations  # no optimizer had run
    assert seconds == pytest.approx(0.607, rel=0.15)
    assert peak == pytest.approx(71.3e9, rel=0.15)
    row = next(line for line in table.DOCUMENT.read_text(encoding="utf-8").splitlines() if "| none | **607**" in line)
    shown = [float(cell) for cell in row.strip("| ").split(" | ")[-2:]]
    assert [1e3 * seconds, peak / 1e9] == pytest.approx(shown, rel=0.005)


def test_the_tables_show_the_predictions():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = table.render()
    for path, content in tables.items():
        document = path.read_text(encoding="utf-8")
        assert table.fill(document, content) == document, f"run make bench-table: {path.name}"
    found = table.predictions(table.read_results())
    assert set(found) == set(table.CHOICES) and all([row["gpu"] for row in rows] == list(GPUS) for rows in found.values())
    assert len(re.findall(r"images/s, [\d.]+ h \|", readme)) == 2 * len(found)
    lora = next(row for row in found["lora", 1] if row["gpu"] == "H100")
    assert f"{table.EPOCH / lora['images_per_second'] / 3600:.1f} h" in readme
