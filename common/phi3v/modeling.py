"""Phi-3-vision and Phi-3.5-vision, built from the Phi-3 decoder and the CLIP vision tower of transformers.

Parameter names in memory, in checkpoints and in adapters are the published ones. There are deliberate differences from the
published code: image features are assigned to placeholders by image number, LongRoPE uses the length of each sample, blank
crops and the unused last layer of the tower are skipped, and training computes the head only for supervised tokens.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Phi3ForCausalLM, Phi3Model
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.utils.output_capturing import capture_outputs

from . import attention as attention
from .cache import new_cache
from .configuration import Phi3VConfig
from .fused import is_recomputing, recompute_elementwise
from .image_processing import CROP_SIZE
from .layers import use_lean_layers
from .rotary import Phi3VRotaryEmbedding
from .vision import Phi3VImageEmbedding


class Phi3VModel(Phi3Model):
    """Decoder with image inputs, without the language modeling head."""

    config_class = Phi3VConfig
    config: Phi3VConfig
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.same_modules_always = False
        self.rotary_emb: Phi3VRotaryEmbedding = Phi3VRotaryEmbedding(config)  # type: ignore[assignment]  # by sample length
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        use_lean_layers(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_phi3v_weights(super()._init_weights, module)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens, and insert image features at their placeholders.

        Parameters
        ----------
        input_ids : torch.Tensor
            int64 (batch, tokens); −k is a placeholder for the next token of image k of its row. An image may be repeated.
        pixel_values, image_sizes : torch.Tensor, optional
            Images of row 0, then of row 1, and so on; see :meth:`Phi3VImageEmbedding.views`.

        Returns
        -------
        torch.Tensor
            (batch, tokens, hidden size).

        Raises
        ------
        ValueError
            If placeholders and images do not match.
        """
        embeddings = self.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is None:
            if (input_ids < 0).any():
                raise ValueError("input_ids contains image placeholders (negative ids), but pixel_values is missing")
            return self._touch_vision(embeddings) if self.training or self.same_modules_always else embeddings
        assert image_sizes is not None
        sizes = [(height, width) for height, width in image_sizes.tolist()]
        features = self.vision_embed_tokens(pixel_values, sizes)
        placeholders, index = _feature_index(input_ids, self.vision_embed_tokens.num_tokens(sizes))
        return embeddings.index_put(placeholders, features[index].to(embeddings.dtype))

    def _touch_vision(self, embeddings: torch.Tensor) -> torch.Tensor:
        # Ranks with images wait for the vision gradients of all ranks, so ranks without images must produce zero gradients.
        vision = self.vision_embed_tokens
        if not self.same_modules_always and not any(parameter.requires_grad for parameter in vision.parameters()):
            return embeddings
        blank = torch.zeros(1, 3, CROP_SIZE, CROP_SIZE, dtype=torch.uint8, device=embeddings.device)
        features = vision(blank, [(CROP_SIZE, CROP_SIZE)])
        return embeddings + (0.0 * features).sum().to(embeddings.dtype)  # zeroed first: the sum could overflow in fp16

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Parameters
        ----------
        input_ids, pixel_values, image_sizes
            See :meth:`embed`. Alternatively ``inputs_embeds``.
        attention_mask : torch.Tensor, optional
            int64 (batch, tokens), 0 at padding tokens, on either side.
        position_ids : torch.Tensor, optional
            int64 (batch, tokens); consecutive by default.
        cu_seq_lens_q : torch.Tensor, optional
            Cumulative sample lengths, int32 (samples + 1,), if the batch is one row of packed samples.
        max_length_q : int, optional
            Length of the longest packed sample.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values, image_sizes)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = new_cache()

        if cu_seq_lens_q is not None:
            sample_lengths = cu_seq_lens_q.diff().long()
            lengths = sample_lengths.repeat_interleave(sample_lengths, output_size=inputs_embeds.shape[1])[None]
            if position_ids is None:
                starts = cu_seq_lens_q[:-1].long().repeat_interleave(sample_lengths, output_size=lengths.shape[1])
                position_ids = torch.arange(lengths.shape[1], device=starts.device)[None] - starts
            kwargs |= {
                "cu_seq_lens_q": cu_seq_lens_q,
                "cu_seq_lens_k": cu_seq_lens_q,
                "max_length_q": max_length_q,
                "max_length_k": max_length_q,
            }
            mask = None
        else:
            if position_ids is None:
                past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
            if attention_mask is not None and attention_mask.ndim == 2:
                lengths = attention_mask.sum(-1, keepdim=True)
            else:
                lengths = position_ids.max(-1, keepdim=True).values + 1
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )

        cos, sin = self.rotary_emb(position_ids, lengths)
        position_embeddings = (cos.to(inputs_embeds.dtype), sin.to(inputs_embeds.dtype))
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class Phi3VForCausalLM(Phi3ForCausalLM):
    """Phi-3-vision / Phi-3.5-vision for training and generation."""

    config_class = Phi3VConfig
    config: Phi3VConfig
    model: Phi3VModel
    _no_split_modules = Phi3VModel._no_split_modules
    accepts_loss_kwargs = True

    def __init__(self, config: Phi3VConfig) -> None:
        super(Phi3ForCausalLM, self).__init__(config)
        self.model = Phi3VModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy = nn.CrossEntropyLoss(reduction="sum")
        self.recompute_elementwise = False
        self.post_init()
        self.freeze_unused()

    def _init_weights(self, module: nn.Module) -> None:
        _init_phi3v_weights(super()._init_weights, module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Phi3VForCausalLM:
        """Load a checkpoint in the published layout; see :meth:`transformers.PreTrainedModel.from_pretrained`."""
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading replaces the parameters with new ones, which require gradients.
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_unused()
        return loaded

    def freeze_unused(self) -> None:
        """Freeze the parameters that are never used, so that optimizers and gradient reduction do not include them."""
        for module in self.model.vision_embed_tokens.tower.unused_modules():
            module.requires_grad_(False)

    @property
    def running_layers(self) -> list[nn.Module]:
        """Layers of the decoder and of the vision tower, without those that never run."""
        return [*self.model.layers, *self.model.vision_embed_tokens.tower.encoder.layers[:-1]]

    def run_same_modules_always(self) -> None:
        """Run the same modules in every forward pass, whatever the batch. ZeRO-3 requires it to gather weights on all ranks."""
        self.model.same_modules_always = True
        self.model.vision_embed_tokens.crops_per_chunk = sys.maxsize

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; see :meth:`Phi3VModel.forward` for the inputs.

        Parameters
        ----------
        labels : torch.Tensor, optional
            int64 (batch, tokens), −100 for tokens that are not supervised. Labels are shifted inside the model.
        num_items_in_batch : int or torch.Tensor, optional
            Number of supervised tokens that the summed loss is divided by, over all micro-batches and processes of a step.
            By default, the number in this batch.
        skip_logits : bool, optional
            Return no ``logits`` and compute the head only for supervised tokens. Default: True in training with labels.
        """
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        recompute = self.recompute_elementwise and self.training and not is_recomputing()
        with recompute_elementwise() if recompute else nullcontext():
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                image_sizes=image_sizes,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = outputs.last_hidden_state
        loss = None
        if labels is not None:
            loss = self._answer_loss(hidden_states, labels[:, 1:], num_items_in_batch)
        logits = None if skip_logits else self.lm_head(_slice_logits_to_keep(hidden_states, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _answer_loss(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        supervised = (targets != -100).nonzero(as_tuple=True)  # synchronizes with the GPU once, not at every use of a mask
        targets = targets[supervised]
        logits = self.lm_head(hidden_states[supervised]).float()
        # A batch may have no supervised tokens, which some loss kernels do not support.
        loss = self.cross_entropy(logits, targets) if len(targets) else logits.sum()
        if num_items is None:
            num_items = max(1, len(targets))
        elif torch.is_tensor(num_items):
            num_items = num_items.to(loss.device)
        return loss / num_items

    def prepare_inputs_for_generation(  # type: ignore[override]  # has the images as parameters
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one generation step. When a row exceeds the range of the short LongRoPE factors, the cache is recomputed."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        limit = self.model.rotary_emb.limit
        if past_length and input_ids.shape[1] > limit:
            lengths = input_ids.shape[1] if attention_mask is None else attention_mask.sum(-1)
            new_tokens = input_ids.shape[1] - past_length
            crossed = torch.as_tensor((lengths > limit) & (lengths - new_tokens <= limit))
            if crossed.any():
                past_key_values = None
                past_length = 0
                kwargs["next_sequence_length"] = None
        inputs = super(Phi3ForCausalLM, self).prepare_inputs_for_generation(  # type: ignore[misc]  # typed for a protocol
            input_ids, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        if past_length == 0:
            inputs |= {"pixel_values": pixel_values, "image_sizes": image_sizes}
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # For beam search and several answers per prompt: repeat all images of a row together, not each image separately.
        vision = {}
        if expand_size > 1 and input_ids is not None and model_kwargs.get("pixel_values") is not None:
            counts = input_ids.min(-1).values.neg().clamp(min=0).tolist()
            for key in ("pixel_values", "image_sizes"):
                rows = model_kwargs.pop(key).split(counts)
                vision[key] = torch.cat([row for row in rows for _ in range(expand_size)])
        expanded, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]  # typed for a protocol
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return expanded, model_kwargs | vision


def _slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    # Current transformers has this function, versions before 5.22 do not.
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:  # positions, the same for every row
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:  # the result has one row
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def _feature_index(input_ids: torch.Tensor, tokens_per_image: list[int]) -> tuple[Any, torch.Tensor]:
    """Return the positions of the placeholders, (rows, columns), and the index of the feature for each.

    The j-th placeholder of an image takes its j-th feature; if the image is repeated, its features are repeated too.
    """
    images_per_row = input_ids.min(-1).values.neg().clamp(min=0)
    rows, columns = torch.nonzero(input_ids < 0, as_tuple=True)
    first_image = images_per_row.cumsum(0) - images_per_row
    image = first_image[rows] - input_ids[rows, columns] - 1
    lengths = torch.tensor(tokens_per_image, device=input_ids.device)
    uses = torch.bincount(image, minlength=len(lengths))
    if len(uses) != len(lengths) or ((uses == 0) | (uses % lengths[: len(uses)] != 0)).any():
        raise ValueError(
            f"placeholders do not match the images: the images of the batch have {tokens_per_image} tokens, "
            f"but input_ids contains {uses.tolist()} placeholders for them"
        )
    order = torch.argsort(image, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (uses.cumsum(0) - uses)[image[order]]
    first_feature = lengths.cumsum(0) - lengths
    return (rows, columns), first_feature[image] + rank % lengths[image]


@torch.no_grad()
def _init_phi3v_weights(init_base: Any, module: nn.Module) -> None:
    init_base(module)
    if isinstance(module, Phi3VRotaryEmbedding):
        init.copy_(module.inv_freq, module.inverse_frequencies()[0])
    elif isinstance(module, CLIPVisionEmbeddings):
        init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
        init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
    elif isinstance(module, Phi3VImageEmbedding):
        init.normal_(module.glb_GN, std=0.02)
        init.normal_(module.sub_GN, std=0.02)
