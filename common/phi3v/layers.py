"""Norms and activation of transformers' modules, which compute the same in fewer passes over a GPU's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import QuickGELUActivation
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, eager_attention_forward

from .fused import add_norm, quick_gelu, rotate_qkv, swiglu


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


class FusedDecoderLayer(Phi3DecoderLayer):
    """A decoder layer whose element-wise steps each take one pass over memory."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' own, which runs where keys and values are cached or residuals dropped."""
        attention, mlp = self.self_attn, self.mlp
        if past_key_values is not None or self.config.resid_pdrop or attention.attention_dropout:
            return super().forward(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
            )
        residual, normed = add_norm(hidden_states, None, self.input_layernorm)
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = rotate_qkv(attention.qkv_proj(normed), *position_embeddings, heads, key_heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states = (states.transpose(1, 2) for states in qkv)
        attended, _ = attend(attention, *states, attention_mask, dropout=0.0, scaling=attention.scaling, **kwargs)
        residual, normed = add_norm(attention.o_proj(attended.flatten(2)), residual, self.post_attention_layernorm)
        return residual + mlp.down_proj(swiglu(mlp.gate_up_proj(normed)))


class FusedEncoderLayer(CLIPEncoderLayer):
    """A layer of the tower whose element-wise steps each take one pass over memory."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """As transformers' own."""
        residual, normed = add_norm(hidden_states, None, self.layer_norm1)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        residual, normed = add_norm(attended, residual, self.layer_norm2)
        return residual + self.mlp.fc2(quick_gelu(self.mlp.fc1(normed)))


LEAN = {QuickGELUActivation: LeanQuickGELU, Phi3RMSNorm: LeanRMSNorm, nn.LayerNorm: LeanLayerNorm}
LEAN |= {Phi3DecoderLayer: FusedDecoderLayer, CLIPEncoderLayer: FusedEncoderLayer}


def use_lean_layers(model: nn.Module) -> None:
    """Let a model's norms and activations be those of this module; others, Liger's say, stay what they are."""
    for module in model.modules():
        module.__class__ = LEAN.get(type(module), type(module))
