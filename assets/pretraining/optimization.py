"""Losses, optimizers, and the training step over all processes."""

import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.phi3v import Phi3VForCausalLM

from ..samples.page import Page
from . import shapes
from .documents import Turn
from .model import WIDTH


def answer_loss(model, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor):
    """Return the weighted loss, the accuracy of the first characters, and the accuracy of all characters."""
    # With padding on the right, causal attention never attends to padding, so no mask is needed.
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    labels, weights = labels[:, 1:], weights[:, 1:]
    supervised = labels >= 0
    logits = model.lm_head(hidden[supervised]).float()
    labels, weights = labels[supervised], weights[supervised]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == labels).float()
    return loss, right[weights > 1].mean().item(), right.mean().item()


class FactProbe(torch.nn.Module):
    """Predicts the facts that determine an answer from the output of the second and third layer, before the answer.

    Relations such as equality are learned late without an incentive for the layers to combine both sides. The probe gives an
    auxiliary loss and is discarded after the stage.
    """

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, shapes.FACT_VALUES * len(shapes.FACTS)) for _ in range(2))
        for head in self.heads:
            torch.nn.init.zeros_(head.weight)  # identical in all processes
            torch.nn.init.zeros_(head.bias)
        self.seen: list[torch.Tensor] = []
        for layer in model.model.layers[1:3]:
            layer.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

    def forward(
        self, samples: list[tuple[list[Page], list[Turn]]], weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss for the last forward pass, and the accuracy at the third layer by kind of fact."""
        none = (shapes.NO_FACT,) * len(shapes.FACTS)
        facts = torch.tensor([turn.facts or none for _, turns in samples for turn in turns])
        rows, columns = torch.nonzero(weights > 1, as_tuple=True)
        stated, loss = facts != shapes.NO_FACT, 0.0
        for head, hidden in zip(self.heads, self.seen, strict=True):
            read = head(F.rms_norm(hidden[rows, columns - 1].float(), (WIDTH,))).view(len(facts), -1, len(shapes.FACTS))
            loss = loss + F.cross_entropy(read, facts, reduction="sum") / max(1, stated.sum())
        self.seen.clear()
        right = torch.where(stated, (read.argmax(1) == facts).float(), torch.nan)
        parts = {"named": right[:, :2], "drawn": right[:, 2:6], "agree": right[:, 6:]}
        return loss, {name: part.nanmean().item() for name, part in parts.items()}


def optimizers_for(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the decoder layers, which learn to copy several times faster with it, and AdamW."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if name.startswith("model.layers.") and p.ndim == 2]
    others = [p for name, p in trained.items() if not (name.startswith("model.layers.") and p.ndim == 2)]
    optimizers = [torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def step_size(step: int, steps: int, peak: float, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Return the learning rate: linear warmup, constant, then linear decay to 1 % of the peak."""
    fall = (1 - step / steps) / (1 - decay_from)
    return peak * min((step + 1) / warmup, 1, max(fall, 0.01))


def take_step(model, optimizers, loss: torch.Tensor, rate: float) -> None:
    """Run an optimizer step with the mean gradient over all processes."""
    model.zero_grad()
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = mean_over_processes(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


class Progress:
    """Prints the means of a stage's metrics."""

    def __init__(self, stage: str, steps: int, every: int = 50) -> None:
        self.stage, self.steps, self.every, self.start, self.seen = stage, steps, every, time.monotonic(), []

    def update(self, step: int, **figures: float) -> None:
        self.seen.append(figures)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            if dist.is_initialized() and dist.get_rank() > 0:
                return
            means = "  ".join(f"{key} {np.nanmean([row[key] for row in self.seen] + [np.nan]):.3f}" for key in figures)
            print(f"{self.stage} {step + 1}/{self.steps}  {time.monotonic() - self.start:.0f} s  {means}", flush=True)
            self.seen = []
