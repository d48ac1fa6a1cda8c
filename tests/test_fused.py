"""Fused layers compute what those of transformers and PEFT do: loss and gradients, packed and padded, recomputed or kept."""

import itertools
import os

import adapters
import pytest
import torch
from forked import run_processes
from peft import LoraConfig, get_peft_model
from runs import free_port
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.model.loading import base_model, compile_layers, set_gradient_checkpointing
from common.model.lora import FusedLoraLinear, FusedLoraLinear4bit, fuse_lora
from common.phi3v import attention, fused
from common.phi3v.layers import use_plain_layers
from common.phi3v.parts import DECODER_LORA_MODULES
from common.training.deepspeed import disable_shm_op

METHODS = ("full", "frozen vision", "LoRA", "LoRA, frozen vision", "QLoRA")


def make_batches(path, rows=slice(None)):
    """Samples with and without images, packed and padded."""
    processor = AutoProcessor.from_pretrained(path, num_crops=1)
    samples = [encode_conversation(conversation, processor) for conversation in adapters.conversations()[rows]]
    return {packing: Collator(processor, packing=packing)(samples) for packing in (True, False)}


def build(path, method, plain=False):
    model = adapters.build(method, fuse=not plain, base=path)
    if plain:
        use_plain_layers(model)
    return model


def run(model, batch, recompute="none"):
    """Loss, and gradients by name."""
    set_gradient_checkpointing(model, recompute)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def batches(random_model):
    return make_batches(random_model)


@pytest.mark.parametrize("method", METHODS)
def test_fused_layers_compute_the_same(random_model, batches, method):
    for packing, modes in ((True, ("none", "elementwise", "selective")), (False, ("elementwise",))):
        expected_loss, expected = run(build(random_model, method, plain=True), batches[packing])
        for recompute in modes:
            model = build(random_model, method)
            assert any(isinstance(module, FusedLoraLinear4bit) for module in model.modules()) == (method == "QLoRA")
            loss, gradients = run(model, batches[packing], recompute)
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert_equal(gradients, expected)
            assert not fused._recipes and not fused.is_recomputing(), "a recipe outlives its step"


def assert_equal(gradients, expected):
    assert gradients.keys() == expected.keys()
    differences = {name: (gradient - expected[name]).norm() for name, gradient in gradients.items()}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert torch.stack(list(differences.values())).norm() <= 1e-5 * norm
    for name, difference in differences.items():
        # The floor is for a key's bias, which shifts all scores alike: its gradient is zero but for rounding.
        assert difference <= 1e-4 * expected[name].norm() + 1e-6, name


def run_distributed(model, batch, recompute, sharded):
    """Loss of this process, and gradients that two processes reduce, by name."""
    set_gradient_checkpointing(model, recompute)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not sharded:
        loss = DistributedDataParallel(model)(**batch).loss
        loss.backward()
        return loss.item(), {name: parameter.grad for name, parameter in trained.items()}
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(trained.values())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loss = engine(**batch).loss
    engine.backward(loss)
    return loss.item(), {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}


def compare_in_two_processes(path, rank, port):
    disable_shm_op()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    batch = make_batches(path, slice(rank, rank + 2))[True]  # both have an image
    for sharded, method in itertools.product((False, True), ("full", "frozen vision", "LoRA", "QLoRA")):
        expected_loss, expected = run_distributed(build(path, method, plain=True), batch, "none", sharded)
        loss, gradients = run_distributed(build(path, method), batch, "elementwise", sharded)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_equal(gradients, expected)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_fused_layers_compute_the_same_under_ddp_and_zero2(random_model):
    port = free_port()
    assert run_processes(compare_in_two_processes, [(random_model, rank, port) for rank in range(2)]) == [0, 0]


@pytest.mark.parametrize("function", ["swiglu", "quick_gelu", "RMSNorm", "LayerNorm"])
def test_backward_passes_are_the_gradients(function):
    generator = torch.Generator().manual_seed(0)
    states, residual = (torch.randn(3, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = torch.nn.LayerNorm(8).double() if function == "LayerNorm" else torch.nn.RMSNorm(8, eps=1e-5).double()
    norm.variance_epsilon = 1e-5
    run = {
        "swiglu": lambda states, residual: fused.swiglu(states),
        "quick_gelu": lambda states, residual: fused.quick_gelu(states),
    }.get(function, lambda states, residual: fused.add_norm(states, residual, norm))
    # The steps compute in fp32 whatever they are given.
    assert torch.autograd.gradcheck(run, (states, residual), eps=1e-2, atol=2e-3, rtol=1e-2)


def test_adapters_follow_their_weights(random_model, batches):
    """However they change: by an optimizer that PyTorch does not see, too."""
    model, plain = build(random_model, "LoRA"), build(random_model, "LoRA", plain=True)
    for changed in (model, plain):
        run(changed, batches[True])
        changed.zero_grad()
        for name, parameter in changed.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(1.5)  # moves no version counter
    assert run(model, batches[True])[0] == pytest.approx(run(plain, batches[True])[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # which the scripts leave out too
def test_layers_are_compiled_for_all_batches_at_once(random_model, monkeypatch):
    """The tower's layers and the decoder's, each kind once for its first batch and once more for all others."""
    graphs = []
    compile = torch.nn.Module.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(query, key, value, ends, longest, scaling):
        return (query * key).sum(-1, keepdim=True) * value

    # One operation on packed samples, as on a GPU. On a CPU, attention runs sample by sample.
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda device: True)
    monkeypatch.setattr(attention, "flash_attention", attend)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: compile(layer, backend=count, **options))
    torch._dynamo.reset()
    model = build(random_model, "LoRA")
    compile_layers(model)
    base = base_model(model).model
    assert all(layer._compiled_call_impl for layer in (*base.layers, *base.vision_embed_tokens.tower.encoder.layers[:-1]))
    counts = []
    for rows in (slice(1, 2), slice(0, 3), slice(0, 2)):
        with torch.autocast("cpu", torch.bfloat16):
            model(**make_batches(random_model, rows)[True]).loss.backward()
        counts.append(len(graphs))
    assert counts[0] >= 2 and counts[1] == counts[2] <= 6


def test_a_kernel_is_compiled_once_for_each_width(monkeypatch):
    """For all numbers of tokens, with the width as a constant; in this process, tensors pass as CUDA tensors."""
    widths = []
    compile = torch.compile

    def count(graph, inputs):
        widths.append([str(node.meta["example_value"].shape[-1]) for node in graph.graph.nodes if node.name == "l_weight_"])
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=count))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(fused, "can_compile", lambda device: True)
    torch._dynamo.reset()
    norm = fused._kernel(fused._normalize)
    for tokens, width in ((5, 8), (7, 8), (6, 16), (9, 16), (3, 8)):
        states, weight = torch.randn(tokens, width), torch.randn(width)
        expected = torch.nn.functional.rms_norm(states, (width,), weight, 1e-5)
        torch.testing.assert_close(norm(states, weight, None, 1e-5), expected)
    assert widths == [["8"], ["16"]]


@pytest.mark.parametrize(
    ("capability", "header", "expected"), [((7, 5), True, True), ((6, 0), True, False), ((9, 0), False, False)]
)
def test_kernels_are_compiled_only_where_triton_can(capability, header, expected, monkeypatch, tmp_path):
    (tmp_path / ("Python.h" if header else "other.h")).touch()
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    monkeypatch.setattr(fused.shutil, "which", lambda name: name)
    monkeypatch.setattr(fused.sysconfig, "get_path", lambda *names: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fused.can_compile.__wrapped__(torch.device("cuda:0")) is expected


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_what_one_step_cannot_run_is_left_to_peft(options, random_model, batches):
    found = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32, attn_implementation="varlen").train()
        config = LoraConfig(r=4, target_modules=DECODER_LORA_MODULES, init_lora_weights="gaussian", **options)
        model = get_peft_model(model, config)
        if fuse:
            fuse_lora(model)
        torch.manual_seed(1)
        found.append(run(model, batches[True])[0])
    assert found[0] == found[1]


def test_under_autocast_adapters_compute_in_its_dtype(random_model, batches):
    model = build(random_model, "LoRA").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batches[True]).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert {cast.dtype for layer in layers for cast in layer.casts} == {torch.bfloat16}
    assert {p.grad.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
