"""Rows of a data set as training samples, a function of (seed, epoch, row) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from .conversations import Conversation, encode_conversation, open_picture, pictures
from .phi3v import Phi3VProcessor
from .phi3v.image_processing import CROP_SIZE, crop_grid_size, num_image_tokens
from .planning import Lengths


class TrainingData(Dataset):
    """Encoded conversations, indexed by (epoch, row).

    Parameters
    ----------
    rows : sequence
        Rows as the task reads them, a ``datasets.Dataset`` say.
    to_conversation : callable
        Turns a row and a ``random.Random`` into a conversation. Draws from the generator (which of a page's questions,
        which of several accepted answers) are the same whoever makes them and whenever.
    processor : Phi3VProcessor
    seed : int
    """

    def __init__(
        self,
        rows: Sequence[Any],
        to_conversation: Callable[[Any, random.Random], Conversation],
        processor: Phi3VProcessor,
        seed: int,
    ) -> None:
        self.rows = rows
        self.to_conversation = to_conversation
        self.processor = processor
        self.seed = seed
        self._image_sizes: dict[int, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, epoch: int, row: int) -> Conversation:
        """The conversation that a row becomes in an epoch."""
        return self.to_conversation(self.rows[row], random.Random(f"{self.seed}/{epoch}/{row}"))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, row = key
        try:
            return encode_conversation(self.conversation(epoch, row), self.processor)
        except ValueError as error:
            raise ValueError(f"training row {row}: {error}") from None

    def measure(self, epoch: int, row: int) -> tuple[int, int]:
        """Tokens and crops of a sample, from picture sizes and text, decoding nothing."""
        conversation = self.conversation(epoch, row)
        num_crops = self.processor.image_processor.num_crops
        sizes = self._image_sizes.get(row)
        try:
            if sizes is None:
                images = pictures(conversation)
                sizes = [crop_grid_size(*open_picture(image).size, num_crops) for image in images]
                self._image_sizes[row] = sizes
            image_tokens = [num_image_tokens(*size) for size in sizes]
            sample = encode_conversation(conversation, self.processor, image_tokens)
        except ValueError as error:
            raise ValueError(f"training row {row}: {error}") from None
        crops = sum(1 + (height // CROP_SIZE) * (width // CROP_SIZE) for height, width in sizes)
        return len(sample["input_ids"]), crops

    def lengths(self, epoch: int, show_progress: bool = False) -> Lengths:
        """Measure all samples of an epoch, each process a share of them.

        Returns
        -------
        Lengths
            The same on all processes.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        rows = range(rank, len(self), world_size)
        progress = tqdm(rows, desc="Planning batches", disable=not show_progress or rank > 0, leave=False)
        measured = np.array([self.measure(epoch, row) for row in progress], dtype=np.int64).reshape(-1, 2)
        shares = [measured]
        if world_size > 1:
            shares = [None] * world_size
            dist.all_gather_object(shares, measured)
        lengths = np.empty((len(self), 2), dtype=np.int64)
        for index, share in enumerate(shares):
            lengths[index::world_size] = share
        return Lengths(tokens=lengths[:, 0], crops=lengths[:, 1])
