"""Configuration of Phi-3-vision and Phi-3.5-vision in the layout of the published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, Phi3Config

# The published code hard-codes its tower; these are the sizes of openai/clip-vit-large-patch14-336.
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
    """A Phi-3 decoder with a CLIP tower; reads and writes the published ``config.json``.

    The decoder's fields are those of :class:`transformers.Phi3Config`.

    Parameters
    ----------
    vision_config : dict or CLIPVisionConfig, optional
        Size of the tower. Published checkpoints have no such key and mean ViT-L/14 at 336 px.
    embd_layer, img_processor : dict, optional
        Kept as published for other readers. Only the one layout that was ever published is supported
        (``hd_transform_order`` ``sub_glb`` with learnable separators).

    Raises
    ------
    ValueError
        If ``embd_layer`` asks for another layout, or the patches of a crop can't be merged two by two.
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    vision_config: dict | CLIPVisionConfig | None = None
    embd_layer: dict | None = None
    img_processor: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if (scaling := kwargs.get("rope_scaling")) is not None:
            kwargs["rope_scaling"] = _to_longrope(scaling)
        # Published as flash_attention_2; which kernel runs is the loader's decision, not the file's.
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
                f"config.json asks for embd_layer {self.embd_layer}; only the published layout is supported: "
                "hd_transform_order 'sub_glb' with with_learnable_separator true"
            )
        if (self.vision_config.image_size // self.vision_config.patch_size) % 2:
            raise ValueError(
                f"vision_config of config.json has {self.vision_config.image_size} px pictures in patches of "
                f"{self.vision_config.patch_size} px: an odd number of patches a side can't be merged two by two"
            )
        super().__post_init__(**kwargs)
        if self.rope_parameters["rope_type"] == "longrope":
            # transformers derives the same factor by itself, with a warning each time.
            self.rope_parameters["factor"] = self.max_position_embeddings / self.original_max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration under the published keys, so that vLLM and the hub's own code read it too."""
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
        """Hub repository whose published code belongs to this checkpoint."""
        auto_map = getattr(self, "auto_map", None) or {}
        owner = auto_map.get("AutoConfig", "").partition("--")
        if owner[1]:
            return owner[0]
        return hub_repository(self._name_or_path)

    @property
    def tokens_per_crop_side(self) -> int:
        """Image tokens along one side of a crop, after merging patches two by two (12 as published)."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2


def hub_repository(name_or_path: str) -> str:
    """Return the published hub repository that a model's name or directory points at (Phi-3.5-vision by default)."""
    names, config = [str(name_or_path)], Path(name_or_path) / "config.json"
    if config.is_file():
        # A download may lie in a directory of any name; the published file says which model it is.
        names.insert(0, json.loads(config.read_text(encoding="utf-8")).get("_name_or_path", ""))
    for name in names:
        for model, repository in HUB_REPOSITORIES.items():
            if model in name.lower():
                return repository
    return HUB_REPOSITORIES["phi-3.5-vision"]


def _to_longrope(scaling: dict[str, Any]) -> dict[str, Any]:
    # transformers knows the published type `su` only under its later name.
    scaling = dict(scaling)
    rope_type = scaling.pop("type", None) or scaling.get("rope_type")
    scaling["rope_type"] = "longrope" if rope_type in ("su", "longrope") else rope_type
    return scaling
