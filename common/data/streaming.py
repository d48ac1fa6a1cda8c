"""Rows that no machine's memory could hold, read while training goes on.

Every epoch puts the pieces of all shards (blocks of lines, row groups) into an order of its own, and each process reads an
equal stretch of it: no row twice, none lost, whatever the numbers of shards and processes. The rows of a stretch are shuffled
in windows, of which a thread reads the next one ahead; workers decode and encode. All that is a function of (seed, epoch,
process), so that a resumed run goes on with the very next row, without reading what was done.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data

from common.phi3v import Phi3VProcessor
from common.runtime import InputError

from .batches import Lengths
from .conversations import Conversation, encode_conversation, pictures
from .pictures import check_picture
from .rows import Rows
from .samples import TrainingData

ROWS_PER_WINDOW = 512  # two of them, pictures still encoded, are in a process's memory at a time

# What a process takes, its answer masked, where only the others have rows left: no gradient, but it keeps in step with them.
FILLER = {"conversations": [{"user": "-", "assistant": "-"}]}


class Span(NamedTuple):
    """Neighbouring rows of a shard: ``start`` to ``stop`` of a piece that begins at ``position`` (byte, or row group)."""

    shard: str
    position: int
    first: int  # line or row of the shard that the piece begins with
    number: int  # of the piece's first row among all rows
    start: int
    stop: int


class Row(NamedTuple):
    """A row on its way to a worker; ``place`` names it in messages."""

    epoch: int
    number: int
    place: str
    content: dict[str, Any]


class Stream:
    """Rows of shards in an order that is a function of (seed, epoch).

    Parameters
    ----------
    spans : list of Span
    read : callable
        Gives the rows of a piece, each with its place, from the piece's beginning.
    convert : callable, optional
        Turns what a shard holds, and an identifier, into the row that the task reads.
    """

    def __init__(
        self,
        spans: list[Span],
        read: Callable[[Span], Iterator[tuple[str, dict[str, Any]]]],
        convert: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
    ) -> None:
        self.spans = spans
        self.read = read
        self.convert = convert
        self._len = sum(span.stop - span.start for span in spans)

    def __len__(self) -> int:
        return self._len

    def select(self, begin: int, limit: int | None = None) -> Stream:
        """The rows from ``begin`` on, at most ``limit``, in the shards' order."""
        return Stream(_cut(self.spans, begin, len(self) if limit is None else begin + limit), self.read, self.convert)

    def map(self, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> Stream:
        """The same rows, as ``convert`` makes them of what a shard holds and of its number among all rows."""
        return Stream(self.spans, self.read, convert)

    def head(self, count: int) -> Rows:
        """The first rows, in memory."""
        rows = [row for span in self.select(0, count).spans for row in self._rows_of(span, epoch=0)]
        places = [row.place for row in rows]
        return Rows([row.content for row in rows], places.__getitem__)

    def rows(self, seed: int, epoch: int, rank: int = 0, world_size: int = 1, begin: int = 0) -> Iterator[Row]:
        """What a process reads in an epoch, but for its first ``begin`` rows.

        Raises
        ------
        InputError
            Naming shard and row, if one is malformed.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.spans))
        stretch = (rank * len(self) // world_size, (rank + 1) * len(self) // world_size)
        window, done = divmod(begin, ROWS_PER_WINDOW)
        spans = _cut([self.spans[index] for index in order], stretch[0] + window * ROWS_PER_WINDOW, stretch[1])
        reading = chain.from_iterable(self._rows_of(span, epoch) for span in spans)
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(lambda: list(islice(reading, ROWS_PER_WINDOW)))
            while rows := upcoming.result():
                upcoming = reader.submit(lambda: list(islice(reading, ROWS_PER_WINDOW)))
                order = np.random.default_rng([seed, epoch, rank, window]).permutation(len(rows))
                yield from (rows[index] for index in order[done:])
                window, done = window + 1, 0

    def _rows_of(self, span: Span, epoch: int) -> Iterator[Row]:
        for index, (place, content) in enumerate(islice(self.read(span), span.start, span.stop), start=span.start):
            number = span.number + index
            yield Row(epoch, number, place, self.convert(content, str(number)) if self.convert else content)


class StreamedBatches:
    """The micro-batches of one process, epoch by epoch, as a ``batch_sampler``: lists of rows, or ``[None]`` for a filler.

    Parameters
    ----------
    stream : Stream
    batch_size : int
        Samples an optimizer step over all processes; the epoch's last step takes what is left.
    batch_size_per_gpu : int
        Samples a micro-batch.
    seed, rank, world_size : int
    """

    def __init__(
        self, stream: Stream, batch_size: int, batch_size_per_gpu: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.stream, self.batch_size, self.batch_size_per_gpu = stream, batch_size, batch_size_per_gpu
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.accumulation = batch_size // (world_size * batch_size_per_gpu)
        self.epoch = 0
        self._done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def begin_at(self, step: int) -> None:
        """Don't read what the steps before took: their batches, which a resuming Trainer throws away, are empty."""
        self._done = divmod(step * self.accumulation, len(self))

    def __len__(self) -> int:
        steps = -(-len(self.stream) // self.batch_size)
        return steps * self.accumulation

    def largest(self, lengths: Lengths) -> tuple[int, int]:
        """Tokens and views of a micro-batch as large as they get, by samples of the data: for an estimate of memory."""
        return tuple(int(self.batch_size_per_gpu * size.max()) for size in (lengths.tokens, lengths.views))

    def __iter__(self) -> Iterator[list[Row | None]]:
        begun, done = self._done
        done = done if self.epoch == begun else 0
        yield from ([] for _ in range(done))
        rows = self.stream.rows(self.seed, self.epoch, self.rank, self.world_size, done * self.batch_size_per_gpu)
        for _ in range(done, len(self)):
            yield list(islice(rows, self.batch_size_per_gpu)) or [None]


class StreamedData(torch.utils.data.Dataset):
    """Encoded conversations, indexed by rows as they come; parameters as for :class:`common.data.samples.TrainingData`."""

    def __init__(
        self,
        rows: Stream,
        to_conversation: Callable[[Any, random.Random], Conversation],
        processor: Phi3VProcessor,
        seed: int,
    ) -> None:
        self.rows = rows
        self.to_conversation = to_conversation
        self.processor = processor
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def sample_lengths(self, count: int = 64) -> Lengths:
        """Tokens and views of the first rows."""
        return TrainingData(self.rows.head(count), self.to_conversation, self.processor, self.seed).sample_lengths(count)

    def __getitem__(self, row: Row | None) -> dict[str, Any]:
        if row is None:
            sample = encode_conversation(FILLER, self.processor)
            return sample | {"labels": [-100] * len(sample["labels"])}
        conversation = self.to_conversation(row.content, random.Random(f"{self.seed}/{row.epoch}/{row.number}"))
        try:
            for picture in pictures(conversation):
                check_picture(picture)  # as is done beforehand with rows that are not streamed
            sample = encode_conversation(conversation, self.processor)
        except InputError as error:
            raise error.at(row.place) from None
        return sample | {"place": row.place}


def training_data(
    rows: Sequence[Any] | Stream,
    to_conversation: Callable[[Any, random.Random], Conversation],
    processor: Phi3VProcessor,
    seed: int,
) -> TrainingData | StreamedData:
    """Rows, in memory or streamed, as training samples."""
    data = StreamedData if isinstance(rows, Stream) else TrainingData
    return data(rows, to_conversation, processor, seed)


def _cut(spans: list[Span], begin: int, end: int) -> list[Span]:
    """Rows ``begin`` to ``end`` of what spans hold together."""
    kept, passed = [], 0
    for span in spans:
        start, stop = max(span.start, span.start + begin - passed), min(span.stop, span.start + end - passed)
        if start < stop:
            kept.append(span._replace(start=start, stop=stop))
        passed += span.stop - span.start
    return kept
