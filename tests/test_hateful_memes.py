"""finetune_hf_trainer_hateful_memes.py: sources, answer probabilities, metrics, invalid data, runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from forked import finetune_forked
from PIL import Image as PillowImage
from runs import weights
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoProcessor

import finetune_hf_trainer_hateful_memes as script
from common.evaluation import generation
from tools.merge_lora import merge

SCRIPT = "finetune_hf_trainer_hateful_memes.py"


def load_rows(args):
    return script.load_train_rows(args), script.load_eval_rows(args)


def write_release(folder, labels, split):
    """Memes of plain colours and different sizes in the official layout."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, label in enumerate(labels):
        name = f"img/{split}{number:05d}.png"
        PillowImage.new("RGB", (60 + 30 * number, 90), (255 * label, 40 * number % 256, 90)).save(folder / name)
        rows.append({"id": 1000 + number, "img": name, "label": label, "text": "words"})
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def release(tmp_path):
    write_release(tmp_path / "memes", [0, 1, 1, 0, 1, 0], "train")
    write_release(tmp_path / "memes", [1, 0, 0, 1, 1], "dev_seen")
    return tmp_path / "memes"


def test_official_rows(release, parse):
    train_rows, eval_rows = load_rows(parse(script, "--data_dir", release))
    assert (len(train_rows), len(eval_rows)) == (6, 5)
    assert [row["id"] for row in eval_rows] == ["1000", "1001", "1002", "1003", "1004"]
    question = "Does this meme promote hate speech?\nAnswer yes or no."
    turn = {"images": [str(release / "img/dev_seen00000.png")], "user": question, "assistant": "Yes."}
    assert script.to_conversation(eval_rows[0]) == {"conversations": [turn]}
    assert script.to_conversation(eval_rows[1])["conversations"][0]["assistant"] == "No."
    limited = parse(script, "--data_dir", release, "--max_train_samples", 2, "--max_eval_samples", 3)
    assert [len(rows) for rows in load_rows(limited)] == [2, 3]


def test_hub_rows(tmp_path, monkeypatch, parse):
    rows = [
        {
            "images": [PillowImage.new("RGB", (50 + number, 40))],
            "texts": [{"user": f"Wording {number}\nAnswer yes or no.", "assistant": answer, "source": "hateful"}],
        }
        for number, answer in enumerate(["Yes.", "No.", "No.", "Yes.", "No."])
    ]
    texts = [{"user": Value("string"), "assistant": Value("string"), "source": Value("string")}]
    features = Features({"images": List(Image()), "texts": texts})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "hateful_memes/train-0.parquet")
    monkeypatch.setattr(script, "HUB", (str(tmp_path / "hateful_memes"),))
    monkeypatch.setattr(script, "HUB_EVAL_ROWS", 2)
    train_rows, eval_rows = load_rows(parse(script))
    assert [row["label"] for row in eval_rows] == [1, 0]
    assert [row["label"] for row in train_rows] == [0, 1, 0]
    turn = script.to_conversation(train_rows[1])["conversations"][0]
    assert turn["user"] == script.QUESTION
    assert set(turn["images"][0]) == {"bytes", "path"}  # not decoded
    limited = parse(script, "--max_train_samples", 1)
    assert [len(rows) for rows in load_rows(limited)] == [1, 2]

    rows[1]["texts"][0]["assistant"] = "Maybe."
    Dataset.from_list(rows, features).to_parquet(tmp_path / "other/train-0.parquet")
    monkeypatch.setattr(script, "HUB", (str(tmp_path / "other"),))
    with pytest.raises(ValueError, match=r'/other, train, row 1: expected the answer "No." or "Yes.", got "Maybe."'):
        load_rows(parse(script))
    monkeypatch.setattr(script, "HUB", (str(tmp_path / "hateful_memes"),))
    monkeypatch.setattr(script, "HUB_EVAL_ROWS", 5)
    for more in ([], ["--streaming"]):
        with pytest.raises(ValueError, match="no training rows are left: the dataset is too small"):
            load_rows(parse(script, *more))


@pytest.mark.parametrize("by_likelihood", [False, True])
def test_evaluation(release, parse, monkeypatch, by_likelihood):
    args = parse(script, "--data_dir", release, *["--eval_by_likelihood"] * by_likelihood)
    rows = load_rows(args)[1]
    asked = []

    def generate(model, processor, conversations, choices, args, generate):
        asked.append((conversations, choices, generate))
        return ["yes", "Yes.", "No.", "no", "?"], np.log([[0.1, 0.3], [0.3, 0.2], [0.2, 0.1], [0.2, 0.6], [0.3, 0.1]])

    monkeypatch.setattr(script, "generate_with_log_probabilities", generate)
    found = script.evaluate(None, None, rows, args)
    assert asked == [([script.to_conversation(row) for row in rows], ("No.", "Yes."), not by_likelihood)]
    assert [entry.id for entry in found.predictions] == ["1000", "1001", "1002", "1003", "1004"]
    labels, p_yes = ([entry.more[name] for entry in found.predictions] for name in ("label", "p_yes"))
    assert labels == [1, 0, 0, 1, 1] and p_yes == pytest.approx([0.75, 0.4, 1 / 3, 0.75, 0.25])
    right = [1, 1, 1, 1, 0] if by_likelihood else [1, 0, 1, 0, 0]
    assert [entry.score for entry in found.predictions] == right
    name = "accuracy_by_likelihood" if by_likelihood else "accuracy"
    assert found.metric == "auroc" and found.values == {"auroc": roc_auc_score(labels, p_yes), name: sum(right) / 5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1, "img": "img/train00000.png", "label": 2}', 'line 7: requires "img" (name of the image) and "label"'),
        ('{"id": 1, "label": 1}', "train.jsonl, line 7: requires"),
        ('{"id": 1, "img": "img/gone.png", "label": 1}', "gone.png is missing: put the file there"),
    ],
)
def test_an_invalid_row_is_named(release, parse, line, message):
    with (release / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError) as raised:
        load_rows(parse(script, "--data_dir", release))
    assert message in str(raised.value)


def test_a_file_that_is_missing_empty_or_of_one_label_is_named(release, parse):
    args = parse(script, "--data_dir", release)
    write_release(release, [1, 1], "dev_seen")
    with pytest.raises(ValueError, match=r"memes: AUROC requires rows with both labels, .* use a dataset"):
        load_rows(args)
    write_release(release, [1, 0], "dev_seen")
    with pytest.raises(ValueError, match=r"memes: AUROC .* but all have one: increase --max_eval_samples"):
        load_rows(parse(script, "--data_dir", release, "--max_eval_samples", 1))
    (release / "dev_seen.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"dev_seen\.jsonl is empty"):
        load_rows(args)
    (release / "dev_seen.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"dev_seen\.jsonl is missing: --data_dir must be the folder of Hateful Memes's official"
    ):
        load_rows(args)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_that_generates_nothing(release, random_model, tmp_path, parse, monkeypatch):
    out = tmp_path / "out"
    options = {"model_name_or_path": random_model, "batch_size": 2, "batch_size_per_gpu": 1, "max_steps": 2}
    finetune_forked(release, out, script=SCRIPT, **options)
    assert "before finetuning: auroc" in (tmp_path / "out.log").read_text()
    before, after = (json.loads((out / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    assert (after["metric"], after["samples"]) == ("auroc", 5)
    assert [entry["p_yes"] for entry in before["predictions"]] != [entry["p_yes"] for entry in after["predictions"]]
    args = parse(script, "--data_dir", release, "--eval_by_likelihood", "--dataloader_num_workers", 0, "--no-tqdm")
    monkeypatch.delattr(generation, "_generate")  # which this flag avoids
    model, processor = AutoModelForCausalLM.from_pretrained(out), AutoProcessor.from_pretrained(out)
    alone = script.evaluate(model, processor, load_rows(args)[1], args)
    for entry, expected in zip(after["predictions"], alone.predictions, strict=True):
        assert entry["id"] == expected.id
        assert entry["p_yes"] == pytest.approx(expected.more["p_yes"], rel=1e-4)


@pytest.mark.slow
def test_a_qlora_adapter_trains_resumes_and_merges(release, random_model, tmp_path):
    options = {"script": SCRIPT, "model_name_or_path": random_model, "use_qlora": True}
    options |= {"batch_size": 2, "batch_size_per_gpu": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    log = finetune_forked(release, tmp_path / "straight", lora_rank=4, **options)
    shutil.copytree(tmp_path / "straight/checkpoint-1", tmp_path / "resumed/checkpoint-1")
    assert finetune_forked(release, tmp_path / "resumed", lora_rank=4, resume_from_checkpoint="auto", **options) == log
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    merge(str(tmp_path / "straight"), tmp_path / "merged")
    merged, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "merged", random_model))
    assert any(not torch.equal(merged[name], base[name]) for name in base)
