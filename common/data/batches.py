"""Assignment of samples to the micro-batches of all processes: a plan for every epoch, identical on all processes.

Every optimizer step takes exactly ``batch_size`` samples, distributed over world size × accumulation bins (micro-batches).
Without packing, a bin contains ``batch_size_per_gpu`` samples in shuffled order. With packing, bins are filled so that the
work is balanced over processes and no bin exceeds the token budget, if there is one, except for a single longer sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .mixing import Mixture

# Cost of one view in the published vision tower, in tokens of the published decoder: 577 tokens through 23 layers of 12.6 M
# parameters, compared with one token through 3.7 G parameters. A frozen tower saves the backward pass, two thirds of the cost.
VIEW_WORK = 45
FROZEN_VIEW_WORK = 15


@dataclass(frozen=True)
class Lengths:
    """Size of each sample: ``tokens`` and ``views`` (crops and global views), int64 (rows,)."""

    tokens: np.ndarray
    views: np.ndarray

    def work(self, vision_trains: bool = True) -> np.ndarray:
        """Estimated cost of each sample in decoder tokens, (rows,)."""
        return self.tokens + (VIEW_WORK if vision_trains else FROZEN_VIEW_WORK) * self.views


def epoch_steps(rows: int | Mixture, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the rows of an epoch, all rows or those of a mixture, and split them into optimizer steps.

    Returns
    -------
    numpy.ndarray
        int64 (steps, batch_size). The last step is completed with the first rows of the epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows if isinstance(rows, int) else rows.rows(epoch))
    steps = -(-len(order) // batch_size)
    return np.resize(order, steps * batch_size).reshape(steps, batch_size)


def best_fit(tokens: np.ndarray, budget: int) -> np.ndarray:
    """Pack the samples of each step into bins within a token budget by best-fit decreasing, which keeps the number of bins low.

    Parameters
    ----------
    tokens : numpy.ndarray
        Number of tokens of each sample, (steps, samples).
    budget : int
        Maximum number of tokens per bin. A sample that exceeds it gets its own bin.

    Returns
    -------
    numpy.ndarray
        Bin of each sample, int64 (steps, samples).
    """
    steps = np.arange(len(tokens))
    bins, free = np.zeros_like(tokens), np.full(tokens.shape, budget)
    used = np.zeros(len(tokens), dtype=np.int64)
    for samples in np.argsort(-tokens, axis=1, kind="stable").T:
        size = tokens[steps, samples]
        room = free[:, : used.max() + 1]
        # An unused bin has the most room, so that it is taken only if no other one fits.
        chosen = np.where(room >= size[:, None], room, budget + 1).argmin(axis=1)
        chosen = np.where(size > budget, used, chosen)
        bins[steps, samples] = chosen
        free[steps, chosen] -= size
        used = np.maximum(used, chosen + 1)
    return bins


def fill_bins(tokens: np.ndarray, work: np.ndarray, num_bins: int, budget: int | None = None) -> list[list[int]]:
    """Distribute samples over non-empty bins with balanced work.

    Parameters
    ----------
    tokens, work : numpy.ndarray
        Number of tokens and cost of each sample, (samples,); at least ``num_bins`` samples.
    num_bins : int
    budget : int, optional
        Maximum number of tokens per bin. A sample that exceeds it gets its own bin. Best-fit decreasing must need at most
        ``num_bins`` bins, see :func:`accumulation_for_budget`.

    Returns
    -------
    list of list of int
        Indices of the samples in each bin; the bins are in descending order of work.
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
                # Balancing has left no bin with enough free tokens: pack as tightly as possible, and balance by splitting.
                bins = _split(_by_best_fit(tokens, budget), work, num_bins)
                break
        target = candidates[np.argmin(bin_work[candidates])]
        bins[target].append(int(sample))
        bin_tokens[target] += tokens[sample]
        bin_work[target] += work[sample]
    return sorted(bins, key=lambda members: -work[members].sum())


def _by_best_fit(tokens: np.ndarray, budget: int) -> list[list[int]]:
    [bin_of] = best_fit(tokens[None], budget)
    bins: list[list[int]] = [[] for _ in range(bin_of.max() + 1)]
    for sample in np.argsort(-tokens, kind="stable"):
        bins[bin_of[sample]].append(int(sample))
    return bins


def _split(bins: list[list[int]], work: np.ndarray, num_bins: int) -> list[list[int]]:
    """Split the bins with the most work in two until there are ``num_bins``."""
    while len(bins) < num_bins:
        bins.sort(key=lambda members: (len(members) > 1, work[members].sum()))
        largest = np.array(bins.pop())
        bins += [largest[half].tolist() for half in fill_bins(work[largest], work[largest], 2)]
    return bins


class PlannedBatches:
    """Batch sampler that yields the micro-batches of one process, one epoch per iteration.

    A micro-batch is a list of (epoch, row) keys. They contain the epoch because persistent workers serve all epochs.

    Parameters
    ----------
    num_rows : int or Mixture
        Number of rows, all of which occur once per epoch, or the mixture that selects them.
    batch_size, seed : int
        Samples per optimizer step over all processes, and shuffling seed.
    rank, world_size : int
        Rank of this process and number of processes.
    accumulation : int
        Micro-batches per process and optimizer step.
    measure : callable, optional
        Returns the :class:`Lengths` of rows in an epoch, by which the bins are balanced (packing).
    max_tokens : int, optional
        Maximum number of tokens per micro-batch.
    vision_trains : bool
        False if the vision tower is frozen, which makes a view cheaper.
    """

    def __init__(
        self,
        num_rows: int | Mixture,
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
        self._done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def begin_at(self, step: int) -> None:
        """Do not measure the rows of previous steps; yield empty batches instead, which the Trainer skips when it resumes."""
        self._done = divmod(step, len(self) // self.accumulation)

    def __len__(self) -> int:
        num_rows = self.num_rows if isinstance(self.num_rows, int) else len(self.num_rows)
        return -(-num_rows // self.batch_size) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        resumed_epoch, done = self._done
        done = done if epoch == resumed_epoch else 0
        yield from ([] for _ in range(done * self.accumulation))
        for rows in epoch_steps(self.num_rows, self.batch_size, self.seed, epoch)[done:]:
            # Measuring one step at a time lets training start immediately, however large the dataset is.
            for number, bin_rows in enumerate(self.bins(rows, self.measure(epoch, rows) if self.measure else None)):
                if number % self.world_size == self.rank:
                    yield [(epoch, int(row)) for row in bin_rows]

    def largest(self, lengths: Lengths) -> tuple[int, int]:
        """Tokens and views of the largest micro-batch, estimated from the lengths of sampled rows, for the memory estimate."""
        samples = -(-self.batch_size // (self.world_size * self.accumulation))
        tokens, views = samples * lengths.tokens.max(), samples * lengths.views.max()
        if self.max_tokens is not None:
            tokens = max(lengths.tokens.max(), min(tokens, self.max_tokens))
            # A micro-batch can contain many small samples: the bound is the maximum number of views in this many tokens.
            views = np.ceil(tokens * (lengths.views / lengths.tokens).max())
        return int(tokens), int(views)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of an optimizer step, counted from 0 over all epochs, in ascending order."""
        epoch, number = divmod(step, len(self) // self.accumulation)
        return np.unique(epoch_steps(self.num_rows, self.batch_size, self.seed, epoch)[number]).tolist()

    def bins(self, rows: np.ndarray, lengths: Lengths | None) -> list[list[int]]:
        """Distribute the rows of one step over its bins by their lengths; bin i belongs to process ``i % world_size``."""
        num_bins = self.world_size * self.accumulation
        if lengths is None:
            # Contiguous parts, so that 1 × 8, 8 × 1 and 4 × 2 micro-batches contain the same samples.
            return [list(part) for part in rows.reshape(num_bins, -1)]
        bins = fill_bins(lengths.tokens, lengths.work(self.vision_trains), num_bins, self.max_tokens)
        return [[rows[index] for index in members] for members in bins]


def accumulation_for_budget(
    epochs: Iterable[Lengths], batch_size: int, seed: int, world_size: int, max_tokens: int, mixture: Mixture | None = None
) -> int:
    """Compute the number of micro-batches per process and step that keeps every step within the token budget.

    Parameters
    ----------
    epochs : iterable of Lengths
        Lengths of all rows in each epoch.
    batch_size, seed, world_size, max_tokens : int
        As for :class:`PlannedBatches`.
    mixture : Mixture, optional
        Selects the rows of an epoch.
    """
    max_bins = 1
    for epoch, lengths in enumerate(epochs):
        steps = epoch_steps(mixture or len(lengths.tokens), batch_size, seed, epoch)
        max_bins = max(max_bins, 1 + int(best_fit(lengths.tokens[steps], max_tokens).max()))
    return -(-max_bins // world_size)
