"""Streaming of datasets that do not fit on disk or in memory.

In every epoch, the pieces of all shards (blocks of lines or row groups) are shuffled, and each process reads an equal,
contiguous part of them: no row is read twice or skipped, whatever the number of shards and processes. The rows of a part are
shuffled in windows. A thread prefetches the next window; workers encode the rows and decode their images. The order depends
only on (seed, epoch, process), so a resumed run continues with the next row without reading the previous ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data

from common.phi3v import Phi3VProcessor
from common.runtime.process import InputError

from .batches import Lengths
from .conversations import encode_conversation, pictures
from .mixing import Mixture
from .pictures import check_picture
from .reading import check_conversation
from .rows import Contents, Rows, converting
from .samples import ToConversation, TrainingData, filler

ROWS_PER_WINDOW = 512  # each process holds two windows in memory, with encoded images
ROWS_PEEKED = 64


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` of a piece of a shard, which begins at ``position`` (byte offset or row group)."""

    shard: str
    position: int
    first: int  # lines or stored rows before the piece, in the shard or, on the Hub, in all shards
    number: int  # index of the first row of the piece among all rows
    start: int
    stop: int


class Row(NamedTuple):
    """A row as sent to a worker, with its index among all rows and its location for messages."""

    epoch: int
    number: int
    place: str
    content: dict[str, Any]


class Stream:
    """Rows of shards, in an order that depends only on (seed, epoch).

    Parameters
    ----------
    spans : list of Span
    read : callable
        Yields location and content of all rows of a piece.
    convert : callable, optional
        Converts the content of a row and an identifier to the row that the task reads.
    """

    # Rows are checked when they are read, and are not mixed; see Rows.
    contents: Contents | None = None
    mixture: Mixture | None = None

    def __init__(
        self,
        spans: list[Span],
        read: Callable[[Span], Iterator[tuple[str, dict[str, Any]]]],
        convert: Callable[[dict[str, Any], str], dict[str, Any]] | None = None,
    ) -> None:
        self.spans, self.read, self.convert = spans, read, convert
        self._len = sum(span.stop - span.start for span in spans)

    def __len__(self) -> int:
        return self._len

    def select(self, begin: int, limit: int | None = None) -> Stream:
        """Return at most ``limit`` rows, starting at ``begin``, in the order of the shards."""
        return Stream(_slice_spans(self.spans, begin, len(self) if limit is None else begin + limit), self.read, self.convert)

    def map(self, convert: Callable[[dict[str, Any], str], dict[str, Any]]) -> Stream:
        """Return the same rows with another conversion of content and index among all rows."""
        return Stream(self.spans, self.read, convert)

    def head(self, count: int) -> Rows:
        """Load the first ``count`` rows into memory."""
        rows = [row for span in self.select(0, count).spans for row in self._rows_of(span, epoch=0)]
        places = [row.place for row in rows]
        return Rows([row.content for row in rows], places.__getitem__)

    def peek(self) -> Rows:
        """Load the rows that are read before training."""
        return self.head(ROWS_PEEKED)

    def rows(self, seed: int, epoch: int, rank: int = 0, world_size: int = 1, begin: int = 0) -> Iterator[Row]:
        """Yield the rows that a process reads in an epoch, without its first ``begin`` rows.

        Raises
        ------
        InputError
            If a row is invalid; the message names the row.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.spans))
        part = (rank * len(self) // world_size, (rank + 1) * len(self) // world_size)
        window, done = divmod(begin, ROWS_PER_WINDOW)
        spans = _slice_spans([self.spans[index] for index in order], part[0] + window * ROWS_PER_WINDOW, part[1])
        reading = chain.from_iterable(self._rows_of(span, epoch) for span in spans)
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(lambda: list(islice(reading, ROWS_PER_WINDOW)))
            while rows := upcoming.result():
                upcoming = reader.submit(lambda: list(islice(reading, ROWS_PER_WINDOW)))
                order = np.random.default_rng([seed, epoch, rank, window]).permutation(len(rows))
                yield from (rows[index] for index in order[done:])
                window, done = window + 1, 0

    def _rows_of(self, span: Span, epoch: int) -> Iterator[Row]:
        read = span.start
        for index, (place, content) in enumerate(islice(self.read(span), span.start, span.stop), start=span.start):
            read, number = index + 1, span.number + index
            with converting(place):
                content = self.convert(content, str(number)) if self.convert else content
            yield Row(epoch, number, place, content)
        if read < span.stop:
            raise InputError("has fewer rows than when the run began: restore it", span.shard)


class StreamedBatches:
    """Batch sampler that yields the micro-batches of one process, one epoch per iteration.

    A micro-batch is a list of rows, or ``[None]`` if the process has no rows left in the epoch.

    Parameters
    ----------
    stream : Stream
    batch_size : int
        Samples per optimizer step over all processes; the last step of an epoch takes the remaining rows.
    batch_size_per_gpu : int
        Samples per micro-batch.
    seed, rank, world_size : int
    """

    max_tokens: int | None = None  # see PlannedBatches

    def __init__(
        self, stream: Stream, batch_size: int, batch_size_per_gpu: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.stream, self.batch_size, self.batch_size_per_gpu = stream, batch_size, batch_size_per_gpu
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.accumulation = batch_size // (world_size * batch_size_per_gpu)
        self.epoch = 0
        self._done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def begin_at(self, step: int) -> None:
        """Do not read the rows of previous steps; yield empty batches instead, which the Trainer skips when it resumes."""
        self._done = divmod(step * self.accumulation, len(self))

    def __len__(self) -> int:
        steps = -(-len(self.stream) // self.batch_size)
        return steps * self.accumulation

    def rows_of_step(self, step: int) -> list[int]:
        """Return no rows: which ones a step takes is known only when they are read."""
        return []

    def largest(self, lengths: Lengths) -> tuple[int, int]:
        """Tokens and views of the largest micro-batch, estimated from the lengths of sampled rows, for the memory estimate."""
        tokens, views = (int(self.batch_size_per_gpu * size.max()) for size in (lengths.tokens, lengths.views))
        return tokens, views

    def __iter__(self) -> Iterator[list[Row | None]]:
        resumed_epoch, done = self._done
        done = done if self.epoch == resumed_epoch else 0
        yield from ([] for _ in range(done))
        rows = self.stream.rows(self.seed, self.epoch, self.rank, self.world_size, done * self.batch_size_per_gpu)
        for _ in range(done, len(self)):
            yield list(islice(rows, self.batch_size_per_gpu)) or [None]


class StreamedData(torch.utils.data.Dataset):
    """Encoded conversations, indexed by :class:`Row`; see :class:`common.data.samples.TrainingData` for the parameters."""

    place = "row {}".format

    def __init__(self, rows: Stream, to_conversation: ToConversation, processor: Phi3VProcessor, seed: int) -> None:
        self.rows, self.to_conversation, self.processor, self.seed = rows, to_conversation, processor, seed

    def __len__(self) -> int:
        return len(self.rows)

    def sample_lengths(self) -> Lengths:
        """Check and measure the first rows."""
        data = TrainingData(self.rows.peek(), self.to_conversation, self.processor, self.seed)
        for index in range(len(data)):
            with converting(data.place(index)):
                conversation = data.conversation(0, index)
            check_conversation(conversation, data.place(index))
        return data.sample_lengths()

    def __getitem__(self, row: Row | None) -> dict[str, Any]:
        if row is None:
            return filler(self.processor)  # this process has no remaining rows, but collectives must still match
        with converting(row.place):
            conversation = self.to_conversation(row.content, random.Random(f"{self.seed}/{row.epoch}/{row.number}"))
        check_conversation(conversation, row.place)
        try:
            for picture in pictures(conversation):
                check_picture(picture)  # without streaming, this is done before training
            sample = encode_conversation(conversation, self.processor)
        except InputError as error:
            raise error.at(row.place) from None
        return sample | {"place": row.place}


def training_data(
    rows: Rows | Stream, to_conversation: ToConversation, processor: Phi3VProcessor, seed: int
) -> TrainingData | StreamedData:
    """Return the samples of rows; the parameters are those of :class:`common.data.samples.TrainingData`."""
    if isinstance(rows, Stream):
        return StreamedData(rows, to_conversation, processor, seed)
    return TrainingData(rows, to_conversation, processor, seed)


def _slice_spans(spans: list[Span], begin: int, end: int) -> list[Span]:
    """Rows ``begin`` to ``end`` of the concatenated spans."""
    kept, passed = [], 0
    for span in spans:
        start, stop = max(span.start, span.start + begin - passed), min(span.stop, span.start + end - passed)
        if start < stop:
            kept.append(span._replace(start=start, stop=stop))
        passed += span.stop - span.start
    return kept
