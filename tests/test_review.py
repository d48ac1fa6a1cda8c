"""A run and tools.check_data refuse, warn about, and accept the same data."""

import json
import shutil

import datasets
import pytest
import torch
from conftest import TINY
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_jsonl as jsonl
from common.data.review import longest_evaluation_answer, review_data
from common.data.samples import TrainingData
from common.evaluation import generation
from common.runtime.process import InputError
from tools.check_data import check_files
from tools.checker import Checker


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=1)


@pytest.fixture
def folder(tmp_path, own_cache):
    """Images for training, and one for evaluation."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.effect_noise((60 + number, 50), 80).save(tmp_path / f"images/{number}.png")
    Image.effect_noise((90, 50), 80).save(tmp_path / "images/eval.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "images/tiny.png")
    Image.new("RGB", (5000, 3)).save(tmp_path / "images/narrow.png")
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/copy.png")
    return tmp_path


def row(name, user="What?", assistant="Noise.", **fields):
    turn = {"user": user, "assistant": assistant}
    return {"conversations": [turn | {"images": [name]} if name else turn]} | fields


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def review(parse, processor):
    """Returns the warnings of a run before training."""

    def review(script, *flags):
        args = parse(script, *flags, "--no-tqdm")
        loaded = script.load_rows(args) if script is jsonl else (script.load_train_rows(args), script.load_eval_rows(args))
        data = [TrainingData(rows, script.to_conversation, processor, 0) for rows in loaded]
        longest = longest_evaluation_answer(data[1])
        return review_data(*data, data[0].sample_lengths(), longest, args.max_new_tokens, bar=False)

    return review


def both(folder, review, processor, train, evaluation):
    """The warnings or the error of a run, and the report of check_data."""
    write(folder / "train.jsonl", train)
    write(folder / "val.jsonl", evaluation)
    report = check_files(
        [folder / "train.jsonl", folder / "val.jsonl"], folder / "images", Checker(processor, None, False), False
    )
    try:
        files = ("--data_dir", folder, "--train_file", "train.jsonl", "--eval_file", "val.jsonl")
        return review(jsonl, *files), report
    except InputError as error:
        return error, report


GOOD = [row("0.png"), row("1.png")]
SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Noise."}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(None, images=["0.png"]), 'unknown field "images"'),
        (row("data:image/png;base64," + "A" * 26_711), "must be a list of file names or images, got data:image/png"),
        ({"image": "0.png", "conversations": SAID + SAID[:1]}, 'turn 2: "assistant" must be a non-empty string'),
        (row("narrow.png"), "5,000 × 3 pixels, an aspect ratio"),
        (row("2.png", "word " * 200_000), "tokens exceed the model's context of 131,072"),
    ],
)
def test_what_a_run_refuses_is_a_problem(bad, message, folder, review, processor):
    error, report = both(folder, review, processor, [*GOOD, bad], [row("eval.png")])
    [(_, problem)] = report.problems
    assert isinstance(error, InputError) and message in str(error) and message in problem
    named = "narrow.png" if "aspect" in message else f"{folder}/train.jsonl, line 3"
    assert named in str(error) and f"{folder}/train.jsonl, line 3" in problem
    assert len(problem) < 300


@pytest.mark.parametrize(
    ("train", "evaluation", "of_run", "of_check"),
    [
        (GOOD, [row("eval.png")], [], []),
        ([row(None)], [row("eval.png")], ["no image in 1 training row looked at"], ["train.jsonl: no row has an image"]),
        (GOOD, [row(None)], ["no image in 1 evaluation row looked at"], ["val.jsonl: no row has an image"]),
        ([*GOOD, row("tiny.png")], [row("eval.png")], ["tiny.png is only 1 × 1 pixels"], ["tiny.png is only 1 × 1 pixels"]),
        (
            GOOD,
            [row("eval.png"), row("copy.png", "Other?")],
            ["1 of 2 evaluation images is also a training image, for example image"],
            ["1 image of"],
        ),
        (
            GOOD,
            [row("eval.png"), GOOD[1] | {"id": "other"}],
            ["1 of 2 evaluation rows is also a training row: {}/val.jsonl, line 2", "1 of 2 evaluation images"],
            ["{}/val.jsonl, line 2: same images and texts as {}/train.jsonl, line 2", "1 image of"],
        ),
    ],
)
def test_what_a_run_warns_of_is_a_warning(train, evaluation, of_run, of_check, folder, review, processor):
    warnings, report = both(folder, review, processor, train, evaluation)
    assert report.problems == []
    for found, expected in ((warnings, of_run), ([message for _, message in report.warnings], of_check)):
        assert len(found) == len(expected), found
        assert all(part.format(folder, folder) in message for part, message in zip(expected, found, strict=True)), found


def test_images_of_the_same_name_in_different_folders_differ(folder, review):
    for split in ("train", "val"):
        (folder / split).mkdir()
        Image.effect_noise((90, 50), 80).save(folder / split / "0.png")
        write(folder / split / "rows.jsonl", [row("0.png")])
    files = ("--data_dir", folder, "--train_file", "train/rows.jsonl", "--eval_file", "val/rows.jsonl")
    assert review(jsonl, *files) == []


def test_images_stored_in_the_dataset_are_compared_by_content(folder, review, monkeypatch):
    """In the release, whose files may be copies, and in rows that contain their images."""
    (folder / "img").mkdir()
    for split, names in (("train", ("0", "1")), ("dev_seen", ("copy", "eval"))):
        rows = [{"img": f"images/{name}.png", "label": label} for label, name in enumerate(names)]
        write(folder / f"{split}.jsonl", rows)
    [warning] = review(hateful_memes, "--data_dir", folder)
    assert warning.startswith("1 of 2 evaluation images is also a training image")
    table = [
        {"images": [{"bytes": (folder / f"images/{name}.png").read_bytes(), "path": None}], "texts": [{"assistant": answer}]}
        for name, answer in (("0", "No."), ("1", "Yes."), ("copy", "No."), ("2", "Yes."))
    ]
    (folder / "hub").mkdir()
    datasets.Dataset.from_list(table).to_parquet(folder / "hub/train-0.parquet")
    monkeypatch.setattr(hateful_memes, "HUB", (str(folder / "hub"),))
    monkeypatch.setattr(hateful_memes, "HUB_EVAL_ROWS", 2)
    assert review(hateful_memes) == [
        f"1 of 2 evaluation rows is also a training row: {folder}/hub, train, row 0",
        "1 of 2 evaluation images is also a training image",
    ]


def test_the_longest_expected_answer_limits_the_answers(folder, review, processor, parse, monkeypatch):
    write(folder / "train.jsonl", GOOD)
    write(folder / "val.jsonl", [row("eval.png"), row("eval.png", "Read it.", "word " * 90)])
    files = ("--data_dir", folder, "--train_file", "train.jsonl", "--eval_file", "val.jsonl")
    tokens = len(processor.tokenizer("word " * 90, add_special_tokens=False).input_ids) + 1
    assert tokens > generation.MIN_ANSWER_LIMIT
    assert review(jsonl, *files) == []
    assert review(jsonl, *files, "--max_new_tokens", tokens) == []
    [warning] = review(jsonl, *files, "--max_new_tokens", 64)
    assert f"--max_new_tokens 64 is less than the longest evaluation answer, {tokens} tokens" in warning

    args = parse(jsonl, *files, "--no-tqdm", "--dataloader_num_workers", 0)
    rows = jsonl.load_rows(args)[1]
    monkeypatch.setattr(generation, "_generate", lambda base, processor, prompts, limit: [str(limit)] * 2)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert generation.generate_answers(model, processor, rows, args) == [str(tokens)] * 2
    limited = parse(jsonl, *files, "--no-tqdm", "--dataloader_num_workers", 0, "--max_new_tokens", 3)
    assert generation.generate_answers(model, processor, rows, limited) == ["3"] * 2


def test_added_special_tokens_are_kept_in_answers(monkeypatch):
    processor = AutoProcessor.from_pretrained(TINY, num_crops=1)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<loc_1>"]})
    ids = [
        processor.tokenizer(f"<loc_1>{answer}<|end|><|endoftext|>", add_special_tokens=False).input_ids for answer in ("12", "")
    ]
    monkeypatch.setattr(generation, "_continue_answers", lambda *args, **options: ids)
    assert generation._generate(None, processor, {"past_key_values": None}, 9) == ["<loc_1>12", "<loc_1>"]
