"""Damaged input files of every kind: each is read correctly, or refused with an InputError, within seconds.

FUZZ_INPUTS sets the number of inputs; by default some 500, always the same.
"""

import copy
import io
import itertools
import json
import os
import random
import shutil
import signal
import tarfile
from argparse import Namespace
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from adapters import save_adapter
from clips import write_clip
from conftest import ROOT, TINY
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
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
from common.data import shards
from common.data.checks import check_rows
from common.data.conversations import encode_conversation, pictures
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
from common.runtime.files import read_json
from common.runtime.process import InputError
from common.training.checkpoints import check_plan, find_checkpoint, write_manifest
from common.training.deepspeed import choose_deepspeed, zero_stage

INPUTS = int(os.environ.get("FUZZ_INPUTS", 500))
SECONDS = 20

ODD = [None, True, False, -1, 0, 1, 2, 7, 2**31, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800"]
ODD += ["1", "../../../etc/passwd", "phi3_v", "<|end|>", "float16", [], {}, [[]], [None], [1, "a"], {"a": 1}, {"type": "su"}]
ODD += [[1.0] * 16, "{% for a in b %}", "x" * 5000]


def inputs(share):
    """Hypothesis settings for a share of all inputs. The shares of all tests add up to about 1."""
    few = INPUTS <= 500
    return settings(
        max_examples=max(1, round(share * INPUTS)),
        deadline=None,
        derandomize=few,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def end(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def read(reader, *errors):
    """The result of a reader, or None if it refuses the input."""
    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        return reader()
    except (InputError, *errors) as error:
        assert str(error)
    finally:
        signal.alarm(0)


def paths(content, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(content, dict | list) and len(path) < 4:
        for key in content if isinstance(content, dict) else range(min(len(content), 3)):
            yield from paths(content[key], (*path, key))


@st.composite
def damaged(draw, whole):
    """Truncated, overwritten or replaced bytes of a file."""
    at = draw(st.integers(0, len(whole)))
    how = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))
    if how == "cut":
        return whole[:at]
    noise = draw(st.binary(min_size=1, max_size=16))
    if how == "replace":
        return draw(
            st.sampled_from([noise, b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe" + whole, b"\xef\xbb\xbf" + whole])
        )
    return whole[:at] + noise + whole[at + len(noise) * (how == "flip") :]


@st.composite
def broken(draw, content, keys=()):
    """A JSON file with values replaced, removed or added, possibly damaged."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = [path for path in paths(content) if path] + [(key,) for key in keys]
        if not places:  # all was removed
            break
        *place, last = draw(st.sampled_from(places))
        target = content
        for key in place:
            target = target[key]
        value = copy.deepcopy(draw(st.sampled_from(ODD) | st.integers() | st.text(max_size=4)))
        if draw(st.integers(0, 3)) == 0 and (isinstance(target, list) or last in target):
            del target[last]
        else:
            target[last] = value
    text = json.dumps(content).encode()
    return draw(damaged(text)) if draw(st.integers(0, 4)) == 0 else text


@pytest.fixture(scope="module")
def answering(random_model):
    return load_full(str(random_model), "cpu")


def answer(model, processor):
    """Generate a token, which must be possible with any checkpoint that was not refused."""
    prompt = processor.tokenizer.apply_chat_template([{"role": "user", "content": "Aa?"}], tokenize=False)
    return model.generate(**processor(prompt), max_new_tokens=1, do_sample=False)


KEYS = ["rope_parameters", "head_dim", "quantization_config", "return_dict", "to_dict", "attribute_map", "num_labels", "dtype"]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("config.json", 0.1),
        ("generation_config.json", 0.02),
        ("tokenizer_config.json", 0.08),
        ("tokenizer.json", 0.06),
        ("preprocessor_config.json", 0.04),
        ("processor_config.json", 0.02),
        ("model.safetensors.index.json", 0.03),
    ],
)
def test_a_file_of_a_checkpoint(name, share, random_model, tmp_path):
    directory = shutil.copytree(random_model, tmp_path / "model")
    if name == "model.safetensors.index.json":
        whole = load_file(directory / "model.safetensors")
        save_torch_state_dict(whole, directory, max_shard_size=sum(tensor.nbytes for tensor in whole.values()) // 2)
    content = json.loads((directory / name).read_text(encoding="utf-8"))

    @inputs(share)
    @given(broken(content, KEYS if name == "config.json" else ()))
    def check(text):
        (directory / name).write_bytes(text)
        if (loaded := read(lambda: load_full(str(directory), "cpu"))) is not None:
            answer(loaded, load_processor(str(directory)))

    check()


@pytest.mark.parametrize(
    ("name", "change", "refused"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": None}}, False),
        ("config.json", {"original_max_position_embeddings": 1}, True),
        # tokenizers panics when it encodes a text, with an exception that is no Exception.
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing", "special_tokens": {}}}, True),
    ],
)
def test_what_fuzzing_has_found(name, change, refused, random_model, tmp_path):
    directory = shutil.copytree(random_model, tmp_path / "model")
    content = json.loads((directory / name).read_text(encoding="utf-8")) | change
    if name == "tokenizer.json":
        undefined = {"SpecialToken": {"id": "<undefined>", "type_id": 0}}
        content["post_processor"] |= {"single": [undefined, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [undefined]}
    (directory / name).write_text(json.dumps(content))
    assert (read(lambda: load_full(str(directory), "cpu")) is None) == refused


LOOP = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "TEMPLATE_SECONDS", 1)
    directory = shutil.copytree(random_model, tmp_path / "model")
    whole = (directory / "chat_template.jinja").read_bytes()
    (directory / "chat_template.jinja").write_bytes(whole + LOOP)
    with pytest.raises(InputError, match="the chat template takes more than 1 s"):
        load_processor(str(directory))

    @inputs(0.02)
    @given(damaged(whole) | st.just(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"))
    def check(text):
        (directory / "chat_template.jinja").write_bytes(text)
        read(lambda: load_processor(str(directory)))

    check()


def test_weights(random_model, tmp_path):
    directory = shutil.copytree(random_model, tmp_path / "model")
    whole = (directory / "model.safetensors").read_bytes()
    head = whole[: 8 + int.from_bytes(whole[:8], "little")]

    @inputs(0.04)
    @given(damaged(head))
    def check(text):
        (directory / "model.safetensors").write_bytes(text + whole[len(head) :])
        read(lambda: load_full(str(directory), "cpu"))

    check()


@pytest.mark.parametrize("name", ["complete.json", "trainer_state.json", "totals.json"])
def test_a_file_of_a_resumed_checkpoint(name, tmp_path):
    directory = tmp_path / "checkpoint-4"
    save_checkpoint(directory, data="4 rows", steps=6)
    content = json.loads((directory / name).read_text())

    @inputs(0.03)
    @given(broken(content, ["../a", "/dev/zero", "new"]))
    def check(text):
        (directory / name).write_bytes(text)
        if name != "complete.json":
            write_manifest(directory)
        outcome = read(lambda: find_checkpoint("auto", tmp_path, {"data": "4 rows"}, []))
        assert outcome is None or any(outcome)
        if outcome and outcome[0]:
            read(lambda: check_plan(directory, {"data": "4 rows", "steps": 6}, []))

    check()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_run(name, tmp_path):
    make_run(tmp_path, "UCF-101", samples=4, steps=3)
    content = json.loads((tmp_path / name).read_text(encoding="utf-8"))

    @inputs(0.01)
    @given(broken(content, ["accuracy_per_class", "datasets"]))
    def check(text):
        (tmp_path / name).write_bytes(text)
        read(lambda: write_report([tmp_path], tmp_path / "report.html"))
        read(lambda: write_model_card(tmp_path))

    check()


@pytest.mark.parametrize(("name", "share"), [("adapter_config.json", 0.08), ("base_model.json", 0.03)])
def test_a_file_of_an_adapter(name, share, random_model, answering, tmp_path):
    directory = save_adapter(tmp_path / "adapter", "--use_lora", base=random_model)
    content = json.loads((directory / name).read_text(encoding="utf-8"))

    @inputs(share)
    @given(broken(content, ["megatron_config", "layer_replication"] if name == "adapter_config.json" else ()))
    def check(text):
        (directory / name).write_bytes(text)
        if name == "base_model.json":
            read(lambda: load_base(directory, "cpu", base=str(random_model)))
            return
        arguments.adapter_settings(str(directory))
        if adapter := read(lambda: find_adapter(directory)):
            read(lambda: find_base(adapter))
            read(lambda: attach_adapter(copy.deepcopy(answering), adapter))

    check()


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": []},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"base_model_name_or_path": "x" * 5000},
        None,
    ],
)
def test_an_adapter_that_cannot_be_one(changes, tmp_path):
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": 0, "target_modules": "", "use_dora": False}
    content |= {"use_rslora": False, "init_lora_weights": True} | (changes or {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(content) if changes else '{"a":' * 100_000)
    (tmp_path / "adapter_model.safetensors").touch()
    assert bool(arguments.adapter_settings(str(tmp_path))) == ("base_model_name_or_path" in content)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        find_adapter(tmp_path)


def test_weights_of_an_adapter(random_model, answering, tmp_path):
    directory = save_adapter(tmp_path / "adapter", "--use_lora", base=random_model)
    whole = (directory / "adapter_model.safetensors").read_bytes()
    head = whole[: 8 + int.from_bytes(whole[:8], "little")]

    @inputs(0.03)
    @given(damaged(head))
    def check(text):
        (directory / "adapter_model.safetensors").write_bytes(text + whole[len(head) :])
        read(lambda: attach_adapter(copy.deepcopy(answering), directory))

    check()


ROW = {"id": "1", "conversations": [{"images": ["a.png"], "user": "What?", "assistant": "A."}, {"user": "B", "assistant": "C"}]}
LLAVA = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nB"}, {"from": "gpt", "value": "C"}]}
PARTS = [
    {"type": "image", "image": "a.png"},
    {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "text", "text": "B"},
]
SAID = [{"role": "system", "content": "S"}, {"role": "user", "content": PARTS}, {"role": "assistant", "content": "C"}]
MESSAGES = {"messages": SAID}


@pytest.mark.parametrize(("row", "share"), [(ROW, 0.06), (LLAVA, 0.03), (MESSAGES, 0.05)], ids=["general", "llava", "messages"])
def test_a_row(row, share):
    processor = load_processor(str(TINY))

    @inputs(share)
    @given(broken(row))
    def check(line):
        if row := read(lambda: parse_conversation(line, "train.jsonl, line 1")):
            encode_conversation(row, processor, [2] * len(pictures(row)))

    check()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the images of the rows below, and with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a.png", "images/train/1/dev-1-0-img0.png", "images/train/1/dev-1-0-img1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


TABLE = b'id,image,question,answer\n1,a.png,"What, now?",A.\n2,,B,"C ""D"" E"\n'


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("train.jsonl", broken(ROW).map(lambda line: line + b"\n" + json.dumps(ROW).encode())),
        ("train.json", broken([ROW, LLAVA])),
        ("train.csv", damaged(TABLE)),
    ],
)
def test_a_file_of_conversations(name, texts, folder):
    @inputs(0.03)
    @given(texts)
    def check(text):
        (folder / name).write_bytes(text)
        rows = read(lambda: load_conversations(folder / name, find_image_dir(folder / name), bar=False))
        assert rows is None or list(rows)

    check()


def stored_picture(kind):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file, kind)
    return file.getvalue()


@st.composite
def parquet(draw, row):
    """A Parquet file of a row with values replaced, removed or added, or with damaged bytes. "PNG" stands for an image."""

    def write(text):
        file = io.BytesIO()
        png = stored_picture("PNG")
        rows = [json.loads(text, object_hook=lambda found: {key: png if found[key] == "PNG" else found[key] for key in found})]
        pq.write_table(pa.Table.from_pylist(rows * 3), file)
        return file.getvalue()

    whole = json.dumps(row).encode()
    try:
        return write(draw(broken(row)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException):  # not a table
        return draw(damaged(write(whole)))


def take_all(rows, to_conversation, processor):
    """Encode all rows as a run does."""
    if isinstance(rows, Rows):
        check_rows(rows, lambda row: [to_conversation(row, random.Random(0))], "row", bar=False)
        data = TrainingData(rows, to_conversation, processor, seed=0)
        return [data[0, number] for number in range(len(rows))]
    data = StreamedData(rows, to_conversation, processor, seed=0)
    return [data[row] for row in rows.rows(0, 0)]


def test_a_shard(folder):
    processor = load_processor(str(TINY), num_crops=1)
    images = [{"bytes": "PNG", "path": None}, {"bytes": None, "path": "a.png"}]
    row = {"id": "1", "conversations": [{"images": images, "user": "B", "assistant": "C"}]}

    @inputs(0.03)
    @given(parquet(row))
    def check(content):
        (folder / "a.parquet").write_bytes(content)
        shards._open_parquet.cache_clear()
        read(lambda: take_all(shards.stream_conversations(folder / "a.parquet", folder), lambda row, _: row, processor))

    check()


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
def test_a_dataset_of_the_hub(load, convert, to_conversation, folder):
    processor = load_processor(str(TINY), num_crops=1)
    row = {"images": [{"bytes": "PNG", "path": None}], "texts": [{"user": "B", "assistant": "Yes."}]}
    numbers = itertools.count()

    @inputs(0.008)
    @given(parquet(row))
    def check(content):
        hub = folder / f"hub{next(numbers)}"
        hub.mkdir()
        (hub / "train.parquet").write_bytes(content)
        read(lambda: take_all(load(str(hub), columns=["images", "texts"]).map(convert), to_conversation, processor))

    check()


def load_docvqa(folder, text):
    (folder / "val_v1.0_withQT.json").write_bytes(text)
    return docvqa.load_official(folder, "val", None)


def load_lines(name, script, to_row, folder, text):
    (folder / "rows").write_bytes(text)
    return read_rows(folder / "rows", name, partial(to_row, folder), None, False)


@pytest.mark.parametrize(
    ("script", "row", "load"),
    [
        (docvqa, {"data": [{"questionId": 1, "question": "Q?", "image": "a.png", "answers": ["A", "B"]}]}, load_docvqa),
        (memes, {"id": 7, "img": "a.png", "label": 1, "text": "t"}, partial(load_lines, "Memes", memes, memes.from_official)),
        (
            nlvr2,
            {"identifier": "dev-1-0-0", "sentence": "S.", "label": "True", "directory": 1},
            partial(load_lines, "NLVR2", nlvr2, lambda folder, row: nlvr2.from_official(folder, "train", row)),
        ),
    ],
    ids=["docvqa", "hateful_memes", "nlvr2"],
)
def test_an_official_release(script, row, load, folder):
    @inputs(0.03)
    @given(broken(row))
    def check(text):
        rows = read(lambda: load(folder, text))
        for found in rows if rows is not None else ():
            read(
                lambda found=found: parse_conversation(
                    json.dumps(script.to_conversation(found, random.Random(0))).encode(), "1"
                )
            )

    check()


def test_a_deepspeed_file(tmp_path):
    content = json.loads((ROOT / "common/deepspeed/zero2_offload.json").read_text())
    flags = Namespace(
        deepspeed=tmp_path / "zero.json", optim="adamw_torch", use_lora=False, use_qlora=False, torch_compile=False
    )

    @inputs(0.06)
    @given(broken(content, ["optimizer"]))
    def check(text):
        (tmp_path / "zero.json").write_bytes(text)
        path = read(lambda: choose_deepspeed(flags))
        assert path is None or zero_stage(path) in range(4)

    check()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture(kind):
    @inputs(0.012)
    @given(damaged(stored_picture(kind)))
    def check(content):
        picture = {"bytes": content, "path": None}
        read(lambda: check_picture(picture))
        if decoded := read(lambda: decode_picture(picture)):
            assert decoded.size == picture_size(picture)

    check()


@pytest.mark.parametrize("compression", ["", "gz", "xz"])
def test_an_archive(compression, tmp_path):
    write_clip(tmp_path / "clip.avi", 2)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode=f"w:{compression}") as archive:
        for split in convert_ucf101.SPLITS:
            archive.add(tmp_path / "clip.avi", f"ucf/{split}/Run/a.avi")

    def convert(path):
        with convert_ucf101.open_source(path, tmp_path / "out") as files:
            splits = convert_ucf101.clips_by_split(files, path)
            return [files[clip]() for clips in splits.values() for clip in clips]

    @inputs(0.02)
    @given(damaged(plain.getvalue()))
    def check(content):
        (tmp_path / "a.tar").write_bytes(content)
        read(lambda: convert(tmp_path / "a.tar"))

    check()


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)]
)
def test_what_is_not_a_regular_file_is_refused_at_once(make, random_model, tmp_path):
    make(tmp_path / "a.png")
    assert read(lambda: check_picture(tmp_path / "a.png")) is None
    assert read(lambda: read_json(tmp_path / "a.png", "put a file there")) is None
    assert read(lambda: load_conversations(tmp_path / "a.png", tmp_path)) is None
    directory = shutil.copytree(random_model, tmp_path / "model")
    make(directory / "z.safetensors")  # which nothing loads
    assert read(lambda: load_full(str(directory), "cpu")) is not None
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json", "chat_template.jinja"):
        (directory / name).rename(tmp_path / "kept")
        make(directory / name)
        read(lambda: load_full(str(directory), "cpu"))
        os.rmdir(directory / name) if make is os.mkdir else os.unlink(directory / name)
        (tmp_path / "kept").rename(directory / name)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="more than 89,478,485 pixels"):
        check_picture({"bytes": file.getvalue(), "path": "a.png"}, whole=True)


def test_no_program_is_run_for_a_picture(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(InputError, match=r"a\.eps cannot be read"):
        check_picture(tmp_path / "a.eps")


def test_pickles_are_refused_by_name(random_model, tmp_path):
    directory = shutil.copytree(random_model, tmp_path / "model")
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read: a pickle can run code"):
        load_full(str(directory), "cpu")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is not read: a pickle can run code"):
        find_adapter(tmp_path / "adapter")
