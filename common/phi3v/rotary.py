"""LongRoPE, by each sample's own length."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from .configuration import Phi3VConfig


class Phi3VRotaryEmbedding(nn.Module):
    """LongRoPE by each sample's own length.

    Reference: Ding et al., LongRoPE (2024), as configured by ``short_factor`` and ``long_factor``.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.config = config
        self.limit = config.original_max_position_embeddings
        inv_freq, self.attention_scaling = self.inverse_frequencies()
        # Row 0 serves samples up to `limit` tokens, row 1 longer ones.
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def inverse_frequencies(self) -> tuple[torch.Tensor, float]:
        """Return inverse frequencies, float32 (2, head size / 2), and the factor for cosine and sine."""
        rope_type = self.config.rope_parameters["rope_type"]
        if rope_type == "default":
            inv_freq, scaling = Phi3RotaryEmbedding.compute_default_rope_parameters(self.config)
            return torch.stack([inv_freq, inv_freq]), scaling
        compute = ROPE_INIT_FUNCTIONS[rope_type]
        short, scaling = compute(self.config, seq_len=self.limit)
        long, _ = compute(self.config, seq_len=self.limit + 1)
        return torch.stack([short, long]), scaling

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 (batch, tokens, head size).

        Parameters
        ----------
        position_ids : torch.Tensor
            int64 (batch, tokens).
        lengths : torch.Tensor
            int64, length of the sample that each token belongs to, (batch, tokens) or (batch, 1).
        """
        factors = self.inv_freq.float()[(lengths > self.limit).long()]
        angles = position_ids[..., None].float() * factors
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
