"""CUDA tensors on a machine without a GPU: they claim to be on ``cuda:0``, and are computed on the CPU.

Within :func:`pretend_cuda`, an operation on tensors of both devices raises :class:`MixedDevices` where a GPU would refuse it.
Unlike PyTorch's fake tensors, these have values, so that code that reads them (``item``, lengths, masks, stop tokens) works.
Backward passes would end the process: the autograd engine of a CPU build has no CUDA streams.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
# These take tensors of both devices: copies, and indices on the CPU into tensors on a GPU.
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class MixedDevices(RuntimeError):
    """An operation got tensors of two devices."""


class CudaTensor(torch.Tensor):
    """A tensor that claims to be on ``cuda:0``; ``value`` is a plain tensor on the CPU."""

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> CudaTensor:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=CUDA, **layout)
        tensor.value = value
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:  # PyTorch's reads memory that a subclass does not have
        return self.value.tolist()

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def nonzero(self, as_tuple: bool = False) -> torch.Tensor | tuple[torch.Tensor, ...]:
        places = torch.ops.aten.nonzero(self)
        return places.unbind(1) if as_tuple else places

    def new_empty(self, *size, **kwargs) -> torch.Tensor:
        return torch.ops.aten.new_empty(self, size[0] if len(size) == 1 else size, **kwargs)

    def contiguous(self) -> torch.Tensor:
        return self if self.is_contiguous() else torch.ops.aten.clone(self, memory_format=torch.contiguous_format)

    # PyTorch's own nonzero(), contiguous() and brackets ask for CUDA before they run an operation that could be seen here.
    def __getitem__(self, index) -> torch.Tensor:
        view, tensors = _basic_index(self, index)
        return torch.ops.aten.index(view, tensors) if tensors else view

    def __setitem__(self, index, value) -> None:
        view, tensors = _basic_index(self, index)
        if tensors:
            torch.ops.aten.index_put_(view, tensors, torch.as_tensor(value, dtype=self.dtype, device=self.device))
        elif isinstance(value, torch.Tensor):
            torch.ops.aten.copy_(view, value)
        else:
            view.fill_(value)

    def __repr__(self) -> str:  # the default prints values by way of kernels
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise MixedDevices(f"{function} on a CUDA tensor outside pretend_cuda()")


def _basic_index(tensor: torch.Tensor, index) -> tuple[torch.Tensor, list]:
    """Apply the numbers, slices and None of an index; returns the view and the tensors left to index it with."""
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(part.ndim if getattr(part, "dtype", None) == torch.bool else 1 for part in index if part is not None)
    if any(part is Ellipsis for part in index):
        place = next(number for number, part in enumerate(index) if part is Ellipsis)
        index[place : place + 1] = [slice(None)] * (tensor.ndim - used + 1)
    dim, tensors = 0, []
    for part in index:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, int):
            tensor = tensor.select(dim, part)
            continue
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
        else:
            part = torch.tensor(part, device=tensor.device) if isinstance(part, list) else part
            tensors += [None] * (dim - len(tensors)) + [part]
        dim += 1
    return tensor, tensors


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function._schema.name
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_cuda = any(isinstance(tensor, CudaTensor) for tensor in tensors)
        indexed = name in INDEXING and isinstance(args[0], CudaTensor)
        checked = [args[0], *args[2:3]] if indexed else tensors
        checked = [tensor for tensor in checked if isinstance(tensor, torch.Tensor) and tensor.ndim]
        if name not in COPIES and len({isinstance(tensor, CudaTensor) for tensor in checked}) > 1:
            raise MixedDevices(f"{name}: {', '.join(f'{tuple(t.shape)} on {t.device}' for t in checked)}")
        if "device" in kwargs and kwargs["device"] is not None:
            on_cuda = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = CPU
        owners = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}
        args, kwargs = tree_map(lambda leaf: leaf.value if isinstance(leaf, CudaTensor) else leaf, (args, kwargs))
        run = _varlen_attention if "_varlen_attn" in name else function
        result = run(*args, **kwargs)
        if name == "aten::copy_":
            on_cuda = id(args[0]) in owners

        def wrap(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return owners.get(id(leaf)) if id(leaf) in owners else CudaTensor(leaf) if on_cuda else leaf

        return tree_map(wrap, result)


def _varlen_attention(query, key, value, cu_seq_q, *args, scale=None, **kwargs):
    """PyTorch's variable-length kernel: output, log-sum-exp and random state, of which only the first is read."""
    lengths = cu_seq_q.diff().tolist()
    samples = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True)
    grouped = query.shape[1] != key.shape[1]
    outputs = [scaled_dot_product_attention(*sample, is_causal=True, scale=scale, enable_gqa=grouped) for sample in samples]
    output = torch.cat(outputs, dim=1).transpose(0, 1).contiguous()
    return output, query.new_zeros(query.shape[1], len(query), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


@contextmanager
def pretend_cuda(capability: tuple[int, int] = (9, 0)):
    """Make ``cuda`` a device of this machine, by default with the compute capability of an H100."""
    with ExitStack() as stack:
        for target, value in (
            ("torch.cuda.get_device_capability", lambda device=None: capability),
            ("torch.cuda.get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3"),
            ("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda._lazy_init", lambda: None),
            ("torch.cuda.synchronize", lambda device=None: None),
            ("torch.cuda.memory_reserved", lambda device=None: 0),
            ("torch.cuda.memory_allocated", lambda device=None: 0),
            ("torch.cuda.mem_get_info", lambda device=None: (80 * 10**9, 80 * 10**9)),
            ("torch.nonzero", lambda tensor, **kwargs: tensor.nonzero(**kwargs)),
            ("torch.random.fork_rng", lambda devices=(): _fork_rng(devices=())),
        ):
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(_Dispatch())
        # torch.tensor(..., device="cuda") makes its values on the CPU and copies them by an operation that is dispatched.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        yield CUDA


_fork_rng = torch.random.fork_rng


def to_cuda(model: torch.nn.Module) -> torch.nn.Module:
    """Put a model's parameters and buffers there; within :func:`pretend_cuda`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(CudaTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else CudaTensor(buffer)
    return model
