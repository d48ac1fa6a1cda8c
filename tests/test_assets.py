"""The embedded checkpoint and the sample data: layouts, sizes, held-out answers, and reproducibility."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from forked import run_processes
from safetensors.torch import load_file

from assets import pretrain_tiny
from assets.draw_samples import draw_samples
from assets.pretraining import batches, documents, shapes, stages
from assets.samples.docvqa import VALUE_KINDS, draw_value, is_held_out
from assets.samples.page import LINES


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_tiny_checkpoint_is_small_and_in_the_published_layout():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "phi3_v" and config["architectures"] == ["Phi3VForCausalLM"]
    assert config["rope_scaling"]["type"] == "su" and config["original_max_position_embeddings"] == 4096
    assert config["vision_config"]["image_size"] == 336 and config["vision_config"]["patch_size"] == 14
    assert config["auto_map"]["AutoConfig"] == "microsoft/Phi-3.5-vision-instruct--configuration_phi3_v.Phi3VConfig"


def test_tiny_tokenizer_has_the_special_tokens_and_all_printable_characters():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
    text = "".join(map(chr, range(32, 127))) + "\nab  c"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    names = ["<|user|>", "<|assistant|>", "<|end|>", "<|system|>", "<|endoftext|>"]
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(names)
    assert tokenizer("☃", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    ids = tokenizer("<|assistant|>\nA").input_ids
    assert ids == tokenizer.convert_tokens_to_ids(["<s>", "<|assistant|>", "A"])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_answers_about_documents_are_held_out(tmp_path):
    """The scripts read the layouts of all sample data in test_readme.py."""
    draw_samples("docvqa", tmp_path, train=12, val=6)
    answers = {}
    for split, count in (("train", 12), ("val", 6)):
        rows = json.loads((tmp_path / f"{split}_v1.0_withQT.json").read_text(encoding="utf-8"))["data"]
        assert len(rows) == 4 * count
        answers[split] = {answer for row in rows for answer in row["answers"]}
    assert all(map(is_held_out, answers["val"]))
    assert not any(map(is_held_out, answers["train"]))


@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_values_are_varied(kind):
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        values = [draw_value(kind, rng, held_out) for _ in range(100)]
        assert all(is_held_out(value) == held_out and len(value) <= 11 for value in values)
        assert len(set(values)) > 80


def pretrain_with_small_batches(*arguments):
    stages.draw_samples = lambda kind, rng, count, *lines: batches.draw_samples(kind, rng, 2, *lines)
    torch.optim._muon._zeropower_via_newtonschulz = lambda update, *_: update  # takes most of the time
    pretrain_tiny.pretrain(*arguments)


@pytest.mark.slow
def test_pretraining_writes_a_checkpoint_like_the_embedded_one(tmp_path, monkeypatch):
    def spawn(target, arguments, nprocs):
        assert target == pretrain_tiny.pretrain
        assert run_processes(pretrain_with_small_batches, [(rank, *arguments) for rank in range(nprocs)]) == [0] * nprocs

    names = ("tower", "decoder", "together", "lookup", "shapes", "last")
    steps = [argument for stage in names for argument in (f"--{stage}_steps", "1")]
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    monkeypatch.setattr(sys, "argv", ["pretrain_tiny", "--output_dir", str(tmp_path), *steps])
    pretrain_tiny.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY.iterdir()}
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_text() == (TINY / name).read_text()
    made, kept = (load_file(directory / "model.safetensors") for directory in (tmp_path, TINY))
    assert {name: tensor.shape for name, tensor in made.items()} == {name: tensor.shape for name, tensor in kept.items()}


def test_pretraining_shows_no_held_out_value():
    """Not as an answer, not quoted in a sentence, and not among the lines to read, which are random characters."""
    rng, quoted = np.random.default_rng(0), []
    asked = [turn for _ in range(200) for turn in documents.form(rng, LINES, 5)[1]]
    assert len(asked) > 600 and not any(is_held_out(turn.answer) for turn in asked)
    for page, asked in (documents.invoice(rng, 6) for _ in range(200)):
        shown = [text for _, _, text in page.texts]
        quoted += [text for turn in asked for text in shown if turn.answer[turn.quote_start :].startswith(text)]
    assert len(quoted) > 900 and not any(map(is_held_out, quoted))
    read = {line for _ in range(1000) for turn in documents.reading(rng, 4)[1] for line in turn.answer.split("\n")}
    held_out = {draw_value(kind, rng, held_out=True) for kind in VALUE_KINDS for _ in range(3000)}
    assert len(read) > 3900 and len(held_out) > 15000 and not read & held_out


@pytest.mark.parametrize("pictures", [1, 2])
def test_half_of_the_statements_in_pretraining_are_true(pictures):
    rng = np.random.default_rng(0)
    asked = [turn for _ in range(200) for turn in shapes.judged(rng, pictures, 8)[1]]
    true = [turn.answer in {yes for _, yes in shapes.VERDICTS} for turn in asked]
    assert 0.45 < np.mean(true) < 0.55
    assert {turn.answer for turn in asked} == {word for words in shapes.VERDICTS for word in words}
    assert all(len(turn.facts) == len(shapes.FACTS) for turn in asked)


def test_labels_are_balanced(tmp_path):
    """Of memes in each split, and of NLVR2 for each sentence, so that neither texts nor frequencies give them away."""
    draw_samples("hateful_memes", tmp_path, train=10, val=6)
    for name, half in (("train", 5), ("dev_seen", 3)):
        labels = [row["label"] for row in read_json_lines(tmp_path / f"{name}.jsonl")]
        assert sum(labels) == half and len(labels) == 2 * half
    draw_samples("nlvr2", tmp_path, train=3, val=2)
    for name, sentences in (("train", 3), ("dev", 2)):
        labels = {}
        for row in read_json_lines(tmp_path / f"{name}.json"):
            labels.setdefault(row["sentence"], []).append(row["label"])
        assert len(labels) <= sentences and sum(map(len, labels.values())) == 4 * sentences
        assert all(label.count("True") == len(label) / 2 for label in labels.values())


@pytest.mark.parametrize("task", ["docvqa", "hateful_memes", "nlvr2"])
def test_a_seed_reproduces_the_sample_data(tmp_path, task):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        draw_samples(task, tmp_path / name, train=2, val=1, seed=seed)
    contents = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two", "other")
    }
    assert contents["one"] == contents["two"]
    assert contents["one"] != contents["other"]


@pytest.mark.parametrize(
    ("task", "train", "evaluated", "files"),
    [
        ("hateful_memes", "train.jsonl", "dev_seen.jsonl", "img"),
        ("nlvr2", "train.json", "dev.json", "images"),
        ("ucf101", None, None, "UCF101_subset"),
    ],
)
def test_evaluation_data_is_not_in_the_training_data(tmp_path, task, train, evaluated, files):
    draw_samples(task, tmp_path)
    contents: dict[bool, set[bytes]] = {True: set(), False: set()}
    trained_on = {row["id"] for row in read_json_lines(tmp_path / train)} if task == "hateful_memes" else None
    for path in (tmp_path / files).rglob("*"):
        if path.is_file():
            trains = int(path.stem) in trained_on if trained_on else "train" in path.relative_to(tmp_path).parts
            contents[trains].add(path.read_bytes())
    if task == "nlvr2":  # an image may occur in both, a pair with its sentence may not
        contents = {
            split == train: {
                tuple(
                    (tmp_path / "images" / folder / f"{row['identifier'].rpartition('-')[0]}-img{side}.png").read_bytes()
                    for side in (0, 1)
                )
                + (row["sentence"],)
                for row in read_json_lines(tmp_path / split)
                for folder in [f"train/{row['directory']}" if split == train else "dev"]
            }
            for split in (train, evaluated)
        }
    assert contents[True] and contents[False] and not contents[True] & contents[False]
