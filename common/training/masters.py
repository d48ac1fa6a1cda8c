"""fp32 master weights of a model that trains in bf16 without DeepSpeed, which keeps its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MasterWeights:
    """fp32 copies of bf16 weights, which the optimizer updates in their place.

    A bf16 weight is always its master weight, rounded. Gradients are accumulated and reduced in bf16, and clipped in fp32, as
    under ZeRO-2.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Its parameters are replaced.
    weights : dict of torch.nn.Parameter
        The bf16 weights that it trains, by name.
    saved : dict of torch.Tensor
        Master weights of a checkpoint, by name; by default those that equal the weights.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], saved: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.weights = weights
        self.fp32 = {
            name: nn.Parameter((saved[name].to(weight.device) if saved else weight.detach()).float())
            for name, weight in weights.items()
        }
        by_weight = {weight: self.fp32[name] for name, weight in weights.items()}
        for group in optimizer.param_groups:
            group["params"] = [by_weight.get(parameter, parameter) for parameter in group["params"]]
        optimizer.register_step_post_hook(self._write_weights)

    def take_gradients(self) -> list[nn.Parameter]:
        """Give the master weights the gradients of the weights in fp32; returns the master weights."""
        for name, weight in self.weights.items():
            self.fp32[name].grad = None if weight.grad is None else weight.grad.float()
        return list(self.fp32.values())

    @torch.no_grad()
    def _write_weights(self, *_: Any) -> None:
        assert any(master.grad is not None for master in self.fp32.values()), "take_gradients comes before the step"
        torch._foreach_copy_(list(self.weights.values()), list(self.fp32.values()))
        for master in self.fp32.values():
            master.grad = None
