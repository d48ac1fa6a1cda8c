"""Bad input ends a run before any training, with a message that names the file, row or flag and what to do."""

import io
import json
import pickle
import random
import shutil
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, torchrun
from forked import be_process, run_script
from PIL import Image
from runs import SCRIPT, flags, message, write_docvqa

import finetune_hf_trainer_docvqa as docvqa
from common.data.collator import load_crops
from common.data.loader import WorkerLoader
from common.runtime import machine
from common.runtime.process import InputError
from common.runtime.script import run
from common.training import start as training


@pytest.fixture
def data(tmp_path):
    return write_docvqa(tmp_path / "data", train=4, val=2)


@pytest.mark.parametrize(("exported", "threads"), [("1", None), ("3", 3)])
def test_the_requested_number_of_threads_is_used(exported, threads, monkeypatch):
    """torchrun sets OMP_NUM_THREADS to 1 if it is not set."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    monkeypatch.setenv("RANK", "0")
    training._prepare_environment(on_gpu=False)
    assert chosen == ([] if threads else [machine.cores_per_process()])


def test_more_processes_than_gpus(monkeypatch, data, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = message(monkeypatch, data, tmp_path / "out")
    assert said == "torchrun --nproc_per_node=2: this machine has 1 GPU, and each process requires one"


@pytest.mark.parametrize(("visible", "refused"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_a_gpu_that_pytorch_cannot_use_is_an_error(visible, refused, monkeypatch, tmp_path):
    (tmp_path / "nvidia3").touch()
    monkeypatch.setattr(training, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=r"built for CUDA 13\.0, cannot use") if refused else nullcontext():
        training._check_gpus()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer": {"type": "AdamW"}}, 'has the section "optimizer", which would override --optim'),
        ({"gradient_accumulation_steps": 2}, 'gradient_accumulation_steps must be "auto", because the flags determine it'),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, '"offload_optimizer" without a "device"'),
        ({"bf16": {"enabled": True}}, 'bf16.enabled must be "auto", because the flags determine it'),
    ],
)
def test_a_deepspeed_file_that_overrides_flags_is_refused(changes, expected, monkeypatch, data, tmp_path):
    content = json.loads((ROOT / "common/deepspeed/zero2.json").read_text()) | changes
    (tmp_path / "zero.json").write_text(json.dumps(content))
    said = message(monkeypatch, data, tmp_path / "out", deepspeed=tmp_path / "zero.json")
    assert f"zero.json {expected}" in said or f"zero.json: {expected}" in said


def break_missing(data):
    (data / "documents" / "train2.png").unlink()
    return "train2.png is missing", "remove its row"


def break_cut_short(data):
    path = data / "documents" / "val0.png"
    Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    return "val0.png cannot be decoded", "replace it"


def break_empty(data):
    (data / "val_v1.0_withQT.json").write_text('{"data": []}')
    return "val_v1.0_withQT.json does not have the DocVQA format", "of objects"


def break_folder(data):
    shutil.rmtree(data)
    data.write_text("")
    return "_v1.0_withQT.json is missing", "--data_dir must be the folder"


@pytest.mark.parametrize("damage", [break_missing, break_cut_short, break_folder])
def test_data(damage, monkeypatch, data, tmp_path):
    expected = damage(data)
    said = message(monkeypatch, data, tmp_path / "out")
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out" / "eval_before.json").exists()


ENTRY = '{"questionId": 1, "question": "Which?", "image": "documents/train0.png", "answers": ["1"]}'


@pytest.mark.parametrize(
    ("text", "expected", "remedy"),
    [
        ('{"data": [{"question": "\\ud800"}]}', ": invalid JSON", "surrogates not allowed"),
        ('{"rows": []}', " does not have the DocVQA format", '"data"'),
        ('{"question": "Which?", "image": "documents/train0.png"}', 'entry 1 of "data"', '"answers"'),
        (ENTRY.replace("Which", "<|image_1|> or <|image_2|>"), 'entry 1 of "data": the text', "match its 1 image"),
        # The answer that is drawn depends on the epoch.
        (ENTRY.replace('["1"]', '["1", "2<|end|>3"]'), '"assistant" contains the special token <|end|>', "remove it"),
        # In the published tokenizers this token begins a text.
        (ENTRY.replace("Which", "What is <s>struck</s> out"), '"user" contains the special token <s>', "remove it"),
    ],
)
def test_official_files(text, expected, remedy, monkeypatch, data, tmp_path):
    content = text if not text.startswith('{"question') else f'{{"data": [{ENTRY}, {text}]}}'
    (data / "train_v1.0_withQT.json").write_text(content)
    said = message(monkeypatch, data, tmp_path / "out")
    assert "train_v1.0_withQT.json" in said and expected in said and remedy in said


def be_process_with_hub(mini: Path, *arguments: object) -> None:
    """One process of a run for which a folder takes the place of the Hub's DocVQA examples."""
    datasets.config.HF_DATASETS_CACHE = mini.parent / "cache"
    docvqa.MINI = str(mini)
    be_process(*arguments)


def assert_every_process_ends(log, words, *expected, **options):
    """All processes exit with code 1 and a message, without a traceback."""
    codes = run_script(words, log, **options)
    printed = log.read_text()
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert codes == [1, 1] and lines and "Traceback" not in printed, printed
    assert all(part in line for part in expected for line in lines), lines


def test_bad_data_ends_every_process(data, tmp_path):
    expected = break_missing(data)
    assert_every_process_ends(tmp_path / "log", flags(data, tmp_path / "out"), *expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_damaged_image_in_a_dataset_is_named_by_its_row(split, monkeypatch, data, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(docvqa, "MINI", str(tmp_path / "mini"))
    whole = (data / "documents/train0.png").read_bytes()
    half = len(whole) // 2
    damaged = whole[:half] + bytes(len(whole) - half - 64) + whole[-64:] if split == "train" else whole[:half]
    (tmp_path / "mini").mkdir()
    for part in ("train", "test"):
        pictures = [whole, whole, damaged if part == split else whole]
        rows = [{"image": {"bytes": picture, "path": None}, "query": {"en": "What?"}} for picture in pictures]
        rows = [row | {"id": str(number), "answers": ["1"]} for number, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"mini/{part}-00000-of-00001.parquet")
    said = message(monkeypatch, data, tmp_path / "out", data_dir=None)
    assert said.startswith(f"{tmp_path / 'mini'}, {split}, row 2: an image stored in the dataset cannot be decoded")


@pytest.mark.slow
def test_an_input_error_in_a_worker_ends_every_process_with_one_line(data, random_model, tmp_path):
    """The worker of each process reads a damaged image in the same step."""
    (tmp_path / "mini").mkdir()
    whole = (data / "documents/train0.png").read_bytes()
    for part, picture in (("train", as_damaged_jpeg(whole)), ("test", whole)):
        row = {"image": {"bytes": picture, "path": None}, "query": {"en": "What?"}, "id": "1", "answers": ["1"]}
        pq.write_table(pa.Table.from_pylist([row] * 2), tmp_path / f"mini/{part}-00000-of-00001.parquet")
    options = {"data_dir": None, "deepspeed": "none", "dataloader_num_workers": 1, "batch_size": 2, "max_new_tokens": 1}
    options |= {"batch_size_per_gpu": 1, "model_name_or_path": random_model}
    target = partial(be_process_with_hub, tmp_path / "mini")
    words = flags(data, tmp_path / "out", **options)
    assert_every_process_ends(tmp_path / "log", words, f"{tmp_path / 'mini'}, train, row ", target=target)


def as_damaged_jpeg(picture):
    """A JPEG file with a second start-of-frame marker in its middle."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(file, "JPEG")
    content, half = file.getvalue(), len(file.getvalue()) // 2
    return content[:half] + b"\xff\xc0" + content[half + 2 :]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_has_the_same_message_with_and_without_workers(workers, capsys):
    def collate(rows):
        return load_crops([{"bytes": b"no picture", "path": "a.png"}], 1, ["training row 5"])

    loader = WorkerLoader([0], collate, batch_sampler=[[0]], num_workers=workers)
    with pytest.raises(SystemExit):
        run(lambda args: next(iter(loader)), None)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training row 5: image a.png cannot be read (")


def test_a_worker_that_hangs_ends_the_run(capsys):
    loader = WorkerLoader([0], lambda rows: time.sleep(60), batch_sampler=[[0]], num_workers=1, timeout=1)
    with pytest.raises(SystemExit):
        run(lambda args: next(iter(loader)), None)
    assert "error: a data worker hangs (DataLoader timed out after 1 seconds" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_keep_their_traceback(workers):
    loader = WorkerLoader([0], lambda rows: random.sample(rows, 2), batch_sampler=[[0]], num_workers=workers)
    with pytest.raises(ValueError, match="Sample larger than population"):
        run(lambda args: next(iter(loader)), None)


def test_an_input_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(InputError("needs a label", "train.jsonl, line 3").at("training row 2")))
    assert type(error) is InputError and error.place == "training row 2"
    assert str(error) == "training row 2: train.jsonl, line 3: needs a label"


@pytest.mark.slow
def test_under_torchrun_a_run_with_invalid_data_ends(data, tmp_path):
    break_empty(data)
    ended = torchrun(SCRIPT, *flags(data, tmp_path / "out"), timeout=120)
    assert ended.returncode == 1, ended.stdout
    assert ended.stdout.count("error: ") == 1
    assert "does not have the DocVQA format" in ended.stdout.splitlines()[-2]  # the last line of torchrun's summary
