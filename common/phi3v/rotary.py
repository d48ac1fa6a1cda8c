"""LongRoPE with factors selected by the length of each sample."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from .configuration import Phi3VConfig


class Phi3VRotaryEmbedding(nn.Module):
    """LongRoPE with short or long factors, selected by the length of each sample.

    Reference: Ding et al., LongRoPE (2024), as configured by ``short_factor`` and ``long_factor``.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.config = config
        self.limit = config.original_max_position_embeddings
        inv_freq, self.attention_scaling = self.inverse_frequencies()
        # Row 0: samples of up to `limit` tokens. Row 1: longer samples.
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def inverse_frequencies(self) -> tuple[torch.Tensor, float]:
        """Return the inverse frequencies, float32 (2, head size / 2), and the scaling factor of cosine and sine."""
        assert self.config.rope_parameters is not None
        rope_type = str(self.config.rope_parameters["rope_type"])
        if rope_type == "default":
            inv_freq, scaling = Phi3RotaryEmbedding.compute_default_rope_parameters(self.config)
            return torch.stack([inv_freq, inv_freq]), scaling
        compute = ROPE_INIT_FUNCTIONS[rope_type]
        short, scaling = compute(self.config, seq_len=self.limit)
        long, _ = compute(self.config, seq_len=self.limit + 1)
        return torch.stack([short, long]), scaling

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute cosine and sine, float32 (batch, tokens, head size).

        Parameters
        ----------
        position_ids : torch.Tensor
            int64 (batch, tokens).
        lengths : torch.Tensor
            Length of the sample of each token, int64 (batch, tokens) or (batch, 1).
        """
        factors = self.inv_freq.float()[(lengths > self.limit).long()]
        angles = position_ids[..., None].float() * factors
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
