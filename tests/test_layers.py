"""The layers that stand in for transformers' own compute the same."""

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm

from common.phi3v import layers
from common.phi3v.fused import quick_gelu


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def saved_for_gradients(function, states):
    """Bytes that a function keeps of its input for its gradient."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function(states)
    return sum(kept.values())


def test_the_activation_of_the_tower_is_that_of_clip_and_keeps_half_as_much():
    states = torch.linspace(-30, 30, 1001).view(1, -1).requires_grad_()
    expected, found = ACT2FN["quick_gelu"](states), quick_gelu(states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    slopes, found_slopes = (torch.autograd.grad(output.sum(), states)[0] for output in (expected, found))
    torch.testing.assert_close(found_slopes, slopes, rtol=1e-5, atol=1e-6)
    assert 2 * saved_for_gradients(quick_gelu, states) == saved_for_gradients(ACT2FN["quick_gelu"], states)


def test_a_gpus_norm_computes_what_transformers_does(model, monkeypatch):
    """The kernel's name is enough here: without a GPU it is PyTorch's composition of the same."""
    norms = [module for module in model.modules() if isinstance(module, Phi3RMSNorm)]
    assert {type(norm) for norm in norms} == {layers.LeanRMSNorm} and len(norms) > 2
    states = 3 * torch.randn(5, norms[0].weight.numel())
    expected = norms[0](states)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    called = []
    fused = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda *args: called.append(args[0].dtype) or fused(*args))
    torch.testing.assert_close(norms[0](states), expected, rtol=1e-6, atol=1e-6)
    norms[0](states.bfloat16())  # of another dtype than the weights: as transformers
    assert called == [torch.float32]
