"""Collation of encoded samples into padded or packed batches, with the crops of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import grid_to_crops, to_crop_grid
from common.phi3v.processing import pad_rows
from common.runtime.process import InputError

from .pictures import decode_picture


def load_crops(
    images: list[Any], num_crops: int, places: Sequence[str | None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode images and split them into crops. The model normalizes them and adds global views on its own device.

    Parameters
    ----------
    images : list
        Images as described in :mod:`common.data.pictures`.
    num_crops : int
        Maximum number of crops per image.
    places : sequence of str, optional
        Location of the row of each image, for messages.

    Returns
    -------
    tuple of torch.Tensor
        uint8 (all crops of all images, 3, 336, 336), and int64 (images, 2), height and width after resizing and padding.

    Raises
    ------
    InputError
        If an image cannot be decoded; the message names the image and its row.
    """
    grids = []
    for image, place in zip(images, places or [None] * len(images), strict=True):
        try:
            grids.append(to_crop_grid(decode_picture(image), num_crops))
        except InputError as error:
            raise error.at(place) from None
    return torch.cat([grid_to_crops(grid) for grid in grids]), torch.tensor([grid.shape[:2] for grid in grids])


class Collator:
    """Collate encoded conversations into a batch.

    Parameters
    ----------
    processor : Phi3VProcessor
        Provides ``num_crops`` and the padding token.
    packing : bool
        Concatenate the samples in one row, with their boundaries, instead of padding them to the longest sample.
    padding_side : {"right", "left"}
        ``"left"`` for generation.

    Notes
    -----
    Calling it with a list of samples (see :func:`common.data.conversations.encode_conversation`) returns a dict with

    - padded: ``input_ids``, ``attention_mask``, ``labels``, int64 (batch, longest sample);
    - packed: ``input_ids``, ``labels``, int64 (1, all tokens), ``cu_seq_lens_q`` int32 (batch + 1,), ``max_length_q`` int;
      images are numbered over the whole row;
    - if there are images: ``pixel_values`` uint8 (all crops, 3, 336, 336) and ``image_sizes`` int64 (images, 2).

    If an image cannot be decoded, the message names the ``place`` of its sample.
    """

    def __init__(self, processor: Phi3VProcessor, packing: bool = False, padding_side: str = "right") -> None:
        self.num_crops = processor.image_processor.num_crops
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.packing = packing
        self.padding_side = padding_side

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._pack(samples) if self.packing else self._pad(samples)
        images = [image for sample in samples for image in sample["images"]]
        if images:
            places = [sample.get("place") for sample in samples for _ in sample["images"]]
            batch["pixel_values"], batch["image_sizes"] = load_crops(images, self.num_crops, places)
        return batch

    def _pad(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad_rows([sample["input_ids"] for sample in samples], self.pad_token_id, self.padding_side)
        if "labels" in samples[0]:
            batch["labels"] = pad_rows([sample["labels"] for sample in samples], -100, self.padding_side)["input_ids"]
        return batch

    def _pack(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids, labels, ends, num_images = [], [], [0], 0
        for sample in samples:
            ids = torch.tensor(sample["input_ids"])
            input_ids.append(torch.where(ids < 0, ids - num_images, ids))
            labels.append(torch.tensor(sample["labels"]))
            ends.append(ends[-1] + len(ids))
            num_images += len(sample["images"])
        cu_seq_lens = torch.tensor(ends, dtype=torch.int32)
        return {
            "input_ids": torch.cat(input_ids)[None],
            "labels": torch.cat(labels)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "max_length_q": int(cu_seq_lens.diff().max()),
        }
