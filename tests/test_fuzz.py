"""Damaged input files of every kind: each is read correctly, or refused with an InputError, within seconds.

FUZZ_INPUTS sets the number of inputs; by default some 500, always the same.
"""

import copy
import io
import itertools
import json
import random
import shutil
import tarfile
from argparse import Namespace
from functools import partial

import datasets
import pytest
from adapters import save_adapter
from broken_files import broken, damaged, fuzz, parquet, read, stored_picture
from clips import write_clip
from conftest import ROOT, TINY
from huggingface_hub import save_torch_state_dict
from hypothesis import strategies as st
from PIL import Image
from report_runs import make_run
from runs import save_checkpoint
from safetensors.torch import load_file

import convert_ucf101
import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as memes
import finetune_hf_trainer_nlvr2 as nlvr2
from common import arguments
from common.data import conversations, shards
from common.data.checks import check_rows
from common.data.pictures import FORMATS, check_picture, decode_picture, picture_size
from common.data.reading import parse_conversation
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.sources import find_image_dir, load_conversations, load_hub, read_rows
from common.data.streaming import StreamedData
from common.model import checkpoint
from common.model.checkpoint import load_processor
from common.model.inference import attach_adapter, find_adapter, find_base, load_base, load_full
from common.report.model_card import write_model_card
from common.report.page import write_report
from common.report.run import FILES
from common.runtime.process import InputError
from common.training.checkpoints import write_manifest
from common.training.deepspeed import choose_deepspeed, zero_stage
from common.training.resuming import check_plan, find_checkpoint

KEYS = ["rope_parameters", "head_dim", "quantization_config", "return_dict", "to_dict", "attribute_map", "num_labels", "dtype"]

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, adapters and runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(random_model, tmp_path):
    """A copy of the random checkpoint."""
    return shutil.copytree(random_model, tmp_path / "model")


@pytest.fixture(scope="module")
def adapter(random_model, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "lora", "--use_lora", base=random_model)


@pytest.fixture(scope="module")
def answering(random_model):
    return load_full(str(random_model), "cpu")


def answer(model, processor):
    """Generate a token, which must be possible with any checkpoint that is not refused."""
    prompt = processor.tokenizer.apply_chat_template([{"role": "user", "content": "Aa?"}], tokenize=False)
    return model.generate(**processor(prompt), max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("config.json", 0.08),
        ("generation_config.json", 0.02),
        ("tokenizer_config.json", 0.04),
        ("tokenizer.json", 0.04),
        ("preprocessor_config.json", 0.04),
        ("processor_config.json", 0.02),
        ("model.safetensors.index.json", 0.03),
    ],
)
def test_a_file_of_a_checkpoint(name, share, directory):
    if name == "model.safetensors.index.json":
        whole = load_file(directory / "model.safetensors")
        save_torch_state_dict(whole, directory, max_shard_size=sum(tensor.nbytes for tensor in whole.values()) // 2)
    content = json.loads((directory / name).read_text(encoding="utf-8"))

    def check(text):
        (directory / name).write_bytes(text)
        if (loaded := read(lambda: load_full(str(directory), "cpu"))) is not None:
            answer(loaded, load_processor(str(directory)))

    fuzz(check, broken(content, KEYS if name == "config.json" else ()), share)


def test_a_chat_template(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "TEMPLATE_SECONDS", 1)
    file = directory / "chat_template.jinja"
    whole = file.read_bytes()
    file.write_bytes(whole + b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(InputError, match="the chat template takes more than 1 s"):
        load_processor(str(directory))

    def check(text):
        file.write_bytes(text)
        read(lambda: load_processor(str(directory)))

    fuzz(check, damaged(whole) | st.just(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), 0.02)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_weights(name, directory, adapter, answering, tmp_path):
    if name.startswith("adapter"):
        directory = shutil.copytree(adapter, tmp_path / "adapter")
    whole = (directory / name).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")  # of the header

    def check(text):
        (directory / name).write_bytes(text + whole[length:])
        if name.startswith("adapter"):
            read(lambda: attach_adapter(copy.deepcopy(answering), directory))
        else:
            read(lambda: load_full(str(directory), "cpu"))

    fuzz(check, damaged(whole[:length]), 0.035)


@pytest.mark.parametrize(("name", "share"), [("adapter_config.json", 0.05), ("base_model.json", 0.03)])
def test_a_file_of_an_adapter(name, share, random_model, adapter, answering, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "adapter")
    content = json.loads((directory / name).read_text(encoding="utf-8"))

    def check(text):
        (directory / name).write_bytes(text)
        if name == "base_model.json":
            read(lambda: load_base(directory, "cpu", base=str(random_model)))
            return
        arguments.adapter_settings(str(directory))
        if found := read(lambda: find_adapter(directory)):
            read(lambda: find_base(found))
            read(lambda: attach_adapter(copy.deepcopy(answering), found))

    fuzz(check, broken(content, ["megatron_config", "layer_replication"] if name == "adapter_config.json" else ()), share)


@pytest.mark.parametrize("name", ["complete.json", "trainer_state.json", "totals.json"])
def test_a_file_of_a_resumed_checkpoint(name, tmp_path):
    directory = tmp_path / "checkpoint-4"
    save_checkpoint(directory, data="4 rows", steps=6)
    content = json.loads((directory / name).read_text())

    def check(text):
        (directory / name).write_bytes(text)
        if name != "complete.json":
            write_manifest(directory)
        outcome = read(lambda: find_checkpoint("auto", tmp_path, {"data": "4 rows"}, []))
        assert outcome is None or any(outcome)
        if outcome and outcome[0]:
            read(lambda: check_plan(directory, {"data": "4 rows", "steps": 6}, []))

    fuzz(check, broken(content, ["../a", "/dev/zero", "new"]), 0.03)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_run(name, tmp_path):
    make_run(tmp_path, "UCF-101", samples=4, steps=3)
    content = json.loads((tmp_path / name).read_text(encoding="utf-8"))

    def check(text):
        (tmp_path / name).write_bytes(text)
        read(lambda: write_report([tmp_path], tmp_path / "report.html"))
        read(lambda: write_model_card(tmp_path))

    fuzz(check, broken(content, ["accuracy_per_class", "datasets"]), 0.004)


def test_a_deepspeed_file(tmp_path):
    content = json.loads((ROOT / "common/deepspeed/zero2_offload.json").read_text())
    file = tmp_path / "zero.json"
    flags = Namespace(deepspeed=file, optim="adamw_torch", use_lora=False, use_qlora=False, torch_compile=False)

    def check(text):
        file.write_bytes(text)
        path = read(lambda: choose_deepspeed(flags))
        assert path is None or zero_stage(path) in range(4)

    fuzz(check, broken(content, ["optimizer"]), 0.06)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------

ROW = {"id": "1", "conversations": [{"images": ["a.png"], "user": "What?", "assistant": "A."}, {"user": "B", "assistant": "C"}]}
LLAVA = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nB"}, {"from": "gpt", "value": "C"}]}
PARTS = [
    {"type": "image", "image": "a.png"},
    {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "text", "text": "B"},
]
SAID = [{"role": "system", "content": "S"}, {"role": "user", "content": PARTS}, {"role": "assistant", "content": "C"}]
TABLE = b'id,image,question,answer\n1,a.png,"What, now?",A.\n2,,B,"C ""D"" E"\n'


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(TINY), num_crops=1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the image of the rows, and with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("row", "share"), [(ROW, 0.06), (LLAVA, 0.03), ({"messages": SAID}, 0.05)], ids=["general", "llava", "messages"]
)
def test_a_row(row, share, processor, monkeypatch):
    monkeypatch.setattr(conversations, "count_image_tokens", lambda images, processor: [2] * len(images))

    def check(line):
        if found := read(lambda: parse_conversation(line, "train.jsonl, line 1")):
            conversations.encode_conversation(found, processor)

    fuzz(check, broken(row), share)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("train.jsonl", broken(ROW).map(lambda line: line + b"\n" + json.dumps(ROW).encode())),
        ("train.json", broken([ROW, LLAVA])),
        ("train.csv", damaged(TABLE)),
    ],
)
def test_a_file_of_conversations(name, texts, folder):
    def check(text):
        (folder / name).write_bytes(text)
        rows = read(lambda: load_conversations(folder / name, find_image_dir(folder / name), bar=False))
        assert rows is None or list(rows)

    fuzz(check, texts, 0.03)


def take_all(rows, to_conversation, processor):
    """Encode all rows as a run does."""
    if isinstance(rows, Rows):
        check_rows(rows, lambda row: [to_conversation(row, random.Random(0))], "row", bar=False)
        data = TrainingData(rows, to_conversation, processor, seed=0)
        return [data[0, number] for number in range(len(rows))]
    data = StreamedData(rows, to_conversation, processor, seed=0)
    return [data[row] for row in rows.rows(0, 0)]


def test_a_shard(folder, processor):
    images = [{"bytes": "PNG", "path": None}, {"bytes": None, "path": "a.png"}]
    row = {"id": "1", "conversations": [{"images": images, "user": "B", "assistant": "C"}]}

    def check(content):
        (folder / "a.parquet").write_bytes(content)
        shards._open_parquet.cache_clear()
        read(lambda: take_all(shards.stream_conversations(folder / "a.parquet", folder), lambda row, _: row, processor))

    fuzz(check, parquet(row), 0.03)


@pytest.mark.parametrize("load", [load_hub, shards.stream_hub])
@pytest.mark.parametrize(
    ("convert", "to_conversation"),
    [
        (docvqa.from_full, docvqa.to_conversation),
        (memes.from_hub, memes.to_conversation),
        (nlvr2.from_hub, nlvr2.to_conversation),
    ],
    ids=["docvqa", "hateful_memes", "nlvr2"],
)
def test_a_dataset_of_the_hub(load, convert, to_conversation, folder, processor):
    row = {"images": [{"bytes": "PNG", "path": None}], "texts": [{"user": "B", "assistant": "Yes."}]}
    numbers = itertools.count()

    def check(content):
        hub = folder / f"hub{next(numbers)}"
        hub.mkdir()
        (hub / "train.parquet").write_bytes(content)
        read(lambda: take_all(load(str(hub), columns=["images", "texts"]).map(convert), to_conversation, processor))

    fuzz(check, parquet(row), 0.008)


NLVR2_ROW = {"identifier": "dev-1-0-0", "sentence": "S.", "label": "True", "directory": 1}


@pytest.mark.parametrize(
    ("script", "row", "to_row", "field"),
    [
        (
            docvqa,
            {"data": [{"questionId": 1, "question": "Q?", "image": "a.png", "answers": ["A", "B"]}]},
            docvqa.from_official,
            "data",
        ),
        (memes, {"id": 7, "img": "a.png", "label": 1, "text": "t"}, memes.from_official, None),
        (nlvr2, NLVR2_ROW, lambda folder, row: nlvr2.from_official(folder, "train", row), None),
    ],
    ids=["docvqa", "hateful_memes", "nlvr2"],
)
def test_an_official_release(script, row, to_row, field, folder):
    def check(text):
        (folder / "rows").write_bytes(text)
        rows = read(lambda: read_rows(folder / "rows", "the data", partial(to_row, folder), None, False, field))
        for found in rows or ():
            conversation = json.dumps(script.to_conversation(found, random.Random(0))).encode()
            read(lambda conversation=conversation: parse_conversation(conversation, "1"))

    fuzz(check, broken(row), 0.03)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture(kind):
    def check(content):
        picture = {"bytes": content, "path": None}
        read(lambda: check_picture(picture))
        if decoded := read(lambda: decode_picture(picture)):
            assert decoded.size == picture_size(picture)

    fuzz(check, damaged(stored_picture(kind)), 0.012)


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_an_archive(compression, tmp_path):
    write_clip(tmp_path / "clip.avi", 2)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode=f"w:{compression}") as archive:
        for split in convert_ucf101.SPLITS:
            archive.add(tmp_path / "clip.avi", f"ucf/{split}/Run/a.avi")

    def convert(path):
        with convert_ucf101.open_source(path, tmp_path / "out") as files:
            return [read_clip() for read_clip in convert_ucf101.find_clips(files, path).values()]

    def check(content):
        (tmp_path / "a.tar").write_bytes(content)
        read(lambda: convert(tmp_path / "a.tar"))

    fuzz(check, damaged(plain.getvalue()), 0.02)
