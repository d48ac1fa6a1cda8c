"""finetune_hf_trainer_docvqa.py on the Hub's datasets: rows, splits, random choices, evaluation."""

import argparse
import io
import json
import random
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, needs_data
from forked import be_process, finetune_forked
from huggingface_hub import ModelCard
from PIL import Image

import finetune_hf_trainer_docvqa as script
from common.data.samples import TrainingData
from common.data.shards import open_hub


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (60 + 9 * number, 80), (40 * number % 256, 9, 200)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch, own_cache):
    """Both datasets in the Hub's layout: the 1,200 examples, here 7 and 3, and pages with several questions, here 5."""
    for split, count in (("train", 7), ("test", 3)):
        rows = [
            {
                "id": f"{split}_{number}",
                "image": picture(number),
                "query": {"de": f"Was ist {number}?", "en": f"What is {number}?"},
                "answers": [str(number), f"{number}.", f"Number {number}"][: 1 + number % 3],
            }
            for number in range(count)
        ]
        (tmp_path / "mini").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"mini/{split}-00000-of-00001.parquet")
    rows = []
    for number in range(5):
        texts = [
            {"user": f"Question {number}.{text}?\nAnswer briefly.", "assistant": f"{number}.{text}.", "source": "docvqa"}
            for text in range(number + 1)
        ]
        rows.append({"images": [picture(number)], "texts": texts})
    (tmp_path / "full").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "full/train-00000-of-00001.parquet")
    monkeypatch.setattr(script, "MINI", str(tmp_path / "mini"))
    monkeypatch.setattr(script, "FULL", (str(tmp_path / "full"),))


@pytest.fixture
def load(parse):
    def load_rows(*arguments):
        args = parse(script, *arguments)
        return script.load_train_rows(args), script.load_eval_rows(args)

    return load_rows


def test_mini_trains_and_evaluates_on_its_own_splits(load):
    train_rows, eval_rows = load()
    assert [row["id"] for row in train_rows] == [f"train_{number}" for number in range(7)]
    assert [row["id"] for row in eval_rows] == [f"test_{number}" for number in range(3)]
    assert train_rows[4] == {
        "id": "train_4",
        "image": picture(4),  # not decoded
        "question": "What is 4?",
        "answers": ["4", "4."],
        "texts": [{"user": "What is 4?\nAnswer briefly.", "assistant": answer} for answer in ("4", "4.")],
    }
    turn = {"images": [picture(3)], "user": "What is 3?\nAnswer briefly.", "assistant": "3"}
    assert script.to_conversation(train_rows[3], random.Random(0)) == {"conversations": [turn]}
    assert [len(rows) for rows in load("--max_train_samples", 2, "--max_eval_samples", 1)] == [2, 1]
    assert [len(rows) for rows in load("--max_train_samples", 200, "--max_eval_samples", 100)] == [7, 3]


def test_full_train_uses_every_page_and_evaluates_on_the_examples(load):
    train_rows, eval_rows = load("--full_train")
    assert [len(row["texts"]) for row in train_rows] == [1, 2, 3, 4, 5]
    assert [row["id"] for row in eval_rows] == ["test_0", "test_1", "test_2"]
    turn = {"images": [picture(0)], "user": "Question 0.0?\nAnswer briefly.", "assistant": "0.0."}
    assert script.to_conversation(train_rows[0], random.Random(0)) == {"conversations": [turn]}
    assert [len(rows) for rows in load("--full_train", "--max_train_samples", 2, "--max_eval_samples", 1)] == [2, 1]


@pytest.mark.parametrize("arguments", [(), ("--full_train",)])
def test_streamed_rows_are_the_same(load, arguments):
    train_rows, eval_rows = load(*arguments)
    streamed, same_eval_rows = load(*arguments, "--streaming")
    rows = sorted(streamed.rows(0, 0), key=lambda row: row.number)
    assert [row.content for row in rows] == list(train_rows)
    assert list(same_eval_rows) == list(eval_rows)


@pytest.mark.parametrize(("arguments", "row"), [((), 5), (("--full_train",), 4)])
def test_random_choices_depend_on_seed_epoch_and_row(load, arguments, row):
    """One of several accepted answers, or one question of a page, per epoch; over the epochs all of them."""
    data = TrainingData(load(*arguments)[0], script.to_conversation, processor=None, seed=3)
    again = TrainingData(load(*arguments)[0], script.to_conversation, processor=None, seed=3)
    other = TrainingData(load(*arguments)[0], script.to_conversation, processor=None, seed=4)
    turns = [data.conversation(epoch, row)["conversations"][0] for epoch in range(60)]
    assert turns == [again.conversation(epoch, row)["conversations"][0] for epoch in range(60)]
    assert turns != [other.conversation(epoch, row)["conversations"][0] for epoch in range(60)]
    drawn = Counter(turn["assistant"] for turn in turns)
    assert set(drawn) == ({f"4.{text}." for text in range(5)} if arguments else {"5", "5.", "Number 5"})
    assert max(drawn.values()) < 40


@pytest.mark.parametrize(("full_train", "score"), [(False, 0), (True, 1)])
def test_evaluation(load, full_train, score, monkeypatch):
    """Only with --full_train, whose answers end with a period, a period is left out."""
    rows = load()[1]
    monkeypatch.setattr(script, "generate_answers", lambda *_: [" 0.\n", "1", "number 2"])
    found = script.evaluate(None, None, rows, argparse.Namespace(full_train=full_train))
    assert [entry.id for entry in found.predictions] == ["test_0", "test_1", "test_2"]
    assert [entry.question for entry in found.predictions] == ["What is 0?", "What is 1?", "What is 2?"]
    assert [entry.answers for entry in found.predictions] == [["0"], ["1", "1."], ["2", "2.", "Number 2"]]
    assert [entry.prediction for entry in found.predictions] == ["0" if full_train else "0.", "1", "number 2"]
    assert [entry.score for entry in found.predictions] == [score, 1, 1]
    assert [entry.more["score_case_sensitive"] for entry in found.predictions] == [1, 1, 0.875]
    assert found.metric == "anls"
    assert found.values == {"anls": fmean([score, 1, 1]), "anls_case_sensitive": fmean([1, 1, 0.875])}


def be_process_with_hub(folder: Path, *arguments: object) -> None:
    """One process of a run for which folders take the place of the Hub's datasets, under their names there."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    folders = {script.MINI: folder / "mini", script.FULL[0]: folder / "full"}
    script.open_hub = script.load_hub = lambda *name, **options: open_hub(str(folders[name[0]]), **options)
    be_process(*arguments)


@pytest.mark.slow
def test_the_card_of_full_train_names_both_datasets(random_model, tmp_path):
    options = {"data_dir": None, "full_train": True, "model_name_or_path": random_model, "use_lora": True, "max_steps": 1}
    target = partial(be_process_with_hub, tmp_path)
    finetune_forked(tmp_path, tmp_path / "out", processes=1, target=target, **options)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.datasets == ["HuggingFaceM4/the_cauldron"]
    found = {(result.dataset_type, result.dataset_config, result.dataset_split) for result in card.data.eval_results}
    assert found == {("nielsr/docvqa_1200_examples", None, "test")}
    expected = "HuggingFaceM4/the_cauldron: 5 training rows, 3 evaluation rows (nielsr/docvqa_1200_examples test)."
    assert expected in card.text


@needs_data
@pytest.mark.slow
def test_real_scans_are_learned_from(tmp_path):
    options = {"num_crops": 2, "max_steps": 4, "learning_rate": 5e-4}
    log = finetune_forked(SHARED / "data/docvqa", tmp_path / "out", max_train_samples=16, max_eval_samples=1, **options)
    losses = [entry["loss"] for entry in log]
    assert fmean(losses[-2:]) < fmean(losses[:2]) - 0.3
    for when in ("before", "after"):
        assert json.loads((tmp_path / f"out/eval_{when}.json").read_text())["samples"] == 1
