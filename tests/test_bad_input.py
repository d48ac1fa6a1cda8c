"""Bad input ends a run before any training, with a message that names the file, row or flag and what to do."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, torchrun
from PIL import Image
from runs import SCRIPT, flags, write_docvqa

import finetune_hf_trainer_docvqa as docvqa


@pytest.fixture
def data(tmp_path):
    return write_docvqa(tmp_path / "data", train=4, val=2)


def message(monkeypatch, data, output, **options):
    """What the script says when it refuses to run."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags(data, output, **options)])
    with pytest.raises(ValueError) as error:
        docvqa.main()
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_crops": 0}, "--num_crops must be from 1 to 16, not 0"),
        ({"num_crops": 17}, "--num_crops must be from 1 to 16, not 17"),
        ({"batch_size": 5}, "--batch_size 5 can't be divided over 1 process(es) × --batch_size_per_gpu 2"),
        ({"learning_rate": 0}, "--learning_rate must be above 0"),
        ({"max_eval_samples": 0}, "--max_eval_samples must be at least 1"),
        ({"use_flash_attention": True}, "--use_flash_attention: no flash kernel runs on a CPU"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn 2 is not installed"),
        ({"use_flash_attention": True, "attn_implementation": "eager"}, "contradict"),
        ({"optim": "adam_of_mine"}, "--optim adam_of_mine: there is no such optimizer"),
        ({"report_to": "tensorbord"}, "--report_to tensorbord: "),
        ({"report_to": "wandb"}, "--report_to wandb: "),
        ({"use_liger_kernel": True}, "--use_liger_kernel: Liger's kernels run on GPUs only"),
        ({"streaming": True}, "--streaming"),
        ({"attn_implementation": "sdpa", "packing": True}, "--packing needs an attention kernel"),
        ({"deepspeed": "nowhere.json"}, "--deepspeed nowhere.json: there is no such file"),
        ({"deepspeed": "common/deepspeed/zero3.json", "use_qlora": True}, "ZeRO-3"),
        ({"train_only": "decoder,head"}, "no part 'head'"),
        ({"train_only": "projector", "use_lora": True}, "leave it out with --use_lora"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end needs"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs --load_best_model_at_end"),
        ({"resume_from_checkpoint": "no/such/checkpoint"}, "there is no such directory"),
        ({"push_to_hub": True}, "--push_to_hub needs --hub_model_id"),
        ({"model_name_or_path": "/no/such/model"}, "there is no such directory"),
        ({"model_name_or_path": "nobody/nothing"}, "the hub can't be reached, or has no such model"),
        ({"data_dir": "/no/such/data"}, "--data_dir takes the folder of DocVQA's official files"),
        ({"data_dir": None}, "on a machine without access use --data_dir"),
    ],
)
def test_flags(options, expected, monkeypatch, data, tmp_path):
    assert expected in message(monkeypatch, data, tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_without_a_file_it_needs(name, monkeypatch, data, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    said = message(monkeypatch, data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "lacks" in said and name in said and "copy the checkpoint's files" in said


def test_a_checkpoint_of_another_architecture(monkeypatch, data, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    said = message(monkeypatch, data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "is a llama checkpoint" in said and "Phi-3-vision" in said
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert said == message(monkeypatch, data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    said = message(monkeypatch, data, tmp_path / "out", model_name_or_path=tmp_path / "model")
    assert "config.json is no JSON object" in said


@pytest.mark.parametrize(
    ("capability", "installed", "options", "expected"),
    [
        ((8, 0), (), {}, "varlen"),
        ((9, 0), (2, 3), {}, "varlen"),
        ((9, 0), (), {"use_flash_attention": True}, "varlen"),
        ((8, 0), (2, 3), {"use_flash_attention": True}, "flash_attention_2"),
        ((9, 0), (2, 3), {"use_flash_attention": True}, "flash_attention_3"),
        ((9, 0), (2, 3, 4), {"use_flash_attention": True}, "flash_attention_4"),
        ((12, 0), (2, 3, 4), {"use_flash_attention": True}, "flash_attention_2"),
        ((8, 0), (2,), {"attn_implementation": "sdpa"}, "sdpa"),
        ((7, 5), (2,), {}, "varlen"),
        ((7, 0), (2,), {"use_flash_attention": True}, "no flash kernel runs on Some GPU"),
        ((7, 0), (2,), {"attn_implementation": "flash_attention_2"}, "finds no GPU that it runs on"),
        ((8, 0), (3,), {"attn_implementation": "flash_attention_3"}, "finds no GPU that it runs on"),
    ],
)
def test_attention_by_gpu_and_what_is_installed(capability, installed, options, expected, monkeypatch):
    from argparse import Namespace

    from common import model
    from common.phi3v.attention import has_varlen_kernel

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for number in (2, 3, 4):
        monkeypatch.setattr(model, f"is_flash_attn_{number}_available", lambda number=number: number in installed)
    has_varlen_kernel.cache_clear()
    args = Namespace(**{"use_flash_attention": False, "attn_implementation": None} | options)
    try:
        chosen = model.choose_attention(args, torch.device("cuda"))[0]
    except ValueError as error:
        chosen = str(error)
    finally:
        has_varlen_kernel.cache_clear()
    assert expected in chosen


def test_bf16_on_a_gpu_without_it(monkeypatch):
    from argparse import Namespace

    from common.model import training_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ValueError, match="--bf16: Tesla V100 has no bf16"):
        training_precision(Namespace(bf16=True), torch.device("cuda"))
    assert training_precision(Namespace(bf16=True), torch.device("cpu")) == "bf16"


def break_missing(data):
    (data / "documents" / "train2.png").unlink()
    return "train2.png is missing", "take its row out"


def break_no_picture(data):
    (data / "documents" / "train1.png").write_text("not a picture")
    return "train1.png can't be read", "replace the file"


def break_cut_short(data):
    path = data / "documents" / "val0.png"
    Image.effect_noise((300, 300), 50).save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    return "val0.png can't be decoded", "replace the file"


def break_json(data):
    (data / "train_v1.0_withQT.json").write_text("{")
    return "train_v1.0_withQT.json is no valid JSON", "download it again"


def break_schema(data):
    (data / "train_v1.0_withQT.json").write_text("[]")
    return "is not in DocVQA's schema", '"data"'


def break_entry(data):
    path = data / "train_v1.0_withQT.json"
    content = json.loads(path.read_text())
    del content["data"][3]["answers"]
    path.write_text(json.dumps(content))
    return 'entry 3 of "data"', '"answers"'


def break_empty(data):
    (data / "val_v1.0_withQT.json").write_text('{"data": []}')
    return "val_v1.0_withQT.json is empty", "no question"


@pytest.mark.parametrize(
    "damage", [break_missing, break_no_picture, break_cut_short, break_json, break_schema, break_entry, break_empty]
)
def test_data(damage, monkeypatch, data, tmp_path):
    expected = damage(data)
    said = message(monkeypatch, data, tmp_path / "out")
    assert all(part in said for part in expected), said
    assert not (tmp_path / "out" / "eval_before.json").exists()


@pytest.mark.slow
def test_every_process_says_it_and_ends(data, tmp_path):
    (data / "documents" / "train2.png").unlink()
    run = torchrun(SCRIPT, *flags(data, tmp_path / "out"), timeout=180)
    assert run.returncode != 0
    assert "error: picture" in run.stdout and f'{SCRIPT}", line' not in run.stdout


@pytest.mark.slow
def test_without_torchrun_the_exit_code_is_one(data, tmp_path):
    (data / "train_v1.0_withQT.json").unlink()
    command = [sys.executable, SCRIPT, *flags(data, tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == 1 and "train_v1.0_withQT.json is missing" in run.stderr
    assert "Traceback" not in run.stderr
