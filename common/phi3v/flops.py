"""Model FLOPs of a training step, and peak FLOPs of GPUs, for the model FLOPs utilization (MFU).

The count includes the required matrix products of decoder, vision tower, projector and head: attention below the causal
diagonal, crops and tokens without padding, and the head at supervised positions. Recomputation, padding, blank crops and
element-wise operations are not counted. The backward pass costs as much as the forward pass for the gradients of the inputs,
if any earlier parameter is trained, and the same for those of trained weights.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from .image_processing import num_views
from .modeling import Phi3VForCausalLM

# Dense bf16 peak in TFLOP/s (fp16 for GPUs without bf16) by words of the device name, more specific names first. From the
# data sheets of NVIDIA and AMD, without sparsity.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX A6000", 155.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("RTX 8000", 130.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI300X", 1307.0),
)


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of a batch that determine its FLOPs."""

    tokens: int  # without padding
    pairs: int  # query-key pairs of causal attention: n (n + 1) / 2 for a sample of n tokens
    views: int  # crops and global views that the vision tower processes
    image_tokens: int
    supervised: int  # tokens


class TrainingFlops:
    """Counts the model FLOPs of training batches, depending on which parameters of the model are trained.

    Parameters
    ----------
    model : Phi3VForCausalLM
        Unwrapped model; LoRA layers in it are counted.
    """

    def __init__(self, model: Phi3VForCausalLM) -> None:
        self._vision = model.model.vision_embed_tokens
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self._gradient_flows = False  # whether the input of the current layer requires a gradient
        self._vision_forward()
        self._gradient_flows |= model.model.embed_tokens.weight.requires_grad
        self._decoder_forward(model)

    def __call__(self, batch: dict[str, Any]) -> float:
        """FLOPs of the forward and backward pass of a batch from the collator."""
        return sum(self.count(self.sizes(batch)))

    def sizes(self, batch: dict[str, Any]) -> BatchSizes:
        """Compute the sizes of a packed or padded batch from the collator.

        Its tensors may be on any device, but call this before moving them to a GPU: reading their values would synchronize.
        """
        names = ("cu_seq_lens_q", "attention_mask", "image_sizes", "labels")
        batch = {name: batch[name].cpu() for name in names if name in batch}
        packed = "cu_seq_lens_q" in batch
        lengths = batch["cu_seq_lens_q"].diff().long() if packed else batch["attention_mask"].sum(-1)
        images = [tuple(size) for size in batch["image_sizes"].tolist()] if "image_sizes" in batch else []
        return BatchSizes(
            tokens=int(lengths.sum()),
            pairs=int((lengths * (lengths + 1) // 2).sum()),
            views=sum(num_views(*size) for size in images),
            image_tokens=sum(self._vision.num_tokens(images)),
            supervised=int((batch["labels"][:, 1:] != -100).sum()),
        )

    def count(self, sizes: BatchSizes) -> tuple[float, float]:
        """FLOPs of the forward pass and of the backward pass."""
        amounts = vars(sizes)
        forward, backward = (
            sum(cost * amounts[unit] for unit, cost in costs.items()) for costs in (self.forward, self.backward)
        )
        return forward, backward

    def _vision_forward(self) -> None:
        tower, projection = self._vision.tower, self._vision.img_projection
        patches = tower.embeddings.num_patches
        positions = tower.embeddings.num_positions
        convolution = tower.embeddings.patch_embedding
        self._product(convolution.weight.numel() * patches, "views", convolution.weight.requires_grad)
        self._gradient_flows |= any(parameter.requires_grad for parameter in tower.embeddings.parameters())
        layer: Any
        for layer in tower.encoder.layers[:-1]:
            attention, mlp = layer.self_attn, layer.mlp
            self._linear([attention.q_proj, attention.k_proj, attention.v_proj], "views", positions)
            self._attention(attention.embed_dim * positions**2, "views")
            for linear in (attention.out_proj, mlp.fc1, mlp.fc2):
                self._linear([linear], "views", positions)
        self._gradient_flows |= self._vision.glb_GN.requires_grad or self._vision.sub_GN.requires_grad
        for linear in (projection[0], projection[2]):
            self._linear([linear], "image_tokens")

    def _decoder_forward(self, model: Phi3VForCausalLM) -> None:
        layer: Any
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._linear([attention.qkv_proj], "tokens")
            self._attention(model.config.num_attention_heads * attention.head_dim, "pairs")
            for linear in (attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
                self._linear([linear], "tokens")
        self._linear([model.lm_head], "supervised")

    def _linear(self, parallel: list[Any], unit: str, rows: int = 1) -> None:
        """Count linear layers, with PEFT's adapters if any, that share an input; ``rows`` is the number of rows per unit."""
        flows = self._gradient_flows
        for layer in parallel:
            base = getattr(layer, "base_layer", layer)
            self._gradient_flows = flows
            # Not from the shape of the weight: 4-bit weights are flattened, and ZeRO-3 partitions them.
            self._product(rows * base.in_features * base.out_features, unit, base.weight.requires_grad)
            for name, down in getattr(layer, "lora_A", {}).items():
                up = layer.lora_B[name]
                self._product(rows * down.in_features * down.out_features, unit, down.weight.requires_grad)
                self._gradient_flows |= down.weight.requires_grad
                self._product(rows * up.in_features * up.out_features, unit, up.weight.requires_grad)
        trains = any(parameter.requires_grad for layer in parallel for parameter in layer.parameters())
        self._gradient_flows = flows or trains

    def _product(self, multiplications: int, unit: str, weight_trains: bool) -> None:
        self.forward[unit] += 2 * multiplications
        self.backward[unit] += 2 * multiplications * (weight_trains + self._gradient_flows)

    def _attention(self, multiplications: int, unit: str) -> None:
        # Two products: queries with keys, and attention weights with values. All four inputs need gradients.
        self.forward[unit] += 2 * 2 * multiplications
        self.backward[unit] += 2 * 2 * 2 * multiplications * self._gradient_flows


def peak_flops(device: torch.device) -> float | None:
    """Dense peak FLOP/s of a device in bf16 (fp16 for GPUs without bf16); None for a CPU or an unknown GPU."""
    return named_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak_flops(device_name: str) -> float | None:
    """Like :func:`peak_flops`, for a device name as reported by the driver."""
    words = re.split(r"[\s\-_]+", device_name.lower())
    for name, tflops in PEAK_TFLOPS:
        if all(word in words for word in name.lower().split()):
            return tflops * 1e12
    return None
