"""A key-value cache that new tokens are written into, instead of being copied with all that came before at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 128  # tokens that are preallocated at once


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, tokens, head size), at the beginning of tensors with room for more.

    What :meth:`update` returned before is written over by the next one after a :meth:`crop`; with gradients, which that would
    spoil, it copies as its base does.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        begun = self.get_seq_length()
        if begun == 0 or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        new_tokens = key_states.shape[-2]
        if not self._fits(begun + new_tokens):
            self._buffers = tuple(_preallocate(states, new_tokens + ROOM) for states in (self.keys, self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begun : begun + new_tokens, :] = states
        self._fill(begun + new_tokens)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch, int64 (rows,), or take some several times."""
        tokens = self.get_seq_length()
        if tokens == 0 or torch.is_grad_enabled():
            super().batch_select_indices(indices)
            return
        self._buffers = tuple(_preallocate(states, ROOM, indices) for states in (self.keys, self.values))
        self._fill(tokens)

    def _fill(self, tokens: int) -> None:
        self.keys, self.values = (buffer[..., :tokens, :] for buffer in self._buffers)

    def _fits(self, end: int) -> bool:
        """Whether keys and values still lie in the buffers, as they don't once beams changed places, and there is room left."""
        if self._buffers is None:
            return False
        return all(
            buffer.shape[-2] >= end and states.data_ptr() == buffer.data_ptr()
            for buffer, states in zip(self._buffers, (self.keys, self.values), strict=True)
        )


def new_cache() -> Cache:
    """An empty cache."""
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def _preallocate(states: torch.Tensor, more: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Copy states, or some rows of them, into a tensor with room for more tokens."""
    batch, heads, tokens, size = states.shape
    room = states.new_empty((batch if rows is None else len(rows), heads, tokens + more, size))
    if rows is None:
        room[..., :tokens, :] = states
    else:
        torch.index_select(states, 0, rows, out=room[..., :tokens, :])
    return room
