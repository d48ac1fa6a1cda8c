"""Particular broken files, most of which test_fuzz.py has found."""

import json
import os
import shutil

import pytest
import torch
from broken_files import read

from common import arguments
from common.data.pictures import check_picture
from common.data.sources import load_conversations
from common.model.inference import find_adapter, load_full
from common.runtime.files import read_json
from common.runtime.process import InputError


@pytest.fixture
def directory(random_model, tmp_path):
    """A copy of the random checkpoint."""
    return shutil.copytree(random_model, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "change", "refused"),
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": None}}, False),
        ("config.json", {"original_max_position_embeddings": 1}, True),
        # tokenizers panics when it encodes a text, with an exception that is no Exception.
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing", "special_tokens": {}}}, True),
    ],
)
def test_a_file_of_a_checkpoint(name, change, refused, directory):
    content = json.loads((directory / name).read_text(encoding="utf-8")) | change
    if name == "tokenizer.json":
        undefined = {"SpecialToken": {"id": "<undefined>", "type_id": 0}}
        content["post_processor"] |= {"single": [undefined, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [undefined]}
    (directory / name).write_text(json.dumps(content))
    assert (read(lambda: load_full(str(directory), "cpu")) is None) == refused


CHANGES = [{"lora_dropout": []}, {"lora_alpha": 10**400}, {"lora_alpha": float("inf")}]
CHANGES += [{"base_model_name_or_path": "x" * 5000}, None]


@pytest.mark.parametrize("changes", CHANGES)
def test_an_adapter_that_cannot_be_one(changes, tmp_path):
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": 0, "target_modules": "", "use_dora": False}
    content |= {"use_rslora": False, "init_lora_weights": True} | (changes or {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(content) if changes else '{"a":' * 100_000)
    (tmp_path / "adapter_model.safetensors").touch()
    assert bool(arguments.adapter_settings(str(tmp_path))) == ("base_model_name_or_path" in content)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        find_adapter(tmp_path)


def test_pickles_are_refused_by_name(directory, tmp_path):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read: a pickle can run code"):
        load_full(str(directory), "cpu")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is not read: a pickle can run code"):
        find_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_json_in_an_encoding_that_libraries_do_not_read_is_refused(name, encoding, directory):
    text = (directory / name).read_text(encoding="utf-8")
    (directory / name).write_text(text, encoding=encoding)
    with pytest.raises(InputError, match=rf"{name}|tokenizer or image processor files cannot be read"):
        load_full(str(directory), "cpu")


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)]
)
def test_what_is_not_a_regular_file_is_refused_at_once(make, directory, tmp_path):
    make(tmp_path / "a.png")
    assert read(lambda: check_picture(tmp_path / "a.png")) is None
    assert read(lambda: read_json(tmp_path / "a.png", "put a file there")) is None
    assert read(lambda: load_conversations(tmp_path / "a.png", tmp_path)) is None
    make(directory / "z.safetensors")  # which nothing loads
    assert read(lambda: load_full(str(directory), "cpu")) is not None
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json", "chat_template.jinja"):
        (directory / name).rename(tmp_path / "kept")
        make(directory / name)
        read(lambda: load_full(str(directory), "cpu"))
        os.rmdir(directory / name) if make is os.mkdir else os.unlink(directory / name)
        (tmp_path / "kept").rename(directory / name)
