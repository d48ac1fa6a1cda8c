"""Key-value cache with preallocated buffers, which avoids copying the whole cache for every new token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

PREALLOCATED_TOKENS = 128


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, tokens, head size), as views of larger preallocated buffers.

    After a :meth:`crop`, the next :meth:`update` overwrites tensors that were returned before. This would corrupt gradients,
    so with gradients enabled, keys and values are copied as in the base class.
    """

    _buffers: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past_tokens = self.get_seq_length()
        if past_tokens == 0 or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        new_tokens = key_states.shape[-2]
        if not self._fits(past_tokens + new_tokens):
            self._buffers = tuple(_preallocate(states, new_tokens + PREALLOCATED_TOKENS) for states in self._states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., past_tokens : past_tokens + new_tokens, :] = states
        self._set_length(past_tokens + new_tokens)
        return self._states

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows of the batch by index, int64 (rows,); an index may be repeated."""
        tokens = self.get_seq_length()
        if tokens == 0 or torch.is_grad_enabled():
            super().batch_select_indices(indices)
            return
        self._buffers = tuple(_preallocate(states, PREALLOCATED_TOKENS, indices) for states in self._states)
        self._set_length(tokens)

    @property
    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _set_length(self, tokens: int) -> None:
        self.keys, self.values = (buffer[..., :tokens, :] for buffer in self._buffers)

    def _fits(self, end: int) -> bool:
        """Whether the buffers have capacity for ``end`` tokens and still hold keys and values (beam search replaces those)."""
        return bool(self._buffers) and all(
            buffer.shape[-2] >= end and states.data_ptr() == buffer.data_ptr()
            for buffer, states in zip(self._buffers, self._states, strict=True)
        )


def new_cache() -> Cache:
    """Create an empty cache."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def _preallocate(states: torch.Tensor, more: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Copy states, or selected rows of them, to a buffer with capacity for ``more`` additional tokens."""
    batch, heads, tokens, size = states.shape
    buffer = states.new_empty((batch if rows is None else len(rows), heads, tokens + more, size))
    if rows is None:
        buffer[..., :tokens, :] = states
    else:
        torch.index_select(states, 0, rows, out=buffer[..., :tokens, :])
    return buffer
