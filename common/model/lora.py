"""LoRA adapters that are trained: a new one, or one that is trained further; and their layers as one operation each.

The operation accumulates the adapter's output into the base layer's output.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, bnb, layer
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn
from torch.autograd.function import once_differentiable

from common.phi3v import Phi3VForCausalLM
from common.phi3v.parts import fully_trained_modules, lora_targets
from common.runtime.process import InputError

from .adapters import attach_adapter, check_targets

if TYPE_CHECKING:
    _Base = LoraLayer
else:
    _Base = object  # another base would change the memory layout, and Python would not assign ``__class__``

MATRICES = ("lora_A", "lora_B")


def add_lora(model: Phi3VForCausalLM, args: argparse.Namespace, revision: str | None) -> PeftModel:
    """Add LoRA adapters to the decoder and, unless it is frozen or trained fully, to the vision tower and the projector.

    Parameters
    ----------
    model : Phi3VForCausalLM
    args : argparse.Namespace
        The script's flags.
    revision : str, optional
        Commit of a Hub model, for the adapter's configuration.

    Raises
    ------
    InputError
        If PEFT rejects the initialization.
    """
    try:
        config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=round(args.lora_rank * args.lora_alpha_ratio),
            lora_dropout=args.lora_dropout,
            target_modules=lora_targets(model.config, vision=not (args.freeze_vision_model or args.train_fully)),
            modules_to_save=fully_trained_modules(model.config, args.train_fully) or None,
            # PEFT takes names as strings, except for True and False.
            init_lora_weights={"True": True, "False": False}.get(args.init_lora_weights, args.init_lora_weights),
            use_dora=args.use_dora,
            use_rslora=args.use_rslora,
            task_type="CAUSAL_LM",
            revision=revision,
        )
        peft_model = get_peft_model(model, config)
    except (ValueError, ImportError) as error:
        raise InputError(f"rejected by PEFT ({error})", f"--init_lora_weights {args.init_lora_weights}") from error
    return _prepare(peft_model, args.fused_layers)


def continue_lora(model: Phi3VForCausalLM, adapter: Path, vision: bool, train_fully: tuple[str, ...], fuse: bool) -> PeftModel:
    """Load an adapter on its base model, to train it further, with ``fuse`` as fused layers.

    Its modules are checked, see :func:`common.model.adapters.check_targets` for ``vision`` and ``train_fully``.

    Raises
    ------
    InputError
        If the adapter does not fit the base model, or has other target modules than these recipes.
    """
    check_targets(adapter, model.config, vision, train_fully)
    peft_model = _prepare(attach_adapter(model, adapter, trainable=True), fuse)
    # The name may be relative to the directory where the adapter was trained.
    peft_model.peft_config["default"].base_model_name_or_path = model.name_or_path
    # Again, now that fully trained modules are fp32.
    set_peft_model_state_dict(peft_model, load_peft_weights(str(adapter), device=str(model.device)))
    return peft_model


def _prepare(model: PeftModel, fuse: bool) -> PeftModel:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # Adapters are fp32: PEFT would cast their inputs to fp32, and autocast would cast them back.
            module.cast_input_dtype_enabled = False
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    if fuse:
        fuse_lora(model)
    return model


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen.

    ``casts`` are A, s A, B and s B in the dtype of the computation. Every product uses the scaled one of A or B, so that no
    output has to be scaled.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Module, casts: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        _, scaled_down, cast_up, _ = casts
        dtype = cast_up.dtype
        rows = states.reshape(-1, states.shape[-1]).to(dtype)
        output = base(rows)
        low = torch.mm(rows, scaled_down.t())
        output.addmm_(low, cast_up.t())
        ctx.save_for_backward(states, low)
        ctx.base, ctx.casts, ctx.trained_dtype = base, casts, down.dtype
        return output.view(*states.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        states, low = ctx.saved_tensors
        cast_down, _, _, scaled_up = ctx.casts
        dtype = cast_down.dtype
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        low_gradient = torch.mm(gradient, scaled_up)
        up_gradient = _product(gradient.t(), low, ctx.trained_dtype)
        down_gradient = _product(low_gradient.t(), states.reshape(-1, states.shape[-1]).to(dtype), ctx.trained_dtype)
        states_gradient = None
        if ctx.needs_input_grad[0]:
            states_gradient = torch.mm(gradient, _weight(ctx.base, dtype))
            states_gradient = states_gradient.addmm_(low_gradient, cast_down).view(states.shape).to(states.dtype)
        return states_gradient, down_gradient, up_gradient, None, None


def _weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    weight: Any = base.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit  # only QLoRA needs it, and it is slow to import

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.to(dtype)


def _product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if left.is_cuda and dtype == torch.float32 != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class _Fused(_Base):
    """Mixin for PEFT's LoRA layers; parameters and saved adapters stay the same."""

    casts: tuple[torch.Tensor, ...] | None = None

    def adapter(self) -> str | None:
        """Name of the only active adapter if :class:`_LoraLinear` supports it, else None."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = list(self.base_layer.parameters())
        runs = (
            len(names) == 1
            and not (self.disable_adapters or self.merged)
            and names[0] not in self.lora_variant  # DoRA, say
            and isinstance(self.lora_dropout[names[0]], nn.Identity)
            and self.lora_B[names[0]].bias is None
            and not any(
                parameter.requires_grad or hasattr(parameter, "ds_id") for parameter in base
            )  # ZeRO-3 gathers by module
        )
        return names[0] if runs else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.casts is None or not torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the class that this one is mixed into
        name = self.active_adapters[0]
        return _LoraLinear.apply(x, self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer, self.casts)


class FusedLoraLinear(_Fused, layer.Linear):
    """PEFT's LoRA layer on an ``nn.Linear``."""


class FusedLoraLinear4bit(_Fused, bnb.Linear4bit):
    """PEFT's LoRA layer on a 4-bit base."""


FUSED: dict[type[nn.Module], type[nn.Module]] = {layer.Linear: FusedLoraLinear, bnb.Linear4bit: FusedLoraLinear4bit}


def fuse_lora(model: PeftModel) -> None:
    """Run each LoRA layer of a model as one operation in training. Layers with dropout or DoRA, and ZeRO-3, use PEFT's own."""
    for module in model.modules():
        module.__class__ = FUSED.get(type(module), type(module))
    layers: list[_Fused] = [module for module in model.modules() if isinstance(module, _Fused)]
    model.get_base_model().register_forward_pre_hook(lambda *_: _cast_adapters(layers))


@torch.no_grad()
def _cast_adapters(layers: list[_Fused]) -> None:
    """Cast and scale the adapters of all layers, in a few kernels; runs before each forward pass of the model."""
    for module in layers:
        module.casts = None
    names = [module.adapter() for module in layers]
    layers, names = [module for module, name in zip(layers, names, strict=True) if name], [name for name in names if name]
    weights = [getattr(module, part)[name].weight for module, name in zip(layers, names, strict=True) for part in MATRICES]
    if not weights:
        return
    kind = weights[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights[0].dtype
    plain = weights if weights[0].dtype == dtype else [torch.empty_like(weight, dtype=dtype) for weight in weights]
    scaled = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    if plain is not weights:
        torch._foreach_copy_(plain, weights)
    torch._foreach_copy_(scaled, weights)
    torch._foreach_mul_(scaled, [module.scaling[name] for module, name in zip(layers, names, strict=True) for _ in MATRICES])
    for number, module in enumerate(layers):
        places = (2 * number, 2 * number + 1)
        module.casts = tuple(cast.detach() for place in places for cast in (plain[place], scaled[place]))
