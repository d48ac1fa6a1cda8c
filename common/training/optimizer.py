"""The optimizer: a learning rate for each part of the model, and fp32 master weights of a model that trains in bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.phi3v.parts import PARTS, part_of

# DeepSpeed makes one tensor of each group of parameters, and bitsandbytes counts its elements in 32 bits.
GROUP_ELEMENTS = 2**31 - 1
Settings = list[tuple[float, float]]


def group_by_part(optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float | None]) -> Settings:
    """Split the parameter groups of an optimizer by part of the model, so that each part can have its own learning rate.

    Returns the peak learning rate and the weight decay of each group, for :func:`restore_settings`.
    """
    part = {parameter: part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for name in PARTS:
            members = [parameter for parameter in group["params"] if part[parameter] == name]
            for some in split_parameters(members, GROUP_ELEMENTS):
                groups.append({**group, "params": some, "lr": rates.get(name) or group["lr"]})
    optimizer.param_groups[:] = groups
    return [(group["lr"], group["weight_decay"]) for group in groups]


def split_parameters(parameters: list[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Split a list, in order, into lists of parameters with at most ``most`` elements together."""
    lists: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not lists or size > most:
            lists.append([])
            size = parameter.numel()
        lists[-1].append(parameter)
    return lists


def restore_settings(optimizer: Any, scheduler: Any, settings: Settings) -> None:
    """Reapply the learning rates and weight decay of the flags, which loading the checkpoint has overwritten."""
    base = [rate for rate, _ in settings]
    rates = [rate * factor(scheduler.last_epoch) for rate, factor in zip(base, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(scheduler.state_dict() | {"base_lrs": base, "_last_lr": rates})
    for group, rate, (initial, decay) in zip(optimizer.param_groups, rates, settings, strict=True):
        group |= {"lr": rate, "initial_lr": initial, "weight_decay": decay}


class MasterWeights:
    """fp32 copies of bf16 weights, which the optimizer updates in their place, for training without DeepSpeed.

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
        for weight, master in by_weight.items():
            if weight in optimizer.state:  # Adagrad creates its states at once
                state = optimizer.state.pop(weight)
                optimizer.state[master] = {name: value.float() for name, value in state.items()}
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
