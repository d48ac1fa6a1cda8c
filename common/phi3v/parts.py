"""The model's parts by the names of its parameters, and which modules take LoRA adapters or 4-bit weights."""

from __future__ import annotations

from .configuration import Phi3VConfig

PARTS = ("decoder", "vision", "projector")

VISION = "model.vision_embed_tokens"
DECODER_LORA_MODULES = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))|lm_head"
TOWER = r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"
TOWER_LINEARS = r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
PROJECTOR_LORA_MODULES = r"model\.vision_embed_tokens\.img_projection\.(0|2)"


def part_of(name: str) -> str:
    """The part of the model, ``"decoder"``, ``"vision"`` or ``"projector"``, that a parameter belongs to by its name."""
    if "vision_embed_tokens." not in name:
        return "decoder"
    return "vision" if ".img_processor." in name else "projector"


def lora_targets(config: Phi3VConfig, vision: bool) -> str:
    """Pattern of the names of the modules that take adapters.

    Parameters
    ----------
    config : Phi3VConfig
    vision : bool
        False for the decoder alone.
    """
    if not vision:
        return DECODER_LORA_MODULES
    # The tower's last layer is never run: an adapter there would wait for a gradient for ever.
    layers = "|".join(map(str, range(config.vision_config.num_hidden_layers - 1)))
    return rf"{DECODER_LORA_MODULES}|{TOWER}\.({layers})\.{TOWER_LINEARS}|{PROJECTOR_LORA_MODULES}"


def unquantized_modules(config: Phi3VConfig, vision: bool) -> list[str]:
    """Names of the modules whose weights stay as they are when the others are quantized.

    Parameters
    ----------
    config : Phi3VConfig
    vision : bool
        Whether the tower is quantized too.
    """
    # Names count from their beginning to a dot, so they stand here in full. The tower's last layer is never run.
    last = config.vision_config.num_hidden_layers - 1
    skip = ["lm_head", f"{VISION}.img_projection", f"{VISION}.img_processor.vision_model.encoder.layers.{last}"]
    return skip if vision else [*skip, VISION]
