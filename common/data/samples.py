"""Rows of a data set as training samples, a function of (seed, epoch, row) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from common.phi3v import Phi3VProcessor
from common.phi3v.image_processing import crop_grid_size, num_image_tokens, num_views
from common.runtime import InputError, Progress, gather, rank, world_size

from .batches import Lengths
from .conversations import Conversation, count_tokens, encode_conversation, pictures
from .pictures import open_picture
from .rows import Rows

ROWS_AT_ONCE = 64  # whose pictures, stored in the data set, are in memory together


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
    name : str
        What messages call a row that does not know its place.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        to_conversation: Callable[[Any, random.Random], Conversation],
        processor: Phi3VProcessor,
        seed: int,
        name: str = "training row",
    ) -> None:
        self.rows = rows
        self.to_conversation = to_conversation
        self.processor = processor
        self.seed = seed
        # Rows of the tasks know where they stand in their data set.
        self.place = rows.place if isinstance(rows, Rows) else partial("{} {}".format, name)
        self._image_sizes: dict[int, list[tuple[int, int]]] = {}
        self._measured = np.zeros((len(rows), 2), dtype=np.int64)
        # Until measured, each row may become another conversation in another epoch; most data sets draw nothing.
        self._varies = np.ones(len(rows), dtype=bool)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, epoch: int, row: int) -> Conversation:
        """The conversation that a row becomes in an epoch."""
        return self.to_conversation(self.rows[row], self._generator(epoch, row))

    def _generator(self, epoch: int, row: int) -> random.Random:
        return random.Random(f"{self.seed}/{epoch}/{row}")

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, row = key
        try:
            sample = encode_conversation(self.conversation(epoch, row), self.processor)
        except InputError as error:
            raise error.at(self.place(row)) from None
        return sample | {"place": self.place(row)}

    def measure(self, epoch: int, rows: np.ndarray) -> Lengths:
        """Tokens and views of some rows in an epoch, from picture sizes and text, decoding nothing.

        A row whose conversation draws nothing is measured only once.

        Parameters
        ----------
        epoch : int
        rows : numpy.ndarray
            int64 (rows,).

        Raises
        ------
        InputError
            Naming the row and what is wrong with it.
        """
        new = rows[self._varies[rows]]
        if len(new):
            self._measured[new], self._varies[new] = self._measure(epoch, new)
        tokens, views = self._measured[rows].T
        return Lengths(tokens=tokens, views=views)

    def lengths(self, epoch: int, bar: bool = True) -> Lengths:
        """As :meth:`measure`, of all rows, each process measuring a share of them; to be called on all processes.

        Parameters
        ----------
        epoch : int
        bar : bool
            False for ``--no-tqdm``.

        Returns
        -------
        Lengths
            The same on all processes.

        Raises
        ------
        InputError
            Naming the row and what is wrong with it.
        """
        rows = np.flatnonzero(self._varies)
        if len(rows):
            share = rows[rank() :: world_size()]
            with Progress("Planning batches", "rows", len(share), bar) as progress:
                own = self._measure(epoch, share, progress.update)
            for index, (measured, varies) in enumerate(gather(own)):
                self._measured[rows[index :: world_size()]] = measured
                self._varies[rows[index :: world_size()]] = varies
        tokens, views = self._measured.T.copy()
        return Lengths(tokens=tokens, views=views)

    def sample_lengths(self, count: int = 256) -> Lengths:
        """As :meth:`measure`, of some rows spread over the data."""
        return self.measure(0, np.unique(np.linspace(0, len(self) - 1, count).astype(np.int64)))

    def _measure(
        self, epoch: int, rows: np.ndarray, count_done: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and views of some rows, int64 (rows, 2), and whether another epoch may change them, bool (rows,)."""
        measured, varies = np.empty((len(rows), 2), dtype=np.int64), np.empty(len(rows), dtype=bool)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = rows[start : start + ROWS_AT_ONCE].tolist()
            conversations, image_tokens = [], []
            for position, (row, content) in enumerate(zip(chosen, self._rows(chosen), strict=True), start):
                generator = self._generator(epoch, row)
                untouched = generator.getstate()
                conversations.append(self.to_conversation(content, generator))
                varies[position] = generator.getstate() != untouched
                sizes = self._sizes(row, conversations[-1], keep=varies[position])
                image_tokens.append([num_image_tokens(*size) for size in sizes])
                measured[position, 1] = sum(num_views(*size) for size in sizes)
            names = [self.place(row) for row in chosen]
            tokens = count_tokens(conversations, image_tokens, names, self.processor)
            measured[start : start + len(chosen), 0] = tokens
            if count_done:
                count_done(len(chosen))
        return measured, varies

    def _rows(self, chosen: list[int]) -> Sequence[Any]:
        if hasattr(self.rows, "__getitems__"):  # one access of a datasets.Dataset costs as much as one of many rows
            return self.rows.__getitems__(chosen)
        return [self.rows[row] for row in chosen]

    def _sizes(self, row: int, conversation: Conversation, keep: bool) -> list[tuple[int, int]]:
        """Height and width to which each picture is resized and padded."""
        if row in self._image_sizes:
            return self._image_sizes[row]
        num_crops = self.processor.image_processor.num_crops
        try:
            sizes = [crop_grid_size(*open_picture(image).size, num_crops) for image in pictures(conversation)]
        except InputError as error:
            raise error.at(self.place(row)) from None
        if keep:
            self._image_sizes[row] = sizes
        return sizes
