"""--streaming: every row once per epoch, exact resuming, errors that name shard and row."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from forked import finetune_forked
from PIL import Image
from runs import message, weights
from torch.utils.data import DataLoader, Dataset
from transformers import AutoProcessor

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_jsonl as jsonl
import finetune_hf_trainer_nlvr2 as nlvr2
from common.data import shards, streaming
from common.data.collator import Collator
from common.data.shards import stream_conversations, stream_hub
from common.data.streaming import Stream, StreamedBatches, StreamedData
from common.runtime.process import InputError

SCRIPT = "finetune_hf_trainer_jsonl.py"
# A GIF of one pixel.
PICTURE = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(shards, "LINES_PER_BLOCK", 4)
    monkeypatch.setattr(streaming, "ROWS_PER_WINDOW", 7)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=1)


def line(number):
    turn = {"user": f"Number {number}?" + " Say it." * (number % 4), "assistant": str(1000 + 37 * number)}
    return json.dumps({"id": str(number), "conversations": [turn]}) + "\n"


def write_lines(folder, rows, count):
    """Write rows to shards of unequal lengths, with blank lines between them."""
    ends = [rows * (number + 1) ** 2 // count**2 for number in range(count)]
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        (folder / f"train-{number}.jsonl").write_text("\n".join(line(row) for row in range(begin, end)))
    return folder / "train-*.jsonl"


def write_table(path, rows, rows_per_group=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)


class Numbers(Dataset):
    """Epoch and number of each row."""

    def __getitem__(self, row):
        return row and (row.epoch, int(row.content["id"]))


def read(stream, rank=0, world_size=1, workers=0, epochs=1, batch_size=12, per_gpu=2):
    """Batches of a process per epoch, from a loader with persistent workers."""
    batches = StreamedBatches(stream, batch_size, per_gpu, 7, rank, world_size)
    loader = DataLoader(
        Numbers(), batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0, collate_fn=lambda rows: rows
    )
    made = []
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        made.append(list(loader))
        assert len(made[-1]) == len(batches)
    return made


def ends_of_steps(world_size):
    accumulation = 12 // (2 * world_size)
    return [(step * accumulation, (step + 1) * accumulation) for step in range(5)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_every_row_once_an_epoch(count, world_size, tmp_path, small_blocks):
    stream = stream_conversations(write_lines(tmp_path, 53, count), tmp_path)
    assert len(stream) == 53
    processes = [read(stream, rank, world_size, epochs=2) for rank in range(world_size)]
    orders = []
    for epoch in range(2):
        taken = [row for made in processes for batch in made[epoch] for row in batch if row is not None]
        assert sorted(taken) == [(epoch, number) for number in range(53)]
        orders.append([number for _, number in taken])
        steps = [[batch for made in processes for batch in made[epoch][begin:end]] for begin, end in ends_of_steps(world_size)]
        assert [sum(row is not None for batch in step for row in batch) for step in steps] == [12] * 4 + [5]
        assert all(batch == [None] or None not in batch for step in steps for batch in step)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


def test_workers_give_the_same_batches(tmp_path, small_blocks):
    stream = stream_conversations(write_lines(tmp_path, 53, 3), tmp_path)
    assert read(stream, 1, 2, workers=2, epochs=2) == read(stream, 1, 2, workers=0, epochs=2)


def test_each_process_reads_only_its_own_blocks(tmp_path, small_blocks):
    """Two shards, two processes: they share at most the block in which one's rows end and the other's begin."""
    stream = stream_conversations(write_lines(tmp_path, 53, 2), tmp_path)
    opened = []
    original, stream.read = stream.read, lambda span: opened.append((span.shard, span.position)) or original(span)
    first = list(stream.rows(7, 0, 0, 2))
    blocks_of_first, opened[:] = set(opened), []
    second = list(stream.rows(7, 0, 1, 2))
    assert [len(first), len(second)] == [26, 27]
    assert len(blocks_of_first & set(opened)) <= 1


@pytest.mark.parametrize("step", [0, 1, 4, 8, 9])
def test_a_resumed_epoch_does_not_read_finished_rows_again(step, tmp_path, small_blocks):
    stream = stream_conversations(write_lines(tmp_path, 53, 2), tmp_path)
    whole = StreamedBatches(stream, 6, 1, 7, rank=1, world_size=2)
    rest = StreamedBatches(stream, 6, 1, 7, rank=1, world_size=2)
    rest.begin_at(len(whole) // 3 + step)
    whole.set_epoch(1)
    rest.set_epoch(1)
    expected = list(whole)
    opened = []
    original, stream.read = stream.read, lambda span: opened.append(span) or original(span)
    resumed = list(rest)
    epoch, done = divmod(step, 9)
    if epoch:  # the second epoch is finished
        assert resumed == expected
    else:
        assert resumed == [[]] * (3 * done) + expected[3 * done :]
        assert len(opened) <= -(-(27 - 3 * done // 7 * 7) // 4) + 2


def test_rows_keep_their_numbers_and_places(tmp_path, small_blocks):
    stream = stream_conversations(write_lines(tmp_path, 12, 2), tmp_path, limit=10)
    rows = sorted(stream.rows(0, 0), key=lambda row: row.number)
    assert [int(row.content["id"]) for row in rows] == [row.number for row in rows] == list(range(10))
    assert rows[0].place == f"{tmp_path}/train-0.jsonl, line 1"
    assert rows[1].place == f"{tmp_path}/train-0.jsonl, line 3", "blank lines count as lines"
    assert rows[3].place == f"{tmp_path}/train-1.jsonl, line 1"


def test_random_choices_depend_only_on_seed_epoch_and_row(tmp_path, processor):
    stream = stream_conversations(write_lines(tmp_path, 8, 1), tmp_path)

    def to_conversation(row, rng):
        turn = {"user": row["id"], "assistant": str(rng.randrange(10**6))}
        return {"conversations": [turn]}

    data = StreamedData(stream, to_conversation, processor, seed=3)
    together = {row.number: data[row]["input_ids"] for row in stream.rows(3, 1)}
    apart = {row.number: data[row]["input_ids"] for rank in range(3) for row in stream.rows(3, 1, rank, 3)}
    later = {row.number: data[row]["input_ids"] for row in stream.rows(3, 2)}
    assert together == apart and together != later


def test_fillers_have_no_labels(tmp_path, processor):
    data = StreamedData(stream_conversations(write_lines(tmp_path, 1, 1), tmp_path), lambda row, rng: row, processor, seed=0)
    batch = Collator(processor, packing=True)([data[None]])
    assert (batch["labels"] == -100).all() and batch["input_ids"].numel() > 0
    real = [rows for rank in range(2) for rows in StreamedBatches(data.rows, 2, 1, 0, rank, 2)]
    assert sorted(row is None for rows in real for row in rows) == [False, True], "more processes than rows"


def test_parquet_of_the_general_format_contains_its_images(tmp_path, processor):
    Image.new("RGB", (40, 30), "navy").save(tmp_path / "a.png")
    stored = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [
        {"id": str(number), "conversations": [{"images": [stored], "user": f"Colour {number}?", "assistant": "Navy."}]}
        for number in range(8)
    ]
    write_table(tmp_path / "train-0.parquet", rows[:5])
    write_table(tmp_path / "train-1.parquet", rows[5:])
    stream = stream_conversations(tmp_path / "train-*.parquet", tmp_path)
    data = StreamedData(stream, jsonl.to_conversation, processor, seed=0)
    taken = list(stream.rows(0, 0, 0, 2)) + list(stream.rows(0, 0, 1, 2))
    assert sorted(row.content["id"] for row in taken) == [str(number) for number in range(8)]
    assert all(data[row]["images"] == [stored] for row in taken)


def test_names_in_parquet_do_not_leave_the_image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("secret.png", "images/a.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    for name in ("a.png", str(tmp_path / "secret.png")):
        turn = {"images": [{"bytes": None, "path": name}], "user": "What?", "assistant": "That."}
        write_table(tmp_path / "a.parquet", [{"id": "1", "conversations": [turn]}])
        shards._open_parquet.cache_clear()
        stream = stream_conversations(tmp_path / "a.parquet", tmp_path / "images")
        if name == "a.png":
            [row] = stream.rows(0, 0)
            assert row.content["conversations"][0]["images"] == [str(tmp_path / "images/a.png")]
        else:
            with pytest.raises(InputError, match=r"a.parquet, row 0: image .* is outside"):
                list(stream.rows(0, 0))


def test_images_are_found_beside_each_shard(tmp_path):
    row = {"conversations": [{"images": ["a.png"], "user": "What?", "assistant": "That."}]}
    for name in ("one[1]", "two"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "two/a.png").touch()
    stream = stream_conversations([tmp_path / "one[1]/a.jsonl", tmp_path / "two/*.jsonl"], None)
    images = [row.content["conversations"][0]["images"] for row in stream.rows(0, 0)]
    assert sorted(images) == [[f"{tmp_path}/one[1]/images/a.png"], [f"{tmp_path}/two/a.png"]]


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.jsonl", os.mkfifo, "a.jsonl is not a file"),
        ("a.jsonl", os.mkdir, "a.jsonl is not a file"),
        ("train-*.jsonl", lambda path: None, r"train-\*.jsonl is missing"),
        ("empty.jsonl", lambda path: path.write_text("\n"), "empty.jsonl: no rows"),
        ("cut.parquet", lambda path: path.write_bytes(b"PAR1"), "cut.parquet cannot be read as a Parquet file"),
        ("a.parquet", lambda path: write_table(path, [{"text": "?"}]), "a.parquet has no column conversations"),
        ("a.csv", lambda path: path.write_text("image,question,answer\n"), "a.csv: CSV is not streamed: use JSON Lines or"),
        ("a.json", lambda path: path.write_text(" [{}]"), "a.json: JSON arrays are not streamed: use JSON Lines or Parquet"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(name, make, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        stream_conversations(tmp_path / name, tmp_path)


def test_a_dataset_of_the_hub_without_parquet(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has no Parquet files to stream"):
        stream_hub(str(tmp_path), columns=["a"])


def test_damage_within_a_shard_is_named(tmp_path):
    write_table(tmp_path / "a.parquet", [json.loads(line(number)) for number in range(500)], rows_per_group=500)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :])
    with pytest.raises(InputError, match=r"a.parquet cannot be read as a Parquet file .*download or write it again"):
        list(stream_conversations(tmp_path / "a.parquet", tmp_path).rows(0, 0))
    rows = [json.loads(line(number)) for number in range(8)]
    rows[4]["conversations"][0]["user"] = ""
    write_table(tmp_path / "b.parquet", rows)
    with pytest.raises(InputError, match='b.parquet, row 4, turn 1: "user" must be'):
        list(stream_conversations(tmp_path / "b.parquet", tmp_path).rows(0, 0))
    stream = stream_conversations(write_lines(tmp_path, 8, 1), tmp_path)
    (tmp_path / "train-0.jsonl").unlink()
    with pytest.raises(InputError, match=r"train-0.jsonl cannot be read"):
        list(stream.rows(0, 0))


def test_a_shard_that_is_truncated_during_the_run_is_named(tmp_path, small_blocks):
    pattern = write_lines(tmp_path, 30, 1)
    stream = stream_conversations(pattern, tmp_path)
    shard = tmp_path / "train-0.jsonl"
    shard.write_text("\n".join(shard.read_text().splitlines()[:55]))
    with pytest.raises(InputError, match=f"{shard}: has fewer rows than when the run began: restore it"):
        read(stream)


def test_a_missing_or_truncated_image_is_named_with_its_row(tmp_path, processor):
    row = {"conversations": [{"images": ["no.png"], "user": "What?", "assistant": "That."}]}
    (tmp_path / "a.jsonl").write_text(line(0) + json.dumps(row) + "\n")
    stream = stream_conversations(tmp_path / "a.jsonl", tmp_path)
    data = StreamedData(stream, jsonl.to_conversation, processor, seed=0)
    with pytest.raises(ValueError, match="a.jsonl, line 2: image .*no.png is missing"):
        [data[row] for row in stream.rows(0, 0)]
    Image.effect_noise((90, 90), 50).save(tmp_path / "no.png")
    (tmp_path / "no.png").write_bytes((tmp_path / "no.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match="a.jsonl, line 2: image .*no.png cannot be decoded"):
        [data[row] for row in stream.rows(0, 0)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Two Parquet shards in the layout of the_cauldron, with two questions per row, in place of the Hub."""
    (tmp_path / "hub").mkdir()
    rows = []
    for number in range(510):
        texts = [{"user": f"{number}.{text}?", "assistant": ("Yes.", "No.")[number % 2]} for text in (0, 1)]
        rows.append({"images": [{"bytes": PICTURE, "path": None}], "texts": texts})
    write_table(tmp_path / "hub/train-00000-of-00002.parquet", rows[:300], rows_per_group=100)
    write_table(tmp_path / "hub/train-00001-of-00002.parquet", rows[300:], rows_per_group=100)
    return str(tmp_path / "hub")


def load(args, script):
    return script.load_train_rows(args), script.load_eval_rows(args)


def questions(stream):
    """Questions of the Hub's rows."""
    return sorted(text["user"] for row in Stream(stream.spans, stream.read).rows(0, 0) for text in row.content["texts"])


def test_hateful_memes_from_the_hub(hub, monkeypatch, parse):
    monkeypatch.setattr(hateful_memes, "HUB", (hub,))
    train_rows, eval_rows = load(parse(hateful_memes, "--streaming"), hateful_memes)
    assert len(train_rows) == 10 and questions(train_rows)[0] == "500.0?" and len(eval_rows) == 500
    turn = {"images": [{"bytes": PICTURE, "path": None}], "user": hateful_memes.QUESTION, "assistant": "No."}
    assert hateful_memes.to_conversation(eval_rows[1]) == {"conversations": [turn]}
    limited = parse(hateful_memes, "--streaming", "--max_train_samples", 3)
    assert [len(rows) for rows in load(limited, hateful_memes)] == [3, 500]


def test_nlvr2_from_the_hub_trains_on_every_question(hub, monkeypatch, parse):
    monkeypatch.setattr(nlvr2, "HUB", (hub,))
    train_rows, eval_rows = load(parse(nlvr2, "--streaming", "--max_eval_samples", 4), nlvr2)
    assert questions(train_rows) == [f"{number}.{text}?" for number in range(500, 510) for text in (0, 1)]
    for row in train_rows.rows(0, 0):
        number = row.content["question"].partition(".")[0]
        assert row.place == f"{hub}, train, row {number}", "the number in the data set, not in the shard"
    assert [row["question"] for row in eval_rows] == ["0.0?", "1.0?", "2.0?", "3.0?"]
    row = next(train_rows.rows(0, 0))
    asked = nlvr2.to_conversation(row.content)["conversations"][0]
    assert asked["user"] == row.content["question"] and asked["images"] == row.content["images"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "row 1: fields are missing"), ([{"user": "<|image_2|>", "assistant": "A"}], "row 1: the text's")],
)
def test_an_invalid_row_at_the_beginning_is_named_before_training(texts, message, tmp_path, processor):
    (tmp_path / "hub").mkdir()
    rows = [{"images": [{"bytes": PICTURE, "path": None}], "texts": [{"user": "What?", "assistant": "That."}]}] * 3
    write_table(tmp_path / "hub/train.parquet", [rows[0], rows[1] | {"texts": texts}, rows[2]])
    stream = stream_hub(str(tmp_path / "hub"), columns=["images", "texts"]).map(docvqa.from_full)
    data = StreamedData(stream, docvqa.to_conversation, processor, seed=0)
    with pytest.raises(InputError, match=f"hub, train, {message}"):
        data.sample_lengths()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three shards with 13 rows, half of them with an image."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "images").mkdir()
    rows = []
    for number in range(13):
        row = json.loads(line(number))
        if number % 2:
            Image.new("RGB", (60 + 9 * number, 50), (19 * number, 0, 90)).save(folder / "images" / f"{number}.png")
            row["conversations"][0]["images"] = [f"{number}.png"]
        rows.append(json.dumps(row) + "\n")
    for number, (begin, end) in enumerate([(0, 1), (1, 9), (9, 13)]):
        (folder / f"train-{number}.jsonl").write_text("".join(rows[begin:end]))
    (folder / "val.jsonl").write_text("".join(rows[:2]))
    return folder


OPTIONS = {"script": SCRIPT, "streaming": True, "train_file": "train-*.jsonl", "eval_file": "val.jsonl"}
OPTIONS |= {"max_steps": None, "deepspeed": "none"}


@pytest.mark.slow
def test_a_resumed_run_gives_the_result_of_an_uninterrupted_one(data, random_model, tmp_path):
    """LoRA with dropout, two epochs of four steps, the last of one sample on one process; resumed within the second epoch."""
    options = OPTIONS | {"model_name_or_path": random_model, "num_train_epochs": 2}
    options |= {"save_strategy": "steps", "save_steps": 6, "batch_size_per_gpu": 1}
    options |= {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1}
    log = finetune_forked(data, tmp_path / "straight", **options)
    assert [entry["step"] for entry in log] == list(range(1, 9))
    shutil.copytree(tmp_path / "straight/checkpoint-6", tmp_path / "resumed/checkpoint-6")
    assert finetune_forked(data, tmp_path / "resumed", resume_from_checkpoint="auto", **options) == log
    before, after = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_fillers_do_not_change_loss_and_gradient(data, random_model, tmp_path):
    """Three rows in steps of four: two processes, one of which has a filler, give what one process gives."""
    options = OPTIONS | {"model_name_or_path": random_model, "max_train_samples": 3, "num_train_epochs": 1}
    apart = finetune_forked(data, tmp_path / "apart", processes=2, batch_size_per_gpu=1, **options)
    together = finetune_forked(data, tmp_path / "together", processes=1, batch_size_per_gpu=4, **options)
    for one, other in zip(apart, together, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_flags_that_contradict_streaming(monkeypatch, tmp_path):
    said = message(monkeypatch, tmp_path, tmp_path, SCRIPT, streaming=True, max_tokens_per_batch=900)
    assert "--max_tokens_per_batch requires the lengths of all rows" in said
