"""Training samples: their lengths, measured once, are those of the encoded samples."""

import io
import json

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from conftest import TINY
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

from common.data import samples
from common.data.batches import PlannedBatches, epoch_steps
from common.data.collator import Collator, load_crops
from common.data.loader import WorkerLoader
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.sources import load_conversations
from common.data.streaming import Row, StreamedData


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=4)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(samples, "ROWS_AT_ONCE", 16)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations with one or two turns and up to four images, more than are measured at once."""
    folder = tmp_path_factory.mktemp("pictures")
    names = []
    for number in range(5):
        names.append(str(folder / f"{number}.png"))
        Image.new("RGB", (100 + 200 * number, 500 - 100 * number)).save(names[-1])
    rows = []
    for number in range(24):
        own = [names[(number + index) % 5] for index in range(number % 4)]
        turns = [{"images": own, "user": "What is it? " * (number % 7 + 1), "assistant": f"Number {number}."}]
        if number % 3 == 0:
            turns.append({"images": names[:1], "user": "And this\n?", "assistant": "Ünï…"})
        if number % 4 == 2 and len(turns) == 1:
            turns[0]["user"] = "First <|image_2|> and <|image_1|>, then <|image_2|> again: which?"
        rows.append({"conversations": turns})
    return rows


def as_it_is(row, rng):
    return row


def drawing(row, rng):
    """Every second row draws its last answer."""
    turns = [dict(turn) for turn in row["conversations"]]
    if len(turns[0]["assistant"]) % 2:
        turns[-1]["assistant"] = "word " * rng.randint(1, 50)
    return {"conversations": turns}


def encoded(data, epoch):
    """Tokens and views of the encoded samples."""
    found = [data[epoch, row] for row in range(len(data))]
    loaded = [load_crops(s["images"], 4) if s["images"] else ([], torch.empty(0, 2)) for s in found]
    # An image of one crop is its own global view.
    views = [len(crops) + sum(size != [336, 336] for size in sizes.tolist()) for crops, sizes in loaded]
    return [len(s["input_ids"]) for s in found], views


def test_lengths_are_those_of_the_encoded_samples(rows, processor):
    data = TrainingData(Rows(Dataset.from_list(rows), str), drawing, processor, seed=3)
    for epoch in (0, 1):
        lengths = data.lengths(epoch)
        tokens, views = encoded(data, epoch)
        assert lengths.tokens.tolist() == tokens
        assert lengths.views.tolist() == views
    assert not np.array_equal(data.lengths(0).tokens, data.lengths(1).tokens)


def test_rows_without_random_choices_are_measured_once(rows, processor):
    asked = []

    def to_conversation(row, rng):
        asked.append(row)
        return drawing(row, rng)

    data = TrainingData(Rows(rows, str), to_conversation, processor, seed=3)
    first = data.lengths(0)
    assert asked == rows
    asked.clear()
    second = data.lengths(1)
    draws = [len(row["conversations"][0]["assistant"]) % 2 == 1 for row in rows]
    assert asked == [row for row, draw in zip(rows, draws, strict=True) if draw]
    assert not np.any(first.tokens != second.tokens, where=np.logical_not(draws)) and first.tokens is not second.tokens


def test_lengths_are_kept_until_an_image_changes(processor, tmp_path, own_cache):
    Image.new("RGB", (100, 90)).save(tmp_path / "a.png")
    row = {"conversations": [{"images": ["a.png"], "user": "What?", "assistant": "That."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    asked = []

    def to_conversation(row, rng):
        asked.append(row["id"])
        return row

    def measured():
        asked.clear()
        data = TrainingData(load_conversations(tmp_path / "data.jsonl", tmp_path), to_conversation, processor, 0)
        lengths = data.lengths(0)
        assert isinstance(data._measured, np.memmap)  # which data workers share
        return lengths

    first, again = measured(), measured()
    assert first.tokens == again.tokens and not asked
    processor.image_processor.num_crops = 2
    measured()
    assert asked
    processor.image_processor.num_crops = 4
    Image.new("RGB", (900, 90)).save(tmp_path / "a.png")
    assert measured().tokens != first.tokens and asked


def test_a_resumed_epoch_reads_only_what_is_left(rows, processor):
    read = []

    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    data = TrainingData(Rows(Counted(rows), str), as_it_is, processor, seed=3)
    batches = PlannedBatches(len(rows), 4, seed=3, rank=0, world_size=1, accumulation=2, measure=data.measure)
    batches.begin_at(3)
    loader = skip_first_batches(WorkerLoader(data, Collator(processor, packing=True), batch_sampler=batches), 6)
    assert len(list(loader)) == len(batches) - 6
    left = epoch_steps(len(rows), 4, seed=3, epoch=0)[3:].flatten().tolist()
    assert sorted(read) == sorted(2 * left)  # measured and encoded


def test_an_invalid_row_is_named(rows, processor, tmp_path):
    tagged = {"conversations": [{"images": [], "user": "See <|image_1|>?", "assistant": "No."}]}
    with pytest.raises(ValueError, match=r"^row 20: the text's image tags"):
        TrainingData(Rows([*rows[:20], tagged], "row {}".format), as_it_is, processor, seed=0).lengths(0)
    gone = {"conversations": [{"images": [str(tmp_path / "gone.png")], "user": "See?", "assistant": "No."}]}
    with pytest.raises(ValueError, match=r"^row 2: image .*gone\.png is missing"):
        TrainingData(Rows([*rows[:2], gone], "row {}".format), as_it_is, processor, seed=0).lengths(0)


def test_a_damaged_image_is_named_by_its_row(processor):
    """Only decoding detects the damage; in map-style and streamed rows."""
    file = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    turn = {"images": [{"bytes": bytes(content), "path": None}], "user": "See?", "assistant": "No."}
    text = {"conversations": [turn | {"images": []}]}
    damaged = {"conversations": [turn]}
    kinds = {
        "mine, row 1": lambda: TrainingData(Rows([text, damaged], "mine, row {}".format), as_it_is, processor, 0)[0, 1],
        "a.parquet, row 8": lambda: StreamedData(None, as_it_is, processor, 0)[Row(0, 1, "a.parquet, row 8", damaged)],
    }
    for place, sample in kinds.items():
        good = TrainingData(Rows([text], str), as_it_is, processor, 0)[0, 0]
        with pytest.raises(ValueError, match=f"^{place}: an image stored in the dataset cannot be decoded"):
            Collator(processor)([good, sample()])
