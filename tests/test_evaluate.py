"""Evaluation without training: `--eval_only` of the scripts, and `tools.evaluate`."""

import csv
import json
import sys
from statistics import fmean

import pytest
from runs import write_docvqa

import finetune_hf_trainer_docvqa as docvqa
import tools.evaluate
from common.evaluation.metrics import METRICS


def test_both_ways_give_the_same_answers(lora, run_main, tmp_path):
    """An adapter on DocVQA's rows, and on the same questions in a table."""
    data = write_docvqa(tmp_path / "data", train=0, val=3)
    entries = json.loads((data / "val_v1.0_withQT.json").read_text())["data"]
    rows = [(entry["image"], f"{entry['question']}\nAnswer briefly.", entry["answers"][0]) for entry in entries]
    with (data / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *rows])
    shared = ["--num_crops", 1, "--max_new_tokens", 6, "--no-tqdm"]
    said = run_main(docvqa, "--eval_only", "--model_name_or_path", lora, "--data_dir", data, "--output_dir", tmp_path, *shared)
    by_script = json.loads((tmp_path / "evaluation.json").read_text())
    assert f"anls {by_script['anls']:.4f}" in said and "on 3 samples" in said
    flags = ["--model", lora, "--data_file", data / "data.csv", "--metric", "anls", "exact"]
    said = run_main(tools.evaluate, *flags, "--output_file", tmp_path / "scores.json", *shared)
    by_tool = json.loads((tmp_path / "scores.json").read_text())
    answers = [entry["prediction"] for entry in by_tool["predictions"]]
    assert answers == [entry["prediction"] for entry in by_script["predictions"]] and any(answers)
    for name in ("anls", "exact"):
        scores = [METRICS[name](entry["prediction"], entry["answers"]) for entry in by_tool["predictions"]]
        assert by_tool[name] == fmean(scores) and f"{name} {fmean(scores):.4f}" in said
    assert by_tool["metric"] == "anls"
    assert not (tmp_path / "run.json").exists()


def test_any_number_of_processes_may_evaluate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")  # which the default of --batch_size is not divisible by
    monkeypatch.setattr(sys, "argv", ["docvqa", "--eval_only"])
    assert docvqa.parse_args().eval_only


def test_a_question_without_an_answer_is_named(lora, run_main, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"conversations": [{"user": "Why?"}]}\n')
    with pytest.raises(SystemExit):
        run_main(tools.evaluate, "--model", lora, "--data_file", tmp_path / "data.jsonl")
    assert "data.jsonl, line 1: the row has no answer" in capsys.readouterr().err


def test_answers_have_the_ids_of_their_rows(lora, run_main, tmp_path):
    rows = [{"conversations": [{"user": "Why?", "assistant": "so"}], "id": id} for id in (0, None, "a", "a")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", lora, "--data_file", tmp_path / "data.jsonl", "--max_new_tokens", 1, "--dataloader_num_workers", 0]
    run_main(tools.evaluate, *flags, "--output_file", tmp_path / "scores.json")
    found = [entry["id"] for entry in json.loads((tmp_path / "scores.json").read_text())["predictions"]]
    assert found == ["0", *(f"{tmp_path / 'data.jsonl'}, line {number}" for number in (2, 3, 4))]


def test_an_output_that_cannot_be_written_is_named_before_answering(run_main, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("{}")
    with pytest.raises(SystemExit):
        run_main(tools.evaluate, "--model", tmp_path, "--data_file", tmp_path / "data.jsonl", "--output_file", tmp_path)
    assert f"--output_file {tmp_path} is a folder" in capsys.readouterr().err
