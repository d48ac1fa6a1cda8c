"""Count the kernels of code that runs on fake tensors, with their FLOPs and bytes, and tell what they take on a GPU.

A kernel takes the longest of its FLOPs at the GPU's rate, the bytes that it reads and writes at the GPU's bandwidth, and the
shortest time of a kernel.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from common.phi3v.flops import named_peak_flops

SHORTEST_KERNEL = 2.5e-6  # seconds


class Gpu(NamedTuple):
    """Memory in GB (10⁹ bytes), rates in TFLOP/s, and TB/s; and the seconds in which the CPU launches a kernel."""

    gigabytes: float
    peak: float
    products: float
    attention: float
    attention_backward: float
    bandwidth: float
    # Includes Python and autograd. As on the slow cores of the machine whose H100 was measured.
    to_launch: float = 110e-6


def from_data_sheet(name: str, gigabytes: float, bandwidth: float, products: float = 0.75, attention: float = 0.45) -> Gpu:
    """Assume which shares of the rates in its data sheet a GPU reaches."""
    peak = (named_peak_flops(name) or 0) / 1e12
    return Gpu(gigabytes, peak, products * peak, attention * peak, 0.8 * attention * peak, 0.9 * bandwidth)


# By what it costs to rent one. Those of the H100 are measured. T4 and V100 have no flash kernel; a T4 can't keep up its clock.
GPUS = {
    "T4": from_data_sheet("T4", 15.6, 0.32, products=0.45, attention=0.2),
    "RTX 4090": from_data_sheet("RTX 4090", 25.2, 1.008),
    "V100": from_data_sheet("V100", 34.0, 0.9, products=0.7, attention=0.25),
    "L40S": from_data_sheet("L40S", 47.7, 0.864, products=0.65),
    "A100": from_data_sheet("A100", 85.0, 2.039),
    "H100": Gpu(85.0, 989, 710, 280, 222, 3.0),
    "H200": Gpu(150.1, 989, 710, 280, 222, 4.3),
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_local_scalar_dense"}
NO_KERNEL |= {"lift_fresh", "_reshape_alias", "detach"}
GATHERS = {"embedding", "index", "index_select", "gather"}  # read only the rows that they return
COPIES = {"_to_copy", "copy_", "clone", "cat", "_foreach_copy_", "contiguous", "stack"}


class Kernel(NamedTuple):
    """One kind of kernel: its group in the report, FLOPs, which rate they run at, and bytes read and written."""

    group: str
    rate: str
    flops: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        """The time that a GPU needs for it."""
        return max(self.flops / getattr(gpu, self.rate) / 1e12, self.bytes / gpu.bandwidth / 1e12, SHORTEST_KERNEL)


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; the elements of an expanded one are read once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Meter(TorchDispatchMode):
    """Counts the kernels that run in its context, and the bytes that are alive at once.

    Attributes
    ----------
    phases : list of Counter of Kernel
        Launches of each kind, between the points where the CPU waits for the GPU.
    peak : int
        Most bytes that were allocated at the same time, without the tensors of ``exempt``.
    """

    def __init__(self, exempt: list[torch.Tensor]) -> None:
        super().__init__()
        self.phases: list[Counter[Kernel]] = [Counter()]
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in exempt}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function.namespace == "prim":
            return output
        name = function._schema.name.split("::")[1]
        if name == "nonzero":  # its size is only known when it has run
            self.phases.append(Counter())
        if not (function.is_view or name in NO_KERNEL):
            self._count(function, name, args, kwargs or {}, output)
        self.allocate(output)
        return output

    def _count(self, function: Any, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        read, written = tensors((args, kwargs)), tensors(output if output is not None else args[0])
        if name in ("copy_", "_foreach_copy_"):
            read = tensors(args[1])
        elif name in ("zero_", "fill_"):
            read = []
        moved = sum(map(nbytes, written))
        moved += moved if name in GATHERS else sum(map(nbytes, read))
        group, rate, flops = "copies and casts" if name in COPIES else "other", "products", 0.0
        if "attn" in name or "attention" in name:
            group, rate = "attention", "attention_backward" if "backward" in name else "attention"
            named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
            flops = attention_flops(named) * (2.5 if "backward" in name else 1)
        elif (product := flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))) is not None:
            group, flops = "matrix products", product(*args, **kwargs, out_val=output)
        self.phases[-1][Kernel(group, rate, float(flops), float(moved))] += 1

    def allocate(self, output: Any) -> None:
        """Add new tensors to the live bytes, until they are freed."""
        for tensor in tensors(output):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self._storages[key] = weakref.ref(storage, functools.partial(self._free, key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._storages[key]

    def whole(self, function: Callable, group: str, product: bool = False) -> Callable:
        """Make a function count as one kernel, which reads its arguments and writes its output once."""

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            with _disable_current_modes():
                output = function(*args)
            flops = 2.0 * args[0].numel() * args[1].shape[1] if product else 0.0
            moved = float(sum(map(nbytes, tensors((args, output)))))
            self.phases[-1][Kernel(group, "products", flops, moved)] += 1
            self.allocate(output)
            return output

        return call


def attention_flops(named: dict[str, Any]) -> float:
    """FLOPs of the forward pass: below the diagonal in packed batches, all query-key pairs elsewhere."""
    query, key = named["query"], named["key"]
    if "cu_seq_q" in named:  # (tokens, heads, head size)
        lengths = named["cu_seq_q"].diff().double()
        return 4.0 * query.shape[1] * query.shape[2] * float((lengths * (lengths + 1) / 2).sum())
    return 4.0 * query.numel() * key.shape[-2]
