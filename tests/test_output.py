"""What an output directory holds, and which run writes to it."""

import errno
import json
import os
import shutil
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from forked import server
from runs import message

from common.model.checkpoint import load_processor
from common.phi3v import Phi3VForCausalLM
from common.training.output import (
    check_output_dir_locked,
    check_output_dir_unused,
    count_bad_samples,
    lock_output_dir,
    note_bad_sample,
    note_skipped_rows,
    remove_outputs,
)
from common.training.saving import write_result
from common.training.trainer import FinetuningTrainer


def test_an_output_directory_holds_one_result(tmp_path):
    for name in ("adapter_model.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds adapter_model.safetensors of another run: .*--overwrite_output_dir"):
        check_output_dir_unused(tmp_path, overwrite=False, resuming=True)
    check_output_dir_unused(tmp_path, overwrite=True, resuming=False, models=[str(tmp_path.parent), "no/model"])
    for model in (tmp_path, tmp_path / "checkpoint-3"):
        with pytest.raises(ValueError, match=f"--overwrite_output_dir would delete {model}, which this run reads"):
            check_output_dir_unused(tmp_path, overwrite=True, resuming=False, models=[str(model)])
    remove_outputs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "checkpoint-3").mkdir()
    check_output_dir_unused(tmp_path, overwrite=False, resuming=True)  # an incomplete one
    with pytest.raises(ValueError, match="holds checkpoint-3"):
        check_output_dir_unused(tmp_path, overwrite=False, resuming=False)


def test_a_directory_in_use_is_refused_before_data_is_read(tmp_path, monkeypatch):
    (tmp_path / "adapter_model.safetensors").touch()
    said = message(monkeypatch, tmp_path / "no data", tmp_path)
    assert said.startswith(f"--output_dir {tmp_path}: holds adapter_model.safetensors of another run: choose another")


def lock_forever(directory):
    lock_output_dir(directory)
    (directory / "locked").touch()
    time.sleep(600)


@contextmanager
def locked_by_another_process(directory):
    process = server().Process(target=lock_forever, args=(directory,))
    process.start()
    while not (directory / "locked").exists():
        time.sleep(0.05)
    yield process
    process.kill()
    process.join()


def test_an_output_directory_is_locked(tmp_path):
    """Until its process ends."""
    with locked_by_another_process(tmp_path) as process:
        said = f"--output_dir {tmp_path}: another run .process {process.pid} on .* is writing to it"
        with pytest.raises(ValueError, match=said):
            lock_output_dir(tmp_path)
    lock_output_dir(tmp_path)
    with pytest.raises(ValueError, match="cannot be written to"):
        lock_output_dir(tmp_path / "_lock" / "below")
    check_output_dir_locked(tmp_path)


def test_a_run_locks_its_output_directory_again_unless_another_run_has(tmp_path, capsys):
    lock_output_dir(tmp_path)
    for delete in (lambda: (tmp_path / "_lock").unlink(), lambda: shutil.rmtree(tmp_path)):
        delete()
        check_output_dir_locked(tmp_path)
        assert "was deleted during the run" in capsys.readouterr().err
        check_output_dir_locked(tmp_path)
        assert (tmp_path / "_lock").is_file() and not capsys.readouterr().err
    shutil.rmtree(tmp_path)
    said = f"--output_dir {tmp_path}: was replaced during the run, and another run has"
    with locked_by_another_process(tmp_path), pytest.raises(ValueError, match=said):
        check_output_dir_locked(tmp_path)


@pytest.mark.parametrize(
    ("content", "answers"),
    [
        ({"predictions": [{"prediction": "one"}, {"prediction": "two"}]}, ["one", "two"]),
        ({"predictions": [{"prediction": "one"}]}, None),
        ({"predictions": [1, 2]}, None),
        ({"predictions": None}, None),
        ({}, None),
        ({"samples": 3, "predictions": [{"prediction": "one"}]}, None),
        (None, None),
    ],
)
def test_an_evaluation_before_training_is_kept_if_it_has_all_answers(content, answers, tmp_path):
    if content is not None:
        (tmp_path / "eval_before.json").write_text(json.dumps({"metric": "anls", "samples": 2} | content))
    trainer = SimpleNamespace(flags=SimpleNamespace(output_dir=tmp_path, metric="anls"), eval_dataset=range(2))
    assert FinetuningTrainer._answers_before(trainer) == answers


def test_a_result_that_was_not_completely_replaced_cannot_be_loaded(random_model, tmp_path, monkeypatch):
    model, processor = Phi3VForCausalLM.from_pretrained(random_model), load_processor(str(random_model))
    write_result(tmp_path, model, processor, None, random_model)
    assert (tmp_path / "config.json").is_file()
    replace, replaced = os.replace, []

    def fail_later(source, target):
        if len(replaced) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replaced.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_later)
        with pytest.raises(OSError, match="Input/output error"):
            write_result(tmp_path, model, processor, None, random_model)
    assert not (tmp_path / "config.json").exists()
    write_result(tmp_path, model, processor, None, random_model)
    assert (tmp_path / "config.json").is_file() and not (tmp_path / "_saving").exists()


def test_incomplete_lines_of_bad_samples_are_counted(tmp_path):
    note_bad_sample(tmp_path / "run", 3, "one")
    with (tmp_path / "run/bad_samples.jsonl").open("a") as file:
        file.write('{"step": 4, "err')  # the disk was full
    for _ in range(2):
        note_skipped_rows(tmp_path / "run", ["two"])
        note_bad_sample(tmp_path / "run", 3, "one")  # again after a resume
    assert count_bad_samples(tmp_path / "run") == 2
    assert (tmp_path / "run/bad_samples.jsonl").read_text().count("two") == 1
