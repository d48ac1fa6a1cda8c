"""The last decoder layer, which in training is computed at the positions of answers only.

The loss needs the output of the last layer only at the positions of answers, a few of the thousands of tokens of a sample.
Earlier layers must run at all positions; in the last layer, only keys and values are needed at all positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.phi3 import modeling_phi3


def answer_spans(labels: list[torch.Tensor]) -> torch.Tensor:
    """Positions of the answers of each packed sample, for :class:`Phi3VLastLayer`.

    Parameters
    ----------
    labels : list of torch.Tensor
        int64 (tokens,) of each sample, −100 where nothing is to be learned.

    Returns
    -------
    torch.Tensor
        int64 (samples, 2), positions in the row: the position from which the first answer token is predicted, and the end of
        the sample. A sample without an answer keeps its last position, so that all layers run.
    """
    spans, begin = [], 0
    for sample in labels:
        supervised = (sample != -100).nonzero()
        first = int(supervised[0]) if len(supervised) else len(sample)
        spans.append((begin + max(0, first - 1), begin + len(sample)))
        begin += len(sample)
    return torch.tensor(spans)


def span_positions(spans: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All positions in the spans, int64 (positions,)."""
    return torch.cat([torch.arange(begin, end) for begin, end in spans.tolist()]).to(device, non_blocking=True)


class Phi3VLastLayer(modeling_phi3.Phi3DecoderLayer):
    """A decoder layer that can skip positions whose output is not used."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        answer_spans: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the layer; with ``answer_spans``, see :func:`answer_spans`, return (1, positions of all spans, hidden size).

        Samples must then be packed in one row, without a KV cache.
        """
        if answer_spans is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        positions = span_positions(answer_spans, hidden_states.device)
        attended = self._attend(self.input_layernorm(hidden_states), position_embeddings, answer_spans.tolist())
        hidden_states = hidden_states[:, positions] + self.resid_attn_dropout(attended)
        return hidden_states + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _attend(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        spans: list[tuple[int, int]],
    ) -> torch.Tensor:
        attention, size = self.self_attn, self.self_attn.head_dim
        heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        states = attention.qkv_proj(hidden_states).unflatten(-1, (-1, size)).transpose(1, 2)
        query, key, value = states.split((heads, key_heads, key_heads), dim=1)
        query, key = modeling_phi3.apply_rotary_pos_emb(query, key, *position_embeddings)
        # Under autocast, a rotary embedding in fp32 returns queries and keys in fp32.
        query, key = query.to(value.dtype), key.to(value.dtype)
        outputs, sample = [], 0
        for begin, end in spans:
            # Each token attends to its sample up to itself: the lower right part of the causal mask.
            mask = torch.ones(end - begin, end - sample, dtype=torch.bool, device=query.device).tril(begin - sample)
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, begin:end],
                    key[:, :, sample:end],
                    value[:, :, sample:end],
                    attn_mask=mask,
                    scale=attention.scaling,
                    enable_gqa=heads != key_heads,
                )
            )
            sample = end
        return attention.o_proj(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))
