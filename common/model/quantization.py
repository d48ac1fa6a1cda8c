"""Formats of quantized models, which tools.quantize writes and which are loaded for inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from common.phi3v import Phi3VConfig, Phi3VForCausalLM
from common.phi3v.parts import unquantized_modules

# What identifies a scheme in config.json.
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
# Tensors that a quantized layer has in addition to its weight.
SCALES = {
    "nf4": [
        f"weight.{part}"
        for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    ],
    "int8": ["SCB"],
    "fp8": ["weight_scale_inv"],
}


def quantization_scheme(config: Phi3VConfig) -> str | None:
    """Return the scheme of a model's configuration as read from its file; None if it is not quantized, or in another way."""
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict):
        return None
    return next((name for name, fields in SCHEMES.items() if all(saved.get(key) == fields[key] for key in fields)), None)


def quantization_settings(scheme: str, config: Phi3VConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``quantization_config`` with which transformers quantizes or loads a model, computing in ``dtype``."""
    skip = unquantized_modules(config, vision=False)
    if scheme == "fp8":
        return SCHEMES[scheme] | {"modules_to_not_convert": skip}
    return SCHEMES[scheme] | {"bnb_4bit_compute_dtype": dtype, "llm_int8_skip_modules": skip}


def quantized_layers(model: Phi3VForCausalLM) -> list[str]:
    """Return the names of the layers that are quantized: the linear layers of the decoder."""
    return [name for name, module in model.model.layers.named_modules(prefix="model.layers") if isinstance(module, nn.Linear)]
