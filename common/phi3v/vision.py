"""CLIP vision tower, and the projection of its features to image tokens."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings

from .configuration import Phi3VConfig
from .image_processing import CROP_SIZE, normalize_with_global_view, num_image_tokens, num_views


class CLIPTower(nn.Module):
    """CLIP vision tower that returns the features of the second-to-last layer, with the published parameter names."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)  # type: ignore[arg-type]  # annotated for CLIPConfig, takes either
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def unused_modules(self) -> list[nn.Module]:
        """Modules that are part of checkpoints but never run: the last layer and the final layer norm."""
        return [self.encoder.layers[-1], self.post_layernorm]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute features of crops: (crops, 3, 336, 336) to (crops, 576, hidden size), without the class token."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers[:-1]:
            hidden_states = layer(hidden_states, None)
        return hidden_states[:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """Converts crops to image tokens: vision tower, 2×2 merge, separators, projection."""

    # Limits the memory of the tower's activations. Each chunk launches all kernels anew, so five pages fit into one.
    crops_per_chunk = 96

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.side = config.tokens_per_crop_side
        merged_size = 4 * config.tower.hidden_size
        self.img_processor = nn.Module()
        self.img_processor.vision_model = CLIPTower(config.tower)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged_size))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged_size))
        self.img_projection = nn.Sequential(
            nn.Linear(merged_size, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    @property
    def tower(self) -> CLIPTower:
        """The CLIP tower, ``img_processor.vision_model``."""
        tower = self.img_processor.vision_model
        assert isinstance(tower, CLIPTower)
        return tower

    def views(self, pixel_values: torch.Tensor, image_sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Views of all images without blank crops, (views, 3, 336, 336): for each image the global view, then its crops.

        Parameters
        ----------
        pixel_values : torch.Tensor
            Floating point, (images, num_crops + 1, 3, 336, 336), normalized by the processor, including blank crops; or
            uint8, (all crops of all images, 3, 336, 336), not yet normalized.
        image_sizes : list of (int, int)
            Height and width of each image.
        """
        if pixel_values.dtype == torch.uint8:
            return normalize_with_global_view(pixel_values, image_sizes)
        views = [image_views[: num_views(*size)] for image_views, size in zip(pixel_values, image_sizes, strict=True)]
        return torch.cat(views)

    def forward(self, pixel_values: torch.Tensor, image_sizes: list[tuple[int, int]]) -> torch.Tensor:
        """Compute the tokens of all images, concatenated, (image tokens, hidden size of the decoder)."""
        views = self.views(pixel_values, image_sizes).to(self.glb_GN.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in self.tower.parameters())):
            chunks = views.chunk(-(-len(views) // self.crops_per_chunk))
            features = torch.cat([self.tower(chunk) for chunk in chunks])
        # Merge 2×2 patches into one token of four times the width.
        side, width = self.side, features.shape[-1]
        features = features.reshape(-1, side, 2, side, 2, width).transpose(2, 3)
        features = features.reshape(-1, side, side, 4 * width)
        row_end, view_end = self.sub_GN.to(features.dtype)[0], self.glb_GN.to(features.dtype)[0]

        tokens = []
        by_image = features.split([num_views(*size) for size in image_sizes])
        for (height, width), image_views in zip(image_sizes, by_image, strict=True):
            rows, columns = height // CROP_SIZE, width // CROP_SIZE
            # The gradient of split is a concatenation; that of indexing would be written into a tensor of zeros.
            whole, crops = image_views.split((1, rows * columns)) if len(image_views) > 1 else (image_views, image_views)
            crops = crops.reshape(rows, columns, side, side, -1).transpose(1, 2)
            crops = crops.reshape(rows * side, columns * side, -1)
            tokens += [
                torch.cat([crops, row_end.expand(rows * side, 1, -1)], dim=1).flatten(0, 1),
                view_end,
                torch.cat([whole.squeeze(0), row_end.expand(side, 1, -1)], dim=1).flatten(0, 1),
            ]
        return self.img_projection(torch.cat(tokens))

    def num_tokens(self, image_sizes: list[tuple[int, int]]) -> list[int]:
        """Number of tokens of each image."""
        return [num_image_tokens(height, width, self.side) for height, width in image_sizes]
