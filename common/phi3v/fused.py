"""Element-wise operations of the model, each in one pass over memory in the forward and in the backward pass.

On a GPU, ``torch.compile`` builds one or two kernels for each function below. Without a GPU or a C compiler, they run as
written. Only the input of an operation is stored for its backward pass.
"""

from __future__ import annotations

import functools
import shutil
import sysconfig
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` can build kernels for a GPU: it needs Triton, a C compiler and the headers of Python.

    Triton supports NVIDIA GPUs of the Volta generation or newer.
    """
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")  # where Triton looks for them
    tools = find_spec("triton") is not None and headers.is_file() and any(map(shutil.which, ("gcc", "clang")))
    return tools and torch.cuda.get_device_capability(device) >= (7, 0)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of (tokens, width) tensors for GPUs, once for all numbers of tokens."""
    compiled = torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not args[0].is_cuda or torch.compiler.is_compiling() or not can_compile(args[0].device):
            return function(*args)
        # torch.compile would build another kernel for tensors that require gradients.
        args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                # Widths of tower and decoder differ, but stay constants of a kernel: it then reads several elements at once.
                torch._dynamo.mark_static(arg, list(range(arg.ndim > 1, arg.ndim)))
                if arg.ndim > 1:
                    torch._dynamo.maybe_mark_dynamic(arg, 0)
        return compiled(*args)

    return call


@_kernel
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


@_kernel
def _swiglu_backward(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    gradient, sigmoid = gradient.float(), gate.sigmoid()
    gate_gradient = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([gate_gradient, gradient * gate * sigmoid], dim=-1).to(gate_up.dtype)


@_kernel
def _quick_gelu(states: torch.Tensor) -> torch.Tensor:
    wide = states.float()
    return (wide * (1.702 * wide).sigmoid()).to(states.dtype)


@_kernel
def _quick_gelu_backward(gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    wide = states.float()
    sigmoid = (1.702 * wide).sigmoid()
    return (gradient.float() * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))).to(states.dtype)


@_kernel
def _rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotated: int) -> torch.Tensor:
    """Rotate the first ``rotated`` heads of (tokens, heads, head size) by angles (tokens, head size)."""
    states, half = qkv[:, :rotated].float(), qkv.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    states = states * cos[:, None].float() + turned * sin[:, None].float()
    return torch.cat([states.to(qkv.dtype), qkv[:, rotated:]], dim=1)


@_kernel
def _rotate_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    states, half = torch.cat([query, key], dim=1).float(), query.shape[-1] // 2
    turned = states * sin[:, None].float()
    turned = torch.cat([turned[..., half:], -turned[..., :half]], dim=-1)
    states = states * cos[:, None].float() + turned
    return torch.cat([states.to(value.dtype), value], dim=1)


def _standardize(states: torch.Tensor, center: bool, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardized states in fp32, (tokens, width), and the factor by which they were scaled, (tokens, 1)."""
    wide = states.float()
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale, scale


def _normalize(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm, or RMSNorm if there is no bias."""
    normed = _standardize(states, bias is not None, eps)[0] * weight.float()
    return (normed if bias is None else normed + bias.float()).to(weight.dtype)


_norm = _kernel(_normalize)


@_kernel
def _add_norm(
    states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = states + residual
    return total, _normalize(total, weight, bias, eps)


@_kernel
def _norm_backward(
    gradient: torch.Tensor, total_gradient: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, center: bool, eps: float
) -> torch.Tensor:
    normed, scale = _standardize(total, center, eps)
    gradient = gradient.float() * weight.float()
    along = normed * (gradient * normed).mean(-1, keepdim=True)
    if center:
        along = along + gradient.mean(-1, keepdim=True)
    return ((gradient - along) * scale + total_gradient.float()).to(total.dtype)


@_kernel
def _norm_weight_backward(gradient: torch.Tensor, total: torch.Tensor, center: bool, eps: float) -> torch.Tensor:
    return (gradient.float() * _standardize(total, center, eps)[0]).sum(0)


class _ElementWise(torch.autograd.Function):
    """A function of one tensor, whose gradient is computed from that tensor."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, function: Callable, backward: Callable) -> torch.Tensor:
        ctx.save_for_backward(states)
        ctx.function = backward
        output = function(states.reshape(-1, states.shape[-1]))
        return output.view(*states.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        [states] = ctx.saved_tensors
        rows = states.reshape(-1, states.shape[-1])
        return ctx.function(gradient.reshape(len(rows), -1), rows).view(states.shape), None, None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second half: (..., 2 × width) to (..., width).

    Source: Shazeer, GLU Variants Improve Transformer (2020).
    """
    output = _ElementWise.apply(gate_up, _swiglu, _swiglu_backward)
    remember(output, _swiglu, gate_up)
    return output


def quick_gelu(states: torch.Tensor) -> torch.Tensor:
    """x·σ(1.702 x), CLIP's activation.

    Source: Hendrycks & Gimpel, Gaussian Error Linear Units (2016), the sigmoid approximation.
    """
    output = _ElementWise.apply(states, _quick_gelu, _quick_gelu_backward)
    remember(output, _quick_gelu, states)
    return output


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int
    ) -> tuple[torch.Tensor, ...]:
        batch, tokens, _ = qkv.shape
        size = cos.shape[-1]
        cos, sin = (angles.expand(batch, tokens, size).reshape(-1, size) for angles in (cos, sin))
        ctx.save_for_backward(cos, sin)
        output = _rotate(qkv.reshape(batch * tokens, heads + 2 * key_heads, size), cos, sin, heads + key_heads)
        return output.unflatten(0, (batch, tokens)).split((heads, key_heads, key_heads), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        batch, tokens = gradients[0].shape[:2]
        gradient = _rotate_backward(*(gradient.flatten(0, 1) for gradient in gradients), *ctx.saved_tensors)
        return gradient.view(batch, tokens, -1), None, None, None, None


def rotate_qkv(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the output of ``qkv_proj`` into heads, and apply the rotary embedding to queries and keys.

    Parameters
    ----------
    qkv : torch.Tensor
        (batch, tokens, (heads + 2 key heads) × head size).
    cos, sin : torch.Tensor
        (batch or 1, tokens, head size).

    Returns
    -------
    tuple of torch.Tensor
        Queries, keys and values, (batch, tokens, heads, head size), views of one tensor.
    """
    return _Rotate.apply(qkv, cos, sin, heads, key_heads)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = states.reshape(-1, states.shape[-1])
        if residual is None:
            total, normed = states, _norm(rows, weight, bias, eps)
        else:
            total, normed = _add_norm(rows, residual.reshape(rows.shape), weight, bias, eps)
            total = total.view(states.shape)
        ctx.save_for_backward(total, weight, bias)
        ctx.eps, ctx.adds = eps, residual is not None
        return total, normed.view(states.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_gradient: torch.Tensor, gradient: torch.Tensor) -> tuple:
        total, weight, bias = ctx.saved_tensors
        shape, center, weight_gradient, bias_gradient = total.shape, bias is not None, None, None
        gradient, total_gradient, total = (states.reshape(-1, shape[-1]) for states in (gradient, total_gradient, total))
        states_gradient = _norm_backward(gradient, total_gradient, total, weight, center, ctx.eps).view(shape)
        if ctx.needs_input_grad[2]:
            weight_gradient = _norm_weight_backward(gradient, total, center, ctx.eps).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            bias_gradient = gradient.sum(0)
        return states_gradient, states_gradient if ctx.adds else None, weight_gradient, bias_gradient, None


def add_norm(
    states: torch.Tensor, residual: torch.Tensor | None, norm: nn.LayerNorm | Phi3RMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the residual stream and normalize the sum.

    Parameters
    ----------
    states, residual : torch.Tensor
        (..., width). If ``residual`` is None, ``states`` is the sum.
    norm : torch.nn.LayerNorm or Phi3RMSNorm
        Provides the weights and the epsilon.

    Returns
    -------
    tuple of torch.Tensor
        The sum, and the normalized sum in the dtype of the norm's weight.
    """
    bias, eps = (norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else (None, norm.variance_epsilon)
    total, normed = _AddNorm.apply(states, residual, norm.weight, bias, eps)
    remember(normed, _norm, total, norm.weight, bias, eps)
    return total, normed


# How outputs can be recomputed, by the address of their storage, for as long as they exist.
_recipes: dict[int, tuple[weakref.ref, Callable, tuple]] = {}
_recomputing = False


def remember(
    output: torch.Tensor, function: Callable[..., torch.Tensor], states: torch.Tensor, *parameters: torch.Tensor | float | None
) -> None:
    """Note how to recompute ``output`` from ``states``, which the backward pass stores anyway."""
    if _recomputing and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        key = output.untyped_storage()._cdata
        inputs = (states.detach().reshape(-1, states.shape[-1]), *parameters)
        _recipes[key] = (weakref.ref(output, lambda _: _recipes.pop(key, None)), function, inputs)


class recompute_elementwise(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 named like its base class
    """Context in which norms and activations are recomputed in the backward pass instead of being stored.

    The outputs of matrix products and of attention are stored. Recomputing costs one pass over memory per operation and saves
    about a third of the activation memory.

    Parameters
    ----------
    observe : callable, optional
        Called with every tensor that is stored.
    """

    def __init__(self, observe: Callable[[torch.Tensor], None] | None = None) -> None:
        def pack(tensor: torch.Tensor) -> Any:
            storage = tensor.untyped_storage()
            # The recipe is dropped with its output, so the storage cannot belong to another tensor.
            recipe = _recipes.get(storage._cdata)
            if recipe is not None and tensor.nbytes == storage.nbytes():
                _, function, inputs = recipe
                if observe:
                    observe(inputs[0])
                return function, inputs, tensor.shape
            if observe:
                observe(tensor)
                return tensor.detach()  # this graph may never run backward, and would then keep itself alive
            return tensor

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            function, inputs, shape = packed
            return function(*inputs).view(shape)

        super().__init__(pack, unpack)

    def __enter__(self) -> None:
        global _recomputing
        self._outer, _recomputing = _recomputing, True
        super().__enter__()

    def __exit__(self, *args: Any) -> None:
        global _recomputing
        _recomputing = self._outer
        super().__exit__(*args)


def is_recomputing() -> bool:
    """Whether :class:`recompute_elementwise` is active."""
    return _recomputing
