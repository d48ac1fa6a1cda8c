"""Model FLOPs against those that torch counts, peak FLOPs of devices, and the logged throughput."""

from functools import partial

import adapters
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, Trainer

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.model.loading import base_model
from common.phi3v.flops import TrainingFlops, named_peak_flops, peak_flops
from common.runtime import collectives
from common.training import throughput
from common.training.trainer import FinetuningTrainer


@pytest.fixture(scope="module")
def processor(random_model):
    return AutoProcessor.from_pretrained(random_model, num_crops=2)


@pytest.fixture(scope="module")
def build(random_model):
    return partial(adapters.build, base=random_model)


@pytest.fixture(scope="module")
def samples(processor):
    return [encode_conversation(conversation, processor) for conversation in adapters.conversations()]


def counted(model, batch):
    """FLOPs that torch counts, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("method", ["full", "frozen vision", "LoRA", "LoRA, frozen vision"])
def test_the_formula_agrees_with_the_counter_of_torch(build, processor, samples, method):
    """One sample of two images, without padding, which the counter would count."""
    model = build(method, attention="eager", fuse=False)  # all products of eager attention are visible to the counter
    batch = Collator(processor)(samples[2:])
    seen_forward, seen_backward = counted(model, batch)
    base = base_model(model)
    flops = TrainingFlops(base)
    forward, backward = flops.count(flops.sizes(batch))
    tokens = batch["input_ids"].shape[1]
    masked = 4 * base.config.hidden_size * base.config.num_hidden_layers * (tokens**2 - tokens * (tokens + 1) // 2)
    assert forward == pytest.approx(seen_forward - masked, rel=1e-9)
    assert backward == pytest.approx(seen_backward - 2 * masked, rel=1e-9)


@pytest.mark.parametrize("method", ["full", "LoRA, frozen vision"])
def test_the_formula_agrees_with_the_counter_of_torch_for_packed_batches(build, processor, samples, method):
    model = build(method, fuse=False)
    batch = Collator(processor, packing=True)(samples)
    with sdpa_kernel(SDPBackend.MATH):
        seen_forward, seen_backward = counted(model, batch)
    base = base_model(model)
    flops = TrainingFlops(base)
    forward, backward = flops.count(flops.sizes(batch))
    lengths = batch["cu_seq_lens_q"].diff().long()
    masked = lengths**2 - lengths * (lengths + 1) // 2  # SDPA computes whole squares
    masked = 4 * base.config.hidden_size * base.config.num_hidden_layers * int(masked.sum())
    assert forward == pytest.approx(seen_forward - masked, rel=1e-9)
    assert backward == pytest.approx(seen_backward - 2 * masked, rel=1e-9)


def test_flops_do_not_depend_on_the_layout(build, processor, samples):
    """A frozen vision part counts only its forward pass; recomputation is not counted."""
    model = build("full")
    flops = TrainingFlops(model)
    total = flops(Collator(processor)(samples))
    assert flops(Collator(processor, packing=True)(samples)) == total
    assert sum(flops(Collator(processor)([sample])) for sample in samples) == total
    model.gradient_checkpointing_enable()
    assert TrainingFlops(model)(Collator(processor)(samples)) == total

    frozen = TrainingFlops(build("frozen vision"))
    assert frozen.forward == flops.forward
    assert frozen.backward["views"] == frozen.backward["image_tokens"] == 0
    assert frozen.backward["tokens"] == flops.backward["tokens"] == 2 * flops.forward["tokens"]
    lora = TrainingFlops(base_model(build("LoRA, frozen vision")))
    # Inputs of the first layer need no gradients, and adapters add a little.
    assert 0.9 < lora.backward["tokens"] / flops.forward["tokens"] < 1.3


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Quadro RTX 8000", 130),
    ],
)
def test_peak_by_device_name(name, tflops):
    assert named_peak_flops(name) == tflops * 1e12


def test_no_peak_for_cpus_and_unknown_gpus():
    assert named_peak_flops("NVIDIA X9000") is None
    assert peak_flops(torch.device("cpu")) is None


def test_throughput_covers_all_processes_and_only_training(build, processor, samples, monkeypatch):
    model = build("full")
    batches = [Collator(processor)(samples[1:]), Collator(processor, packing=True)(samples[:1])]
    now, logged = [100.0], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e12)
    monkeypatch.setattr(throughput, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda done: done.mul_(2))  # the other process did as much
    monkeypatch.setattr(Trainer, "training_step", lambda *_: torch.tensor(0.0))
    monkeypatch.setattr(Trainer, "log", lambda _, logs: logged.append(logs))
    trainer = FinetuningTrainer.__new__(FinetuningTrainer)
    trainer.throughput = throughput.Throughput(TrainingFlops(model), torch.device("cpu"))
    for _ in range(2):
        for batch in batches:
            trainer.training_step(model, batch)
        now[0] += 3
        with trainer.throughput.excluded():  # an evaluation, say
            now[0] += 50
        now[0] += 1
        trainer.log({"loss": 1.0})
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    flops = sum(TrainingFlops(model)(batch) for batch in batches)
    speed = {"images_per_second": 2 * 3 / 4, "tokens_per_second": round(2 * tokens / 4, 1), "mfu": round(flops / 4 / 1e12, 4)}
    assert logged == [{"loss": 1.0} | speed] * 2
    trainer.log({"eval_loss": 1.0})
    assert logged[-1] == {"eval_loss": 1.0}
