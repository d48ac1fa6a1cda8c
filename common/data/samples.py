"""Encoded training samples, which depend only on (seed, epoch, row)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset

from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import crop_grid_size, num_image_tokens, num_views
from common.runtime.collectives import first_on_each_machine, gather
from common.runtime.machine import cores_per_process
from common.runtime.process import InputError, rank, world_size
from common.runtime.progress import Progress

from .batches import Lengths
from .conversations import Conversation, check_context, count_tokens, encode_conversation, pictures
from .loader import in_parallel
from .pictures import Picture, check_unchanged, picture_size
from .prepared import cache_file, load_array, save_array
from .rows import Rows

ToConversation = Callable[[Any, random.Random], Conversation]

ROWS_AT_ONCE = 64  # limits how many images stored in the dataset are in memory
ROWS_OF_WORKER = 512
FEW_CHUNKS = 8  # which this process measures before worker processes have started
IMAGES_REMEMBERED = 10_000
LENGTHS_VERSION = 1  # of what is in the cache; to be raised when rows are encoded differently


class _Generator:
    """A ``random.Random`` that is seeded when it is first used, since most rows draw nothing, and seeding is slow."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self.seeded: random.Random | None = None

    def __getattr__(self, name: str) -> Any:
        self.seeded = self.seeded or random.Random(self.seed)
        return getattr(self.seeded, name)


class TrainingData(Dataset):
    """Encoded conversations, indexed by (epoch, row).

    Parameters
    ----------
    rows : Rows
    to_conversation : callable
        Converts a row and a ``random.Random`` to a conversation. The generator, which may choose one of several questions
        or accepted answers, is seeded by (seed, epoch, row), so that all processes and workers draw the same.
    processor : Phi3VProcessor
    seed : int
    """

    def __init__(self, rows: Rows, to_conversation: ToConversation, processor: Phi3VProcessor, seed: int) -> None:
        self.rows, self.to_conversation, self.processor, self.seed = rows, to_conversation, processor, seed
        self.place = rows.place
        self._checked_at = time.time()
        self._image_sizes: dict[str, tuple[int, int]] = {}
        self._measured = np.zeros((len(rows), 2), dtype=np.int64)
        # Whether a row's conversation changes with the epoch. This is assumed until the row is measured; most never change.
        self._varies = np.ones(len(rows), dtype=bool)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, epoch: int, row: int) -> Conversation:
        """Return the conversation of a row in an epoch."""
        return self.to_conversation(self.rows[row], random.Random(f"{self.seed}/{epoch}/{row}"))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, row = key
        try:
            conversation = self.conversation(epoch, row)
            for picture in pictures(conversation):
                check_unchanged(picture, self._checked_at)
            sample = encode_conversation(conversation, self.processor)
        except InputError as error:
            raise error.at(self.place(row)) from None
        return sample | {"place": self.place(row)}

    def measure(self, epoch: int, rows: np.ndarray, skip_bad: bool = False) -> Lengths:
        """Compute the tokens and views of rows in an epoch from text and image sizes, without decoding images.

        A row whose conversation does not change with the epoch is measured only once.

        Parameters
        ----------
        epoch : int
        rows : numpy.ndarray
            Row indices, int64 (rows,).
        skip_bad : bool
            Count an invalid row as one token, because a :func:`filler` takes its place.

        Raises
        ------
        InputError
            If a row is invalid; the message names the row.
        """
        new = rows[self._varies[rows]]
        if len(new):
            try:
                self._measured[new], self._varies[new] = self._measure(epoch, new)
            except InputError:
                if not skip_bad:
                    raise
                if len(new) == 1:
                    self._measured[new] = 1, 0
                else:
                    for row in new:
                        self.measure(epoch, np.array([row]), skip_bad)
        tokens, views = self._measured[rows].T
        return Lengths(tokens=tokens, views=views)

    def lengths(self, epoch: int, bar: bool = True) -> Lengths:
        """Measure all rows in an epoch, each process its share, as :meth:`measure`. Must be called on all processes."""
        rows = np.flatnonzero(self._varies)
        if len(rows):
            file = self._cache_file()
            saved = load_array(file, self._measured.shape) if file else None
            if all(gather(saved is not None)):
                assert saved is not None
                self._measured, self._varies = saved, np.zeros(len(self), dtype=bool)
            else:
                self._measure_all(epoch, rows, bar)
                if file and not self._varies.any():
                    first_on_each_machine(lambda: save_array(file, self._measured))
                    # Mapped into memory, which the workers share; only now, since machines may write the same file.
                    saved = load_array(file, self._measured.shape)
                    self._measured = self._measured if saved is None else saved
        tokens, views = self._measured.T.copy()
        return Lengths(tokens=tokens, views=views)

    def _cache_file(self) -> Path | None:
        """Where the lengths of all rows are kept, if it is known when they change."""
        if self.rows.fingerprint is None:
            return None
        tokenizer = self.processor.tokenizer
        settings = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.model_max_length
        task = Hasher.hash(self.to_conversation), self.processor.image_processor.num_crops
        return cache_file(f"{LENGTHS_VERSION} {self.rows.fingerprint} {task} {settings}", "npy")

    def _measure_all(self, epoch: int, rows: np.ndarray, bar: bool) -> None:
        """Measure rows, each process its share, with workers of its own."""
        share = rows[rank() :: world_size()]
        chunks = np.split(share, range(ROWS_OF_WORKER, len(share), ROWS_OF_WORKER))
        num_workers = cores_per_process() if len(chunks) > FEW_CHUNKS else 0
        found = []
        with Progress("Planning batches", "rows", len(rows), bar, shared=True) as progress:
            for chunk, part in zip(chunks, in_parallel(partial(self._measure, epoch), chunks, num_workers), strict=True):
                found.append(part)
                progress.update(len(chunk))
        own = tuple(map(np.concatenate, zip(*found, strict=True)))
        for index, (measured, varies) in enumerate(gather(own)):
            self._measured[rows[index :: world_size()]] = measured
            self._varies[rows[index :: world_size()]] = varies

    def sample_lengths(self, count: int = 256) -> Lengths:
        """Measure up to ``count`` rows, evenly spaced over the dataset."""
        return self.measure(0, np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)))

    def _measure(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and views of rows, int64 (rows, 2), and whether they change with the epoch, bool (rows,)."""
        measured, varies = np.empty((len(rows), 2), dtype=np.int64), np.empty(len(rows), dtype=bool)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = rows[start : start + ROWS_AT_ONCE].tolist()
            conversations, image_tokens = [], []
            for position, (row, content) in enumerate(zip(chosen, self.rows.__getitems__(chosen), strict=True), start):
                generator: Any = _Generator(f"{self.seed}/{epoch}/{row}")
                conversations.append(self.to_conversation(content, generator))
                varies[position] = generator.seeded is not None
                sizes = self._sizes(row, conversations[-1])
                image_tokens.append([tokens for tokens, _ in sizes])
                measured[position, 1] = sum(views for _, views in sizes)

            def place(index: int, rows: list[int] = chosen) -> str:
                return self.place(rows[index])

            tokens = count_tokens(conversations, image_tokens, place, self.processor)
            measured[start : start + len(chosen), 0] = tokens
            longest = int(np.argmax(tokens))
            try:
                check_context(tokens[longest], self.processor)
            except InputError as error:
                raise error.at(place(longest)) from None
        return measured, varies

    def _sizes(self, row: int, conversation: Conversation) -> list[tuple[int, int]]:
        """Tokens and views of each image."""
        if len(self._image_sizes) > IMAGES_REMEMBERED:
            self._image_sizes.clear()
        try:
            return [self._size(image) for image in pictures(conversation)]
        except InputError as error:
            raise error.at(self.place(row)) from None

    def _size(self, image: Picture) -> tuple[int, int]:
        if isinstance(image, str) and image in self._image_sizes:  # rows may share images
            return self._image_sizes[image]
        grid = crop_grid_size(*picture_size(image), self.processor.image_processor.num_crops)
        size = num_image_tokens(*grid), num_views(*grid)
        if isinstance(image, str):
            self._image_sizes[image] = size
        return size


def filler(processor: Phi3VProcessor) -> dict[str, Any]:
    """Return a sample that takes the place of a missing one: its answer is masked, so that it adds nothing to the gradient."""
    sample = encode_conversation({"conversations": [{"user": "-", "assistant": "-"}]}, processor)
    return sample | {"labels": [-100] * len(sample["labels"])}
