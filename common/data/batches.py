"""Which samples go into which micro-batch of which process: a plan for every epoch, the same on all processes.

Every optimizer step takes exactly ``batch_size`` samples, in processes × accumulation bins. Without packing a bin holds
``batch_size_per_gpu`` samples as they come; with packing, bins are filled so that tokens and crops are balanced over
processes and, if there is a token budget, no bin exceeds it (but for a sample that alone does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

# Work of the published tower for one crop, in tokens of the published decoder: 577 tokens through 23 layers of 12.6 M
# parameters against one token through 3.7 G parameters. A frozen tower has no backward pass, two thirds of it.
TOKENS_PER_VIEW_OF_WORK = 45
TOKENS_PER_VIEW_OF_FROZEN_WORK = 15


@dataclass(frozen=True)
class Lengths:
    """Size of every sample of an epoch: ``tokens`` and ``views`` (crops and global views), int64 (rows,)."""

    tokens: np.ndarray
    views: np.ndarray

    def work(self, vision_trains: bool = True) -> np.ndarray:
        """Work of each sample in tokens of the decoder, (rows,)."""
        return self.tokens + (TOKENS_PER_VIEW_OF_WORK if vision_trains else TOKENS_PER_VIEW_OF_FROZEN_WORK) * self.views


def epoch_steps(num_rows: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle an epoch's rows and cut them into optimizer steps.

    Returns
    -------
    numpy.ndarray
        int64 (steps, batch_size). The last step is filled up with the epoch's first rows.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    steps = -(-num_rows // batch_size)
    return np.resize(order, steps * batch_size).reshape(steps, batch_size)


def best_fit(tokens: np.ndarray, budget: int) -> list[list[int]]:
    """Put samples into as few bins as best fit finds, taking them in order of falling size, so that no bin exceeds the budget.

    Parameters
    ----------
    tokens : numpy.ndarray
        Tokens of each sample, (samples,).
    budget : int
        Most tokens of a bin. A sample that alone exceeds it gets a bin of its own.

    Returns
    -------
    list of list of int
        Indices of the samples in each bin.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for sample in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[sample])
        fitting = [index for index, room in enumerate(free) if room >= size]
        if fitting:
            index = min(fitting, key=free.__getitem__)
            bins[index].append(sample)
            free[index] -= size
        else:
            bins.append([sample])
            free.append(budget - size)
    return bins


def fill_bins(tokens: np.ndarray, work: np.ndarray, num_bins: int, budget: int | None = None) -> list[list[int]]:
    """Distribute samples over bins, none of them empty, so that the bins' work is balanced.

    Parameters
    ----------
    tokens, work : numpy.ndarray
        Tokens and work of each sample, (samples,); at least ``num_bins`` samples.
    budget : int, optional
        Most tokens of a bin. A sample that alone exceeds it gets a bin of its own.

    Returns
    -------
    list of list of int
        Indices of the samples in each bin, bins in order of falling work.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    bin_tokens, bin_work = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins)
    order = np.argsort(-work, kind="stable")
    for position, sample in enumerate(order):
        candidates = np.arange(num_bins)
        empty = candidates[bin_tokens == 0]
        if len(order) - position <= len(empty):
            candidates = empty
        elif budget is not None:
            candidates = candidates[(bin_tokens + tokens[sample] <= budget) | (bin_tokens == 0)]
            if not len(candidates):
                bins = _split(best_fit(tokens, budget), work, num_bins)
                break
        target = candidates[np.argmin(bin_work[candidates])]
        bins[target].append(int(sample))
        bin_tokens[target] += tokens[sample]
        bin_work[target] += work[sample]
    return sorted(bins, key=lambda members: -work[members].sum())


def _split(bins: list[list[int]], work: np.ndarray, num_bins: int) -> list[list[int]]:
    """Halve the bins of most work until there are as many as there shall be."""
    while len(bins) < num_bins:
        bins.sort(key=lambda members: (len(members) > 1, work[members].sum()))
        most = np.array(bins.pop())
        bins += [most[half].tolist() for half in fill_bins(work[most], work[most], 2)]
    return bins


class PlannedBatches:
    """The micro-batches of one process, epoch by epoch, as a ``batch_sampler``.

    Yields lists of keys (epoch, row), so that workers that live on through all epochs know which one they serve.

    Parameters
    ----------
    num_rows, batch_size, seed : int
        Samples a data set, samples an optimizer step over all processes, seed of the order.
    rank, world_size : int
        This process, and how many there are.
    accumulation : int
        Micro-batches a process and step.
    measure : callable, optional
        Gives the :class:`Lengths` of an epoch's rows; bins are then balanced by them (packing).
    max_tokens : int, optional
        Most tokens of a bin.
    vision_trains : bool
        False where the tower is frozen, and a crop so costs less.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int,
        measure: Callable[[int, np.ndarray], Lengths] | None = None,
        max_tokens: int | None = None,
        vision_trains: bool = True,
    ) -> None:
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.measure, self.max_tokens, self.vision_trains = measure, max_tokens, vision_trains
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for rows in epoch_steps(self.num_rows, self.batch_size, self.seed, epoch):
            # Measured step by step, so that training begins at once however many rows there are.
            for number, bin_rows in enumerate(self.bins(rows, self.measure(epoch, rows) if self.measure else None)):
                if number % self.world_size == self.rank:
                    yield [(epoch, int(row)) for row in bin_rows]

    def largest(self, lengths: Lengths) -> tuple[int, int]:
        """Tokens and views of a micro-batch as large as they get, by samples of the data: for an estimate of memory."""
        samples = -(-self.batch_size // (self.world_size * self.accumulation))
        tokens, views = samples * lengths.tokens.max(), samples * lengths.views.max()
        if self.max_tokens is not None:
            tokens = max(lengths.tokens.max(), min(tokens, self.max_tokens))
            # Small samples are more at once than others: the bound is as many views as so many tokens can hold.
            views = np.ceil(tokens * (lengths.views / lengths.tokens).max())
        return int(tokens), int(views)

    def bins(self, rows: np.ndarray, lengths: Lengths | None) -> list[list[int]]:
        """Distribute one step's rows, whose lengths these are, over its bins; bin i belongs to process ``i % world_size``."""
        num_bins = self.world_size * self.accumulation
        if lengths is None:
            # Neighbours go to one process, so that 1 × 8, 8 × 1 and 4 × 2 take the same samples.
            return [list(part) for part in rows.reshape(num_bins, -1)]
        bins = fill_bins(lengths.tokens, lengths.work(self.vision_trains), num_bins, self.max_tokens)
        return [[rows[index] for index in members] for members in bins]


def accumulation_for_budget(epochs: Iterable[Lengths], batch_size: int, seed: int, world_size: int, max_tokens: int) -> int:
    """Micro-batches a process and step with which no step exceeds the token budget.

    Parameters
    ----------
    epochs : iterable of Lengths
        Of all rows, epoch by epoch.
    batch_size, seed, world_size, max_tokens : int
        As for :class:`PlannedBatches`.
    """
    most = 1
    for epoch, lengths in enumerate(epochs):
        for rows in epoch_steps(len(lengths.tokens), batch_size, seed, epoch):
            most = max(most, len(best_fit(lengths.tokens[rows], max_tokens)))
    return -(-most // world_size)
