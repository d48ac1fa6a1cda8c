"""The decoder's last layer, which in training runs only where answers are.

The loss needs the last layer's output at the positions of answers alone, a few of a sample's thousands of tokens. The layers
before it give keys and values to later ones and run everywhere; of the last one, only keys and values are needed everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.phi3 import modeling_phi3


def answer_spans(labels: list[torch.Tensor]) -> torch.Tensor:
    """From where to where each sample of a packed row is answers, for what :class:`Phi3VLastLayer` leaves out.

    Parameters
    ----------
    labels : list of torch.Tensor
        int64 (tokens,) of each sample, −100 where nothing is to be learned.

    Returns
    -------
    torch.Tensor
        int64 (samples, 2), positions in the row: the one that the sample's first answer is predicted from, and the sample's
        end. A sample without an answer keeps its last position, so that every layer is run.
    """
    spans, begin = [], 0
    for sample in labels:
        supervised = (sample != -100).nonzero()
        first = int(supervised[0]) if len(supervised) else len(sample)
        spans.append((begin + max(0, first - 1), begin + len(sample)))
        begin += len(sample)
    return torch.tensor(spans)


def span_positions(spans: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All positions of some spans, int64 (positions,)."""
    return torch.cat([torch.arange(begin, end) for begin, end in spans.tolist()]).to(device, non_blocking=True)


class Phi3VLastLayer(modeling_phi3.Phi3DecoderLayer):
    """A decoder layer that can leave out the positions whose output nobody needs."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        answer_spans: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the layer; with ``answer_spans``, see :func:`answer_spans`, return (1, positions of all spans, hidden size).

        Samples must then be laid end to end in one row, and nothing is cached.
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
        # Rotary embedding in fp32 leaves query and key wider than value under autocast.
        query, key = query.to(value.dtype), key.to(value.dtype)
        outputs, sample = [], 0
        for begin, end in spans:
            # Each sees its sample up to itself: the lower right of the causal square.
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
