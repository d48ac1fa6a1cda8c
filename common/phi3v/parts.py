"""Parts of the model by parameter name, LoRA target modules, and modules that are not quantized."""

from __future__ import annotations

from collections.abc import Iterable

from .configuration import Phi3VConfig

PARTS = ("decoder", "vision", "projector")

VISION = "model.vision_embed_tokens"
DECODER_LORA_MODULES = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))|lm_head"
TOWER = r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"
TOWER_LINEARS = r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
PROJECTOR_LORA_MODULES = r"model\.vision_embed_tokens\.img_projection\.(0|2)"


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ``"decoder"``, ``"vision"`` or ``"projector"``."""
    if "vision_embed_tokens." not in name:
        return "decoder"
    return "vision" if ".img_processor." in name else "projector"


def lora_targets(config: Phi3VConfig, vision: bool) -> str:
    """Return a regular expression for the names of the LoRA target modules.

    Parameters
    ----------
    config : Phi3VConfig
    vision : bool
        Whether to include the vision tower and the projector.
    """
    if not vision:
        return DECODER_LORA_MODULES
    # The last layer of the tower never runs, so DDP would wait for the gradient of an adapter there forever.
    layers = "|".join(map(str, range(config.tower.num_hidden_layers - 1)))
    return rf"{DECODER_LORA_MODULES}|{TOWER}\.({layers})\.{TOWER_LINEARS}|{PROJECTOR_LORA_MODULES}"


def fully_trained_modules(config: Phi3VConfig, parts: tuple[str, ...]) -> list[str]:
    """Return the names of the modules that are trained fully next to LoRA adapters, for PEFT's ``modules_to_save``.

    Parameters
    ----------
    config : Phi3VConfig
    parts : tuple of str
        ``"vision"`` and ``"projector"``, or one of them. The projector's separators are not in a module and stay frozen.
    """
    tower = "img_processor.vision_model"
    # The last layer of the tower never runs.
    layers = [f"{tower}.encoder.layers.{number}" for number in range(config.tower.num_hidden_layers - 1)]
    modules = {
        "vision": [f"{tower}.embeddings", f"{tower}.pre_layrnorm", *layers],
        "projector": ["img_projection.0", "img_projection.2"],
    }
    return [name for part in parts for name in modules[part]]


def parts_of_adapter(target_modules: object, modules_to_save: Iterable[str] | None) -> tuple[tuple[str, ...], bool]:
    """Read from the configuration of an adapter what :func:`fully_trained_modules` and :func:`lora_targets` wrote to it.

    Returns
    -------
    tuple of (tuple of str, bool)
        The parts that are trained fully, in alphabetical order, and whether more than the decoder is trained.
    """
    full = "".join(modules_to_save or ())
    parts = {"projector": "img_projection" in full, "vision": "img_processor" in full}
    trained = tuple(part for part, trains in parts.items() if trains)
    return trained, bool(full) or "vision_embed_tokens" in str(target_modules)


def unquantized_modules(config: Phi3VConfig, vision: bool) -> list[str]:
    """Return the names of the modules that are not quantized.

    Parameters
    ----------
    config : Phi3VConfig
    vision : bool
        Whether the vision tower is quantized.
    """
    # transformers matches names by prefix, so these are full names. The last layer of the tower never runs.
    last = config.tower.num_hidden_layers - 1
    skip = ["lm_head", f"{VISION}.img_projection", f"{VISION}.img_processor.vision_model.encoder.layers.{last}"]
    return skip if vision else [*skip, VISION]
