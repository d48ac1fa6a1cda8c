"""Bad input ends a run before any training, with a message that names the file, row or flag and what to do."""

import io
import json
import pickle
import random
import re
import shutil
import socket
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import torchrun
from forked import be_process, server
from PIL import Image
from runs import SCRIPT, flags, message, write_docvqa, write_random_model

import finetune_hf_trainer_docvqa as docvqa
from common import runtime
from common.data.collator import load_crops
from common.data.loader import WorkerLoader
from common.runtime import InputError, run
from common.training import start as training


@pytest.fixture
def data(tmp_path):
    return write_docvqa(tmp_path / "data", train=4, val=2)


@pytest.mark.parametrize(("exported", "threads"), [("1", None), ("3", 3)])
def test_threads_are_those_that_were_asked_for(exported, threads, monkeypatch):
    """torchrun sets 1 itself, which nobody asked for."""
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", exported)
    monkeypatch.setenv("RANK", "0")
    training._prepare_environment(on_gpu=False)
    assert chosen == ([] if threads else [runtime.cores_per_process()])


def test_more_processes_than_gpus(monkeypatch, data, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    said = message(monkeypatch, data, tmp_path / "out")
    assert said == "torchrun --nproc_per_node=2: this machine has 1 GPU, and each process requires one"


@pytest.mark.parametrize(("visible", "refused"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_a_gpu_that_the_driver_keeps_from_pytorch(visible, refused, monkeypatch, tmp_path):
    """It must not train on the CPU unasked."""
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


def test_a_deepspeed_file_with_an_optimizer_of_its_own(monkeypatch, data, tmp_path):
    (tmp_path / "zero.json").write_text('{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    said = message(monkeypatch, data, tmp_path / "out", deepspeed=tmp_path / "zero.json")
    assert 'zero.json has an "optimizer" section' in said and "remove that section" in said


def break_missing(data):
    (data / "documents" / "train2.png").unlink()
    return "train2.png is missing", "remove its row"


def break_no_picture(data):
    (data / "documents" / "train1.png").write_text("not a picture")
    return "train1.png cannot be read", "replace it"


def break_cut_short(data):
    path = data / "documents" / "val0.png"
    Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    return "val0.png cannot be decoded", "replace it"


def break_json(data):
    (data / "train_v1.0_withQT.json").write_text("{")
    return "train_v1.0_withQT.json: invalid JSON", "download it again"


def break_schema(data):
    (data / "train_v1.0_withQT.json").write_text('{"rows": []}')
    return "does not have the DocVQA format", '"data"'


def break_entry(data):
    path = data / "train_v1.0_withQT.json"
    content = json.loads(path.read_text())
    del content["data"][3]["answers"]
    path.write_text(json.dumps(content))
    return 'entry 3 of "data"', '"answers"'


def change_entry(data, number, **fields):
    path = data / "train_v1.0_withQT.json"
    content = json.loads(path.read_text())
    content["data"][number] |= fields
    path.write_text(json.dumps(content))


def break_answer(data):
    change_entry(data, 2, answers=["1", " "])
    return 'entry 2 of "data"', "nonempty list of nonempty"


def break_tags(data):
    change_entry(data, 1, question="<|image_1|> or <|image_2|>?")
    return 'entry 1 of "data": the text', "match its 1 image"


def break_second_answer(data):
    """Which of several is drawn depends on the epoch."""
    change_entry(data, 3, answers=["1", "2<|end|>3"])
    return 'entry 3 of "data", turn 1: "assistant" contains the special token <|end|>', "remove it"


def break_text(data):
    """Which the published tokenizers take for the mark that begins a text."""
    change_entry(data, 0, question="What is <s>struck</s> out?")
    return 'entry 0 of "data", turn 1: "user" contains the special token <s>', "remove it"


def break_character(data):
    path = data / "val_v1.0_withQT.json"
    path.write_text(path.read_text().replace("Which", "\\ud800"))
    return "val_v1.0_withQT.json: invalid JSON", "surrogates not allowed"


def break_folder(data):
    shutil.rmtree(data)
    data.write_text("")
    return "train_v1.0_withQT.json is missing", "--data_dir must be the folder"


def break_empty(data):
    (data / "val_v1.0_withQT.json").write_text('{"data": []}')
    return "val_v1.0_withQT.json does not have the DocVQA format", "of questions"


@pytest.mark.parametrize(
    "damage",
    [
        break_missing,
        break_no_picture,
        break_cut_short,
        break_json,
        break_schema,
        break_entry,
        break_answer,
        break_tags,
        break_second_answer,
        break_text,
        break_character,
        break_folder,
        break_empty,
    ],
)
def test_data(damage, monkeypatch, data, tmp_path):
    expected = damage(data)
    said = message(monkeypatch, data, tmp_path / "out")
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out" / "eval_before.json").exists()


def be_process_with_hub(mini: Path, *arguments: object) -> None:
    """Be one process of a run whose hub has one data set, DocVQA's 1,200 examples, in a folder."""
    datasets.config.HF_DATASETS_CACHE = mini.parent / "cache"
    docvqa.MINI = str(mini)
    be_process(*arguments)


def be_process_of_jsonl(cache: Path, *arguments: object) -> None:
    """Be one process of a run of the script for own data."""
    datasets.config.HF_DATASETS_CACHE = cache
    be_process(*arguments, script="finetune_hf_trainer_jsonl.py")


def end(log, *words, processes=2, target=be_process, timeout=180):
    """Exit codes of a run's processes, none of which is ended from outside, and all that they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    members = [server().Process(target=target, args=(rank, processes, port, words, log)) for rank in range(processes)]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout)
    codes = [member.exitcode for member in members]
    for member in members:
        member.kill()
    return codes, log.read_text()


def test_a_bad_flag_ends_every_process(data, tmp_path):
    codes, said = end(tmp_path / "log", *flags(data, tmp_path / "out", model_name_or_path="/no/such/model"))
    assert codes == [1, 1], said
    assert said.count("error: ") == 1 and "Traceback" not in said


@pytest.mark.parametrize("damage", [break_missing, break_no_picture, break_json, break_empty])
def test_bad_data_ends_every_process(damage, data, tmp_path):
    expected = damage(data)
    codes, said = end(tmp_path / "log", *flags(data, tmp_path / "out"))
    assert codes == [1, 1], said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert all(part in line for part in expected) and "Traceback" not in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"conversations": [{"user": "Why?",', "train.jsonl, line 2: invalid JSON"),
        ('{"conversations": [{"user": "Why?"}]}', 'train.jsonl, line 2, turn 1: "assistant" must be a non-empty string'),
        (
            '{"conversations": [{"user": "Why?", "assistant": "So.", "images": ["gone.png"]}]}',
            "gone.png is missing: put the file there",
        ),
    ],
)
def test_a_bad_row_of_the_general_format_ends_every_process(row, expected, tmp_path):
    good = '{"conversations": [{"user": "Why?", "assistant": "So."}]}\n'
    (tmp_path / "train.jsonl").write_text(f"{good}{row}\n")
    (tmp_path / "val.jsonl").write_text(good)
    words = flags(tmp_path, tmp_path / "out", train_file="train.jsonl", eval_file="val.jsonl")
    codes, said = end(tmp_path / "log", *words, target=partial(be_process_of_jsonl, tmp_path / "cache"))
    assert codes == [1, 1], said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert expected in line and "Traceback" not in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_stored_picture_that_is_damaged_is_named_by_its_row(split, monkeypatch, data, tmp_path):
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
def test_an_input_error_of_a_worker_ends_every_process_with_one_line(data, tmp_path):
    """Each of two processes meets a damaged picture in the same step, in its worker."""
    (tmp_path / "mini").mkdir()
    whole = (data / "documents/train0.png").read_bytes()
    for part, picture in (("train", as_damaged_jpeg(whole)), ("test", whole)):
        row = {"image": {"bytes": picture, "path": None}, "query": {"en": "What?"}, "id": "1", "answers": ["1"]}
        pq.write_table(pa.Table.from_pylist([row] * 2), tmp_path / f"mini/{part}-00000-of-00001.parquet")
    options = {"data_dir": None, "deepspeed": "none", "dataloader_num_workers": 1, "batch_size": 2, "max_new_tokens": 1}
    options |= {"batch_size_per_gpu": 1, "model_name_or_path": write_random_model(tmp_path / "model")}
    words = flags(data, tmp_path / "out", **options)
    codes, said = end(tmp_path / "log", *words, target=partial(be_process_with_hub, tmp_path / "mini"))
    assert codes == [1, 1], said
    lines = [line for line in said.splitlines() if line.startswith(f"error: {tmp_path / 'mini'}, train, row ")]
    assert lines and "Traceback" not in said  # the processes may have met different rows


def as_damaged_jpeg(picture):
    """A JPEG file whose ends are as they should, with a frame's begin in its middle."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(file, "JPEG")
    content, half = file.getvalue(), len(file.getvalue()) // 2
    return content[:half] + b"\xff\xc0" + content[half + 2 :]


def test_a_page_of_the_release_that_is_damaged_before_its_end_is_named_before_training(monkeypatch, data, tmp_path):
    page = data / "documents/train0.png"
    whole = page.read_bytes()
    page.write_bytes(whole[: len(whole) // 2] + bytes(100) + whole[len(whole) // 2 + 100 :])
    assert f"{page.name} cannot be decoded" in message(monkeypatch, data, tmp_path / "out")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_says_what_the_process_itself_would_say(workers, capsys):
    def collate(rows):
        return load_crops([{"bytes": b"no picture", "path": "a.png"}], 1, ["training row 5"])

    loader = WorkerLoader([0], collate, batch_sampler=[[0]], num_workers=workers)
    with pytest.raises(SystemExit):
        run(lambda args: next(iter(loader)), None)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training row 5: image a.png cannot be read (")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("collate", "complaint"),
    [
        (lambda rows: random.sample(rows, 2), "Sample larger than population"),
        (lambda rows: list(zip(rows, [], strict=True)), r"zip\(\) argument 2 is shorter"),
    ],
)
def test_what_is_not_the_users_fault_keeps_its_traceback(collate, complaint, workers):
    """A library's complaint, or an error in the code that calls it."""
    loader = WorkerLoader([0], collate, batch_sampler=[[0]], num_workers=workers)
    with pytest.raises(ValueError, match=complaint):
        run(lambda args: next(iter(loader)), None)


def test_an_input_error_is_the_same_after_its_way_to_other_processes():
    error = pickle.loads(pickle.dumps(InputError("needs a label", "train.jsonl, line 3").at("training row 2")))
    assert type(error) is InputError and error.place == "training row 2"
    assert str(error) == "training row 2: train.jsonl, line 3: needs a label"


@pytest.mark.slow
def test_under_torchrun_it_ends_at_once(data, tmp_path):
    break_empty(data)
    ended = torchrun(SCRIPT, *flags(data, tmp_path / "out"), timeout=120)
    assert ended.returncode == 1, ended.stdout
    assert ended.stdout.count("error: ") == 1
    assert "does not have the DocVQA format" in ended.stdout.splitlines()[-2]  # the last line of torchrun's summary


def test_without_torchrun_the_exit_code_is_one(monkeypatch, capsys, data, tmp_path):
    (data / "train_v1.0_withQT.json").unlink()
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags(data, tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run(docvqa.main, docvqa.parse_args())
    assert ended.value.code == 1
    assert re.match(r"error: .*train_v1\.0_withQT\.json is missing", capsys.readouterr().err.splitlines()[-1])
