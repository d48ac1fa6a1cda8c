"""finetune_hf_trainer_jsonl.py: formats, several files, the split for evaluation, metrics, and a run."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from forked import finetune_forked
from PIL import Image
from runs import weights, write_random_model
from transformers import AutoProcessor, get_scheduler

import finetune_hf_trainer_jsonl as script
from common.arguments import SCHEDULES
from common.data.batches import PlannedBatches, epoch_steps
from common.data.formats import read_lines
from common.data.mixing import Mixture
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.sources import find_image_dir, load_conversations
from common.runtime.parser import Parser
from common.runtime.process import InputError
from common.training.resuming import data_fingerprint

QUESTIONS = {"0.png": "What is it, then?", "1.png": 'Say "red"', "2.png": "Über\nzwei Zeilen?"}


@pytest.fixture
def folder(tmp_path, own_cache):
    """Three pictures, and a copy of the first."""
    (tmp_path / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (60 + number, 50), colour).save(tmp_path / f"images/{number}.png")
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/copy.png")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def row(*names, user="What?", assistant="Red.", **fields):
    return {"conversations": [{"images": list(names), "user": user, "assistant": assistant}], **fields}


@pytest.fixture
def load(parse):
    """Loads the rows of a run with these flags."""
    return lambda *flags: script.load_rows(parse(script, *flags, "--no-tqdm"))


def places(rows):
    return [rows.place(index).rpartition("/")[2] for index in range(len(rows))]


# ----------------------------------------------------------------------------------------------------------------------
# Formats
# ----------------------------------------------------------------------------------------------------------------------


def write_table(path, delimiter=",", **options):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=delimiter, **options)
        table.writerow(["Image", "question", "answer"])
        table.writerows((name, question, "Red.") for name, question in QUESTIONS.items())


def test_every_format_is_the_same_conversations_and_is_named(folder, capsys):
    general = [row(name, user=question) for name, question in QUESTIONS.items()]
    messages = [
        {"images": [name], "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Red."}]}
        for name, question in QUESTIONS.items()
    ]
    said = [[{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}] for question in QUESTIONS.values()]
    llava = [{"image": name, "conversations": turns} for name, turns in zip(QUESTIONS, said, strict=True)]
    write(folder / "general.jsonl", general)
    write(folder / "messages.jsonl", messages)
    (folder / "llava.json").write_text(f"\n {json.dumps(llava)}", "utf-8")
    write_table(folder / "comma.csv")
    write_table(folder / "semicolon.csv", delimiter=";", quoting=csv.QUOTE_ALL)
    write_table(folder / "tab.tsv", delimiter="\t")
    formats = {
        "general.jsonl": "general format, one JSON object per line",
        "messages.jsonl": "chat messages (OpenAI, TRL), one JSON object per line",
        "llava.json": "LLaVA or ShareGPT, a JSON array",
        "comma.csv": "CSV",
        "semicolon.csv": "CSV",
        "tab.tsv": "CSV",
    }
    loaded = {name: list(load_conversations(folder / name, folder / "images")) for name in formats}
    assert all(rows == loaded["general.jsonl"] for rows in loaded.values())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data:")]
    assert lines == [
        f"data:        {folder / name} ({what}): 3 rows with 3 images from {folder}/images" for name, what in formats.items()
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,question\n", 'line 1: the header has no column "answer": expected image, question, answer'),
        ("image,question,answers\n", 'did you mean "answer"?'),
        ("image,image,question,answer\n", "line 1: the header has a column twice"),
        ('image,question,answer\n0.png,"a\nb",c\n0.png,Red, or not?,d\n', "line 4: 4 fields, but the header has 3: put quotes"),
        ('image,question,answer\n0.png,"What?,Red\n', "line 2: invalid CSV (unexpected end of data): quote texts"),
        ("image,question,answer\n0.png,What?,\n", 'line 2, turn 1: "assistant" must be a non-empty string'),
        ("image,question,answer\n", "is empty: expected at least one row"),
        (b"image,question,answer\n0.png,Stra\xdfe?,Red\n", "not UTF-8"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_its_line(text, message, folder):
    (folder / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        load_conversations(folder / "data.csv", folder / "images")
    assert message in str(error.value)


def test_a_row_of_a_table_without_quotes_can_be_skipped(folder):
    (folder / "data.csv").write_text("image,question,answer\n0.png,What?,Red\n0.png,Red, or not?,d\n1.png,Or?,Green\n")
    rows = load_conversations(folder / "data.csv", folder / "images", skip_bad=True)
    assert places(rows) == ["data.csv, line 2", "data.csv, line 4"]


def test_a_row_of_a_table_without_a_picture_is_text(folder):
    (folder / "data.csv").write_text("id,image,question,answer,system\n7,,What?,Red,Be brief.\n,,,,\n")
    [(place, line)] = read_lines(folder / "data.csv")
    assert place.endswith("data.csv, line 2")
    turn = {"user": "What?", "assistant": "Red"}
    assert json.loads(line) == {"id": "7", "system": "Be brief.", "conversations": [turn]}


# ----------------------------------------------------------------------------------------------------------------------
# Which rows
# ----------------------------------------------------------------------------------------------------------------------


def test_images_are_found_beside_the_file_or_in_its_folder_of_images(folder, load):
    write(folder / "train.jsonl", [row("0.png")])
    write(folder / "val.jsonl", [row(), row("images/1.png")])
    train_rows, eval_rows = load("--data_dir", folder)
    assert train_rows[0]["conversations"][0]["images"] == [f"{folder}/images/0.png"]
    assert eval_rows[1]["conversations"][0]["images"] == [f"{folder}/images/1.png"]
    assert find_image_dir(write(folder / "bad.jsonl", [{}, row("images/1.png")])) == folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is no train.jsonl to train on: pass --train_file, or its folder as --data_dir"),
        (["--data_dir", "{}"], "there is no {}/val.jsonl to evaluate on: pass --eval_file, or --eval_fraction 0.1"),
        (["--data_dir", "{}", "--eval_fraction", "0.5", "--eval_file", "a"], "excludes --eval_file"),
        (["--data_dir", "{}", "--eval_fraction", "1.5"], "--eval_fraction must be between 0 and 1"),
        (["--data_dir", "{}", "--eval_fraction", "0.5", "--train_weights", "1", "2"], "one number above 0 for each"),
        (["--data_dir", "{}", "--eval_fraction", "0.5", "--train_weights", "nan"], "one number above 0 for each"),
        (["--data_dir", "{}", "--eval_fraction", "0.1"], "--eval_fraction 0.1: rows that share an image stay together"),
        (["--data_dir", "{}", "--eval_fraction", "0.9", "--max_eval_samples", "1"], "use a larger --max_eval_samples, "),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, folder, load, monkeypatch):
    def refuse(parser, text):
        raise InputError(text)

    monkeypatch.setattr(Parser, "error", refuse)
    write(folder / "train.jsonl", [row("0.png"), row("copy.png", user="Other?")])
    with pytest.raises(InputError) as error:
        load(*(flag.format(folder) for flag in flags))
    assert message.format(folder) in str(error.value)


def test_no_picture_is_on_both_sides_of_the_split(folder, load):
    for number in range(40):
        Image.effect_noise((60, 50), 80).save(folder / f"images/noise{number}.png")
    chain = [row(f"noise{number}.png", f"noise{number + 1}.png", user=f"{number}?") for number in range(5)]
    pages = [row(f"noise{number}.png", user=f"{page}?") for number in range(10, 40) for page in range(3)]
    same = [row("0.png", user="Copy?"), row("copy.png", user="Of it?")]
    write(folder / "a.jsonl", chain + same)
    write(folder / "b.jsonl", [*pages, row(user="Text"), row(user="Text", id="again")])
    flags = ["--data_dir", folder, "--train_file", "a.jsonl", "b.jsonl", "--train_weights", 2, 1, "--eval_fraction", 0.2]
    train_rows, eval_rows = load(*flags)
    assert (len(train_rows), len(eval_rows)) == (79, 20)
    assert sorted(places(train_rows) + places(eval_rows)) == sorted(
        [f"a.jsonl, line {number}" for number in range(1, 8)] + [f"b.jsonl, line {number}" for number in range(1, 93)]
    )

    def contents(rows):
        turns = [row["conversations"][0] for row in rows]
        images = {Path(name).read_bytes() for turn in turns for name in turn["images"]}
        return images | {turn["user"] for turn in turns if not turn["images"]}

    assert not contents(train_rows) & contents(eval_rows)
    known = {index: found for index, found, *_ in eval_rows.contents.rows.tolist()}
    everything = {found: index for index, found, *_ in train_rows.contents.rows.tolist()}
    assert sorted(known) == list(range(20)) and not set(known.values()) & everything.keys()
    in_a = sum(place.startswith("a") for place in places(train_rows))
    assert train_rows.mixture.per_epoch == [2 * in_a, 79 - in_a]
    assert data_fingerprint(TrainingData(train_rows, script.to_conversation, None, 0)).endswith(", --train_weights 2 1")
    assert places(load(*flags)[1]) == places(eval_rows)
    other = places(load(*flags, "--seed", 1)[1])
    assert places(load(*flags, "--seed", 1, "--eval_only")[1]) == other != places(eval_rows)
    assert len(load(*flags, "--max_eval_samples", 7)[1]) in (5, 6, 7)


@pytest.mark.parametrize("weight", [1, 2, 0.5, 0.3, 1.5])
def test_a_weight_is_how_often_rows_occur(weight):
    mixture = Mixture([10, 7], [weight, 1], seed=3)
    epochs = [mixture.rows(epoch) for epoch in range(20)]
    assert all(len(rows) == len(mixture) for rows in epochs)
    assert all(sorted(rows[rows >= 10]) == list(range(10, 17)) for rows in epochs)
    counts = Counter(np.concatenate(epochs).tolist())
    assert all(counts[row] == 20 * weight for row in range(10))
    for rows in epochs:
        assert {count for _, count in Counter(rows[rows < 10].tolist()).items()} <= {int(weight), int(weight) + 1}
    assert (weight == 0.5) == (not set(epochs[0][epochs[0] < 10]) & set(epochs[1][epochs[1] < 10]) and weight >= 0.5)
    assert any(not np.array_equal(epochs[0], rows) for rows in epochs) == (weight not in (1, 2))


def test_steps_of_a_mixture_take_its_rows_on_all_processes():
    mixture = Mixture([10, 7], [1.5, 1], seed=3)
    for epoch in (0, 1):
        taken = []
        for rank in (0, 1):
            batches = PlannedBatches(mixture, 4, 5, rank, 2, accumulation=2)
            batches.set_epoch(epoch)
            assert len(batches) == len(list(batches)) == 2 * 6
            taken += [key for batch in batches for key in batch]
        expected = mixture.rows(epoch).tolist()
        assert not Counter(expected) - Counter(row for _, row in taken)
        assert len(taken) == 24 and {found for found, _ in taken} == {epoch}
    assert np.array_equal(epoch_steps(Mixture([10, 7], [1, 1], 0), 4, 5, 0), epoch_steps(17, 4, 5, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Scores and runs
# ----------------------------------------------------------------------------------------------------------------------


def test_predictions_have_ids_of_their_own_and_every_score():
    rows = [row(user="What?", assistant="1,250", id=name) for name in ("a", "a", None, "b")]
    twice = Rows([row(id=None)] * 2, lambda index: f"{'ab'[index]}/val.jsonl, line 1")
    assert [entry.id for entry in script.score_all(twice, ["", ""], ["exact"])] == ["val.jsonl, line 1", "b/val.jsonl, line 1"]
    rows = Rows(rows, "data/val.jsonl, line {}".format)
    predictions = script.score_all(rows, ["$1,250", " 1,250. ", "It is 1,250 now", "1300"], ["relaxed", "exact", "contains"])
    assert [entry.id for entry in predictions] == ["a", "a (val.jsonl, line 1)", "val.jsonl, line 2", "b"]
    assert [entry.score for entry in predictions] == [1, 1, 0, 1]
    assert [entry.more for entry in predictions] == [
        {"exact": exact, "contains": contains} for exact, contains in ((0, 1), (1, 1), (0, 1), (0, 0))
    ]


def test_rows_of_several_files_are_measured_and_named_as_one(folder, load):
    write(folder / "train.jsonl", [row("0.png"), row("1.png", user="word " * 40)])
    write_table(folder / "val.csv")
    files = ["--train_file", "train.jsonl", "val.csv", "--eval_file", "val.csv"]
    train_rows, _ = load("--data_dir", folder, *files)
    assert places(train_rows) == ["train.jsonl, line 1", "train.jsonl, line 2", *(f"val.csv, line {n}" for n in (2, 3, 4))]
    data = TrainingData(train_rows, script.to_conversation, AutoProcessor.from_pretrained(TINY, num_crops=1), seed=0)
    lengths = [len(data[0, row]["input_ids"]) for row in range(5)]
    assert data.lengths(0, bar=False).tokens.tolist() == lengths and lengths[1] == max(lengths)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_need_no_further_settings_and_can_be_resumed_at_another_rate(name):
    """Resuming at another rate uses the factors of LambdaLR."""
    schedule = get_scheduler(name, torch.optim.AdamW([torch.zeros(1)], lr=1e-3), num_warmup_steps=2, num_training_steps=9)
    factors = [schedule.lr_lambdas[0](step) for step in range(9)]
    assert max(factors) == 1 and (name == "constant") == (factors[0] == 1)


@pytest.mark.slow
def test_a_mixture_resumes_as_it_went(folder):
    """Seven steps in two and a half epochs; gone on from the middle of the second with the other half of a file."""
    shutil.copytree(folder / "images", (data := folder / "my data/receipts") / "images")
    write(data / "a.jsonl", [row("0.png", user=f"a {number}?", assistant=str(number)) for number in range(6)])
    write(data / "b.jsonl", [row("1.png", user=f"b {number}?", assistant=str(number)) for number in range(3)])
    write(data / "val.jsonl", [row("2.png")])
    options = {"script": "finetune_hf_trainer_jsonl.py", "model_name_or_path": write_random_model(folder / "model")}
    options |= {"train_file": ["a.jsonl", "b.jsonl"], "train_weights": [0.5, 2], "batch_size_per_gpu": 1, "max_steps": None}
    options |= {"num_train_epochs": 2.1, "use_lora": True, "lora_rank": 4, "save_strategy": "steps", "save_steps": 4}
    options |= {"task_name": "my receipts", "metric": ["f1", "anls"], "lr_scheduler_type": "cosine_with_restarts"}
    log = finetune_forked(data, folder / "straight", **options)
    assert [entry["step"] for entry in log] == list(range(1, 8))  # 9 rows in 3 steps per epoch
    shutil.copytree(folder / "straight/checkpoint-4", folder / "resumed/checkpoint-4")
    assert finetune_forked(data, folder / "resumed", resume_from_checkpoint="auto", **options) == log
    straight, resumed = weights(folder / "straight"), weights(folder / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    after = json.loads((folder / "straight/eval_after.json").read_text())
    assert after["metric"] == "f1" and {"f1", "anls"} <= after.keys()
    run = json.loads((folder / "straight/run.json").read_text())
    assert (run["task"], run["datasets"]) == ("my receipts", []), "data/receipts is no dataset of the Hub"
    assert "finetuned on my receipts" in (folder / "straight/README.md").read_text()
