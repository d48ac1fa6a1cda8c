"""Configuration of Phi-3-vision and Phi-3.5-vision, in the format of the published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, Phi3Config

# The published code hard-codes the vision tower; this is the configuration of openai/clip-vit-large-patch14-336.
CLIP_VIT_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}

HUB_REPOSITORIES = {
    "phi-3-vision": "microsoft/Phi-3-vision-128k-instruct",
    "phi-3.5-vision": "microsoft/Phi-3.5-vision-instruct",
}


class Phi3VConfig(Phi3Config):
    """Configuration of a Phi-3 decoder with a CLIP vision tower; reads and writes the published ``config.json``.

    The decoder's fields are those of :class:`transformers.Phi3Config`.

    Parameters
    ----------
    vision_config : dict or CLIPVisionConfig, optional
        Configuration of the vision tower. Published checkpoints do not have this key and use ViT-L/14 at 336 px.
    embd_layer, img_processor : dict, optional
        Kept for compatibility with other readers of the published format. Only the published layout is supported
        (``hd_transform_order`` ``sub_glb`` with learnable separators).

    Raises
    ------
    ValueError
        If ``embd_layer`` has another layout, or the patches of a crop cannot be merged 2×2.
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    vision_config: dict | CLIPVisionConfig | None = None
    embd_layer: dict | None = None
    img_processor: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (scaling := kwargs.get("rope_scaling")) is not None:
            kwargs["rope_scaling"] = _to_longrope(scaling)
        # The published files set flash_attention_2, but the attention implementation is selected when the model is loaded.
        kwargs.pop("_attn_implementation", None)
        self._vision_config_is_published = self.vision_config is None
        if not isinstance(self.vision_config, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**(self.vision_config or CLIP_VIT_LARGE_336))
        self.embd_layer = self.embd_layer or {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        }
        self.img_processor = self.img_processor or {
            "image_dim_out": self.vision_config.hidden_size,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        }
        layout = (self.embd_layer.get("hd_transform_order"), self.embd_layer.get("with_learnable_separator"))
        if layout != ("sub_glb", True):
            raise ValueError(
                f"config.json has embd_layer {self.embd_layer}, but only the published layout is supported: "
                "hd_transform_order 'sub_glb' with with_learnable_separator true"
            )
        if self.patches_per_side % 2:
            raise ValueError(
                f"vision_config in config.json has image_size {self.vision_config.image_size} and patch_size "
                f"{self.vision_config.patch_size}: the number of patches per side must be even, since they are merged 2×2"
            )
        super().__post_init__(**kwargs)
        assert self.rope_parameters is not None  # filled in above
        if self.rope_parameters["rope_type"] == "longrope":
            # transformers would compute the same factor, but with a warning each time.
            self.rope_parameters["factor"] = self.max_position_embeddings / self.original_max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration under the published keys, which vLLM and the model code on the Hub can read."""
        output = super().to_dict()
        rope = output.pop("rope_parameters", None)
        if rope:
            output["rope_theta"] = rope["rope_theta"]
            if rope["rope_type"] == "longrope":
                output["rope_scaling"] = {
                    "type": "su",
                    "short_factor": rope["short_factor"],
                    "long_factor": rope["long_factor"],
                }
        if self._vision_config_is_published:
            output.pop("vision_config", None)
        else:
            output["vision_config"] = {key: getattr(self.vision_config, key) for key in CLIP_VIT_LARGE_336}
        output.pop("_vision_config_is_published", None)
        if (dtype := output.pop("dtype", None)) is not None:
            output["torch_dtype"] = dtype
        output["architectures"] = ["Phi3VForCausalLM"]
        repository = self.hub_repository
        output["auto_map"] = {
            "AutoConfig": f"{repository}--configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": f"{repository}--modeling_phi3_v.Phi3VForCausalLM",
        }
        return output

    to_diff_dict = to_dict

    @property
    def hub_repository(self) -> str:
        """Hub repository with the published code of this checkpoint."""
        auto_map = getattr(self, "auto_map", None) or {}
        owner = auto_map.get("AutoConfig", "").partition("--")
        if owner[1]:
            return owner[0]
        return hub_repository(self._name_or_path)

    @property
    def tokens_per_crop_side(self) -> int:
        """Image tokens per side of a crop after merging 2×2 patches (12 in published checkpoints)."""
        return self.patches_per_side // 2

    @property
    def patches_per_side(self) -> int:
        """Patches per side of a crop (24 in published checkpoints)."""
        image_size, patch_size = self.tower.image_size, self.tower.patch_size
        if not isinstance(image_size, int) or not isinstance(patch_size, int):
            raise ValueError(f"image_size {image_size} and patch_size {patch_size} in vision_config must be integers")
        return image_size // patch_size

    @property
    def tower(self) -> CLIPVisionConfig:
        """Configuration of the vision tower, ``vision_config`` once it is converted."""
        assert isinstance(self.vision_config, CLIPVisionConfig)
        return self.vision_config


def hub_repository(name_or_path: str) -> str:
    """Return the published Hub repository of a model name or directory (Phi-3.5-vision by default)."""
    names, config = [str(name_or_path)], Path(name_or_path) / "config.json"
    if config.is_file():
        # A local directory can have any name; the published config.json contains the name of the model.
        names.insert(0, json.loads(config.read_text(encoding="utf-8")).get("_name_or_path", ""))
    for name in names:
        for model, repository in HUB_REPOSITORIES.items():
            if model in name.lower():
                return repository
    return HUB_REPOSITORIES["phi-3.5-vision"]


def _to_longrope(scaling: dict[str, Any]) -> dict[str, Any]:
    # The published type `su` was later renamed to `longrope` in transformers.
    scaling = dict(scaling)
    rope_type = scaling.pop("type", None) or scaling.get("rope_type")
    scaling["rope_type"] = "longrope" if rope_type in ("su", "longrope") else rope_type
    return scaling
