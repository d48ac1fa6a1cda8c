"""Norms and activation of transformers' modules, which compute the same in fewer passes over a GPU's memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import QuickGELUActivation
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm


class LeanQuickGELU(QuickGELUActivation):
    """x·σ(1.702 x) by way of SiLU, whose gradient keeps one tensor where the product's keeps two.

    Source: Hendrycks & Gimpel, Gaussian Error Linear Units (2016), the sigmoid approximation.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of each element, in its dtype."""
        return silu(1.702 * input) / 1.702


class LeanRMSNorm(Phi3RMSNorm):
    """RMSNorm that on a GPU is PyTorch's fused kernel, in the dtype of its weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; computed in fp32, returned in the dtype of input and weights."""
        if not _leave_dtype(self, hidden_states):
            return super().forward(hidden_states)
        with torch.autocast("cuda", enabled=False):
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LeanLayerNorm(nn.LayerNorm):
    """LayerNorm that under a GPU's autocast stays in the dtype of its weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension; computed in fp32, returned in the dtype of input and weights."""
        if not _leave_dtype(self, input):
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            return super().forward(input)


def _leave_dtype(norm: nn.Module, hidden_states: torch.Tensor) -> bool:
    # Kernels compute in fp32 anyway. Autocast, which doesn't know, has all they read and write, and all that follows in the
    # residual stream, copied to fp32.
    return hidden_states.is_cuda and hidden_states.dtype == norm.weight.dtype


LEAN = {QuickGELUActivation: LeanQuickGELU, Phi3RMSNorm: LeanRMSNorm, nn.LayerNorm: LeanLayerNorm}


def use_lean_layers(model: nn.Module) -> None:
    """Let a model's norms and activations be those of this module; others, Liger's say, stay what they are."""
    for module in model.modules():
        module.__class__ = LEAN.get(type(module), type(module))
