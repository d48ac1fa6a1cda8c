"""How often the rows of several files occur in an epoch: ``--train_weights``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Mixture:
    """The rows of each epoch of a mixture of files.

    A file of n rows with weight w contributes round(w × n) rows to every epoch, at least one. They are taken in turn from a
    shuffled order of the file, in which an epoch continues where the previous one ended, starting again at its end. With weight
    2, each row therefore occurs twice per epoch; with weight 0.5, one half occurs in the first epoch and the other half in the
    second. The rows depend only on (seed, epoch).

    Parameters
    ----------
    counts : sequence of int
        Number of rows of each file.
    weights : sequence of float
        Weight of each file, above 0.
    seed : int
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.counts, self.weights, self.seed = counts, weights, seed
        self.per_epoch = [max(1, round(weight * count)) * (count > 0) for weight, count in zip(weights, counts, strict=True)]

    def __len__(self) -> int:
        return sum(self.per_epoch)

    def rows(self, epoch: int) -> np.ndarray:
        """Indices of the rows of an epoch among the rows of all files, in ascending order, int64 (len(self),)."""
        picked, first = [], 0
        for file, (count, taken) in enumerate(zip(self.counts, self.per_epoch, strict=True)):
            order = np.random.default_rng([self.seed, file]).permutation(count)
            picked.append(first + np.take(order, np.arange(epoch * taken, (epoch + 1) * taken), mode="wrap"))
            first += count
        return np.sort(np.concatenate(picked))
