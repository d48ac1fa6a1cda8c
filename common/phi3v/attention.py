"""Attention over packed samples: the implementation ``varlen``.

On GPUs that support it, this is PyTorch's own variable-length flash attention kernel, so flash-attn need not be compiled;
elsewhere SDPA runs one sample at a time. Padded batches and generation use SDPA.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def supports_gqa(kernel: Callable[..., Any]) -> bool:
    """Whether a kernel takes ``enable_gqa``, as PyTorch's does since 2.13. By its signature, since builds differ."""
    return "enable_gqa" in inspect.signature(kernel).parameters


KERNEL_SUPPORTS_GQA = supports_gqa(varlen_attn)  # here, because torch.compile cannot trace it


@cache
def has_varlen_kernel(device: torch.device) -> bool:
    """Whether the device supports PyTorch's variable-length flash kernel: NVIDIA GPUs of the Ampere generation or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in which tokens attend only to their own sample.

    Parameters
    ----------
    query, key, value : torch.Tensor
        (1, heads, tokens, head size) if samples are packed, else (batch, heads, tokens, head size).
    attention_mask : torch.Tensor, optional
        As for SDPA; unused for packed samples.
    cu_seq_lens_q : torch.Tensor, optional
        int32 (samples + 1,), the start of each sample, and the total. None for padded batches.
    max_length_q : int, optional
        Length of the longest sample.

    Returns
    -------
    tuple of (torch.Tensor, None)
        (batch, tokens, heads, head size).
    """
    if cu_seq_lens_q is None:
        kwargs.pop("cu_seq_lens_k", None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert max_length_q is not None
    # Under autocast, a rotary embedding in fp32 returns queries and keys in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if has_varlen_kernel(query.device) and value.dtype in (torch.bfloat16, torch.float16):
        # The gradient of squeeze is a view; that of indexing would be written into a tensor of zeros.
        query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        return flash_attention(query, key, value, cu_seq_lens_q, max_length_q, scaling)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped) for q, k, v in samples]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention with PyTorch's variable-length flash kernel.

    Parameters
    ----------
    query, key, value : torch.Tensor
        bf16 or fp16 (tokens, heads, head size); ``key`` and ``value`` may have fewer heads, a divisor of the query's.
    cu_seq_lens : torch.Tensor
        int32 (samples + 1,), the start of each sample, and the total.
    max_length : int
        Length of the longest sample.
    scaling : float, optional
        Factor for the scores; by default the inverse square root of the head size.

    Returns
    -------
    torch.Tensor
        (tokens, heads, head size).
    """
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if KERNEL_SUPPORTS_GQA:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, window_size=(-1, 0), **options
    )
    assert isinstance(output, torch.Tensor)  # a tuple only if auxiliary outputs are requested
    return output


AttentionInterface.register("varlen", varlen_attention_forward)
AttentionMaskInterface.register("varlen", sdpa_mask)
