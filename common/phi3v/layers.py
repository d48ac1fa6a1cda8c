"""Norms and layers that compute the same as those of transformers in fewer passes over a GPU's memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm, eager_attention_forward

from .fused import add_norm, quick_gelu, rotate_qkv, swiglu


class LeanRMSNorm(Phi3RMSNorm):
    """RMSNorm that uses PyTorch's fused kernel on a GPU, in the dtype of its weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension in fp32; the output has the dtype of input and weights."""
        if not _leave_dtype(self, hidden_states):
            return super().forward(hidden_states)
        with torch.autocast("cuda", enabled=False):
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class LeanLayerNorm(nn.LayerNorm):
    """LayerNorm that stays in the dtype of its weights under autocast on a GPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension in fp32; the output has the dtype of input and weights."""
        if not _leave_dtype(self, input):
            return super().forward(input)
        with torch.autocast("cuda", enabled=False):
            return super().forward(input)


def _leave_dtype(norm: nn.Module, hidden_states: torch.Tensor) -> bool:
    # The kernels compute in fp32 anyway. Autocast would cast their inputs and outputs, and so the residual stream, to fp32.
    return hidden_states.is_cuda and hidden_states.dtype == norm.weight.dtype


class FusedDecoderLayer(Phi3DecoderLayer):
    """A decoder layer whose element-wise operations each take one pass over memory."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Same as in transformers, whose own layer runs with a KV cache or with dropout."""
        attention, mlp = self.self_attn, self.mlp
        if past_key_values is not None or self.config.resid_pdrop or attention.attention_dropout:
            return super().forward(
                hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
            )
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        assert key_heads is not None and position_embeddings is not None
        residual, normed = add_norm(hidden_states, None, self.input_layernorm)
        qkv = rotate_qkv(attention.qkv_proj(normed), *position_embeddings, heads, key_heads)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states = (states.transpose(1, 2) for states in qkv)
        attended, _ = attend(attention, *states, attention_mask, dropout=0.0, scaling=attention.scaling, **kwargs)
        residual, normed = add_norm(attention.o_proj(attended.flatten(2)), residual, self.post_attention_layernorm)
        return residual + mlp.down_proj(swiglu(mlp.gate_up_proj(normed)))


class FusedEncoderLayer(CLIPEncoderLayer):
    """A layer of the vision tower whose element-wise operations each take one pass over memory."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Same as in transformers."""
        residual, normed = add_norm(hidden_states, None, self.layer_norm1)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        residual, normed = add_norm(attended, residual, self.layer_norm2)
        return residual + self.mlp.fc2(quick_gelu(self.mlp.fc1(normed)))


FUSED = {Phi3DecoderLayer: FusedDecoderLayer, CLIPEncoderLayer: FusedEncoderLayer}
LEAN = {Phi3RMSNorm: LeanRMSNorm, nn.LayerNorm: LeanLayerNorm} | FUSED


def use_lean_layers(model: nn.Module) -> None:
    """Replace a model's norms and layers with those of this module; others, such as Liger's, stay as they are."""
    for module in model.modules():
        module.__class__ = LEAN.get(type(module), type(module))


def use_plain_layers(model: nn.Module) -> None:
    """Replace the fused layers with those of transformers. The norms stay, because they also set the dtype between layers."""
    plain = {fused: layer for layer, fused in FUSED.items()}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
