"""Which checkpoints a run resumes from, and how they are written."""

import errno
import json
import os
import re
import resource
import signal

import pytest
import torch
from conftest import TINY
from PIL import Image
from runs import TOTALS, save_checkpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import TrainerState

from common.arguments import training_parser
from common.data.checks import check_rows
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.sources import load_conversations
from common.runtime.script import run
from common.training.checkpoints import rotate_checkpoints, why_incomplete, write_manifest
from common.training.optimizer import MasterWeights
from common.training.resuming import (
    check_plan,
    check_resumable,
    data_fingerprint,
    find_best_checkpoint,
    find_checkpoint,
    run_identity,
)
from common.training.saving import saving


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoint-3"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(bytes(100))
    save_checkpoint(directory)
    assert why_incomplete(directory) is None
    return directory


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("complete.json", None, "saving was interrupted"),
        ("complete.json", b"\xff{}", "complete.json is corrupted"),
        ("complete.json", b'{"model.safetensors": [Infinity, "a"]}', "model.safetensors has 100 bytes, expected inf"),
        ("complete.json", b"{}", "complete.json is corrupted"),
        ("complete.json", b'{"/etc/passwd": [1, "a"]}', "complete.json is corrupted"),
        ("complete.json", b'{"../a": [1, "a"]}', "complete.json is corrupted"),
        ("complete.json", b'{"%s": [1, "a"]}' % (b"a" * 5000), "complete.json is corrupted"),
        ("complete.json", b'{"model.safetensors": 100}', "complete.json is corrupted"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", bytes(99), "model.safetensors has 99 bytes, expected 100"),
        ("model.safetensors", bytes(50) + b"\1" + bytes(49), "model.safetensors is damaged"),
    ],
)
def test_an_incomplete_checkpoint_is_recognized(name, content, reason, checkpoint):
    assert find_checkpoint("auto", checkpoint.parent, {}, []) == find_checkpoint(str(checkpoint), checkpoint.parent, {}, [])
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {checkpoint} is not complete .*{reason}.; use auto"):
        find_checkpoint(str(checkpoint), checkpoint.parent, {}, [])
    assert find_checkpoint("auto", checkpoint.parent, {}, []) == (None, [f"checkpoint-3 ({why_incomplete(checkpoint)})"])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("trainer_state.json", "{", "trainer_state.json: invalid JSON"),
        ("trainer_state.json", {"new": 1}, "unexpected keyword argument 'new'"),
        ("trainer_state.json", {"global_step": "3"}, "global_step must be an integer from 0, got '3'"),
        ("trainer_state.json", {"stateful_callbacks": {"EarlyStopping": {}}}, "stateful_callbacks must be the states"),
        ("totals.json", {"running_loss": []}, "running_loss must be a list of numbers"),
        ("totals.json", {"settings": {"steps": "9"}}, "steps must be an integer"),
        ("totals.json", {"seconds": float("nan")}, "seconds must be a finite number"),
    ],
)
def test_a_file_that_is_not_what_a_run_writes(name, change, reason, checkpoint):
    """Also if its checksum is right."""
    content = json.loads((checkpoint / name).read_text())
    (checkpoint / name).write_text(change if isinstance(change, str) else json.dumps(content | change))
    write_manifest(checkpoint)
    found, [skipped] = find_checkpoint("auto", checkpoint.parent, {}, [])
    assert found is None and skipped.startswith("checkpoint-3 (") and reason in skipped
    with pytest.raises(ValueError, match="--resume_from_checkpoint .* is not complete"):
        find_checkpoint(str(checkpoint), checkpoint.parent, {}, [])


@pytest.mark.parametrize(
    ("newest", "incomplete", "best", "kept"),
    [
        (6, (), None, [4, 6]),
        (6, (4,), None, [2, 6]),
        (4, (), None, [2, 4]),  # resumed after step 2, because later ones are damaged
        (6, (), 2, [2, 6]),
        (6, (2, 4), 2, [2, 6]),
    ],
)
def test_old_checkpoints_are_deleted_in_order(newest, incomplete, best, kept, tmp_path):
    """Whatever the times of the directories, which some file systems do not keep."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (0, 0))
    for step in incomplete:
        (tmp_path / f"checkpoint-{step}/totals.json").unlink()
    rotate_checkpoints(tmp_path, newest, 2, str(tmp_path / f"checkpoint-{best}") if best else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in kept]


def test_the_last_complete_checkpoint_is_found(tmp_path):
    for step in (9, 10, 11):
        save_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11" / "complete.json").unlink()
    os.mkfifo(tmp_path / "checkpoint-11" / "complete.json")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint("auto", tmp_path, {}, []) == (
        tmp_path / "checkpoint-10",
        ["checkpoint-11 (complete.json is corrupted)"],
    )
    assert find_checkpoint(None, tmp_path, {}, []) == (None, [])


def test_a_checkpoint_of_another_run_is_skipped_or_refused(tmp_path):
    for step, seed in ((5, 1), (6, 2)):
        save_checkpoint(tmp_path / f"checkpoint-{step}", **{"--seed": seed})
    found, [skipped] = find_checkpoint("auto", tmp_path, {"--seed": 1}, [])
    assert found == tmp_path / "checkpoint-5" and "another run" in skipped and "--seed is 1, but the" in skipped
    with pytest.raises(ValueError, match="--seed is 3, but .* had 2.*, or accept .* --accept_changes seed"):
        find_checkpoint("auto", tmp_path, {"--seed": 3}, [])
    assert find_checkpoint("auto", tmp_path, {"--seed": 3}, ["seed"]) == (tmp_path / "checkpoint-6", [])


def test_the_number_of_steps_may_grow(tmp_path):
    checkpoint = tmp_path / "copy-4"
    save_checkpoint(checkpoint, data="4 rows", steps=6)
    assert check_plan(checkpoint, {"data": "4 rows", "steps": 6}, []) is None
    assert "as in a run of 8 steps" in check_plan(checkpoint, {"data": "4 rows", "steps": 8}, [])
    assert "as in a run of 5 steps" in check_plan(checkpoint, {"data": "4 rows", "steps": 5}, ["steps"])
    for plan, words in (
        ({"data": "4 rows", "steps": 5}, "steps is 5, but .* --accept_changes steps"),
        ({"data": "4 rows", "steps": 3}, "at step 4, but this run has only 3 steps"),
        ({"data": "5 rows", "steps": 8}, "data is 5 rows, but .* --accept_changes data"),
    ):
        with pytest.raises(ValueError, match=words):
            check_plan(checkpoint, plan, [])


def test_the_best_checkpoint_of_a_run_that_was_moved(tmp_path, capsys):
    """It is used only if it was the best by the metric that is compared now."""
    save_checkpoint(tmp_path / "checkpoint-3", best_model_checkpoint="moved/checkpoint-2")

    def find(metric):
        log = [{"step": 2, "eval_loss": 1.5, "eval_anls": 0.5}]
        state = TrainerState(best_metric=0.5, best_global_step=2, log_history=log)  # as the Trainer loads it
        find_best_checkpoint(state, metric, tmp_path / "checkpoint-3")
        return state.best_model_checkpoint, state.best_metric, state.best_global_step

    assert find("eval_anls") == (None, None, None)
    assert "moved/checkpoint-2 is missing" in capsys.readouterr().err
    (tmp_path / "checkpoint-2").mkdir()
    assert find("eval_anls") == (str(tmp_path / "checkpoint-2"), 0.5, 2) and not capsys.readouterr().err
    assert find("eval_loss") == (None, None, None)
    assert "was not the best by eval_loss" in capsys.readouterr().err


def test_master_weights_take_the_states_that_an_optimizer_has():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=0.5)  # creates its states at once
    masters = MasterWeights(optimizer, {"weight": weight})
    assert optimizer.state_dict()["state"][0]["sum"].dtype == torch.float32
    weight.grad = torch.ones_like(weight)
    masters.take_gradients()
    optimizer.step()
    assert (weight < 1).all()


def settings_of(*words, deepspeed="common/deepspeed/zero2.json", processes=2, precision="fp32"):
    args = training_parser("", task="test", metric="anls").parse_args(["--model_name_or_path", str(TINY), *words])
    return run_identity(args, args.model_name_or_path, None, None, deepspeed, precision, processes)


@pytest.mark.parametrize(
    ("words", "changes", "name"),
    [
        (("--freeze_vision_model",), {}, "method"),
        ((), {"deepspeed": None}, r"sharding \(--deepspeed\)"),
        ((), {"deepspeed": "common/deepspeed/zero2_offload.json"}, r"sharding \(--deepspeed\) is ZeRO-2 with offloading,"),
        ((), {"processes": 4}, "number of processes"),
        ((), {"precision": "bf16"}, r"precision \(--bf16\)"),
        (("--batch_size", "32"), {}, "--batch_size"),
        (("--projector_learning_rate", "1"), {}, "--projector_learning_rate"),
        (("--streaming",), {}, "--streaming"),
    ],
)
def test_a_run_resumes_only_with_the_same_settings(words, changes, name, tmp_path):
    (tmp_path / "totals.json").write_text(json.dumps(TOTALS | {"settings": settings_of()}))
    check_resumable(tmp_path, settings_of("--save_strategy", "epoch"), [])
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {tmp_path}: {name}.* but the checkpoint's run had"):
        check_resumable(tmp_path, settings_of(*words, **changes), [])


def test_settings_that_do_not_change_the_result_may_change(tmp_path):
    """The order of --train_only; under DDP also the number of processes, except with streaming."""
    assert settings_of("--train_only", "vision,projector") == settings_of("--train_only", "projector,vision")
    (other := tmp_path / "other").mkdir()
    save_file({"weight": torch.zeros(2, 2)}, other / "model.safetensors")
    (tmp_path / "totals.json").write_text(json.dumps(TOTALS | {"settings": settings_of("--use_lora", deepspeed=None)}))
    check_resumable(tmp_path, settings_of("--use_lora", "--batch_size_per_gpu", "2", deepspeed=None, processes=4), [])
    streaming = ("--use_lora", "--streaming")
    (tmp_path / "totals.json").write_text(json.dumps(TOTALS | {"settings": settings_of(*streaming, deepspeed=None)}))
    with pytest.raises(ValueError, match="number of processes is 4, but the checkpoint's run had 2"):
        check_resumable(tmp_path, settings_of(*streaming, deepspeed=None, processes=4), [])
    for words, name in (
        (("--lora_rank", "8"), "--lora_rank is 8, but the checkpoint's run had 64"),
        (("--model_name_or_path", str(other)), r"base model \(--model_name_or_path\) is"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint {tmp_path}: {name}"):
            check_resumable(tmp_path, settings_of(*streaming, *words, deepspeed=None), [])


def load_checked(path, folder):
    """Rows of a list, as the scripts of other data sets load them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["conversations"][0]["images"] = [str(folder / name) for name in row["conversations"][0]["images"]]
    return check_rows(Rows(rows, str), lambda row: [row], "training row", bar=False)


def test_the_fingerprint_of_data_covers_texts_and_image_names(tmp_path):
    def fingerprint(*rows):
        rows = [{"conversations": [{"images": [image], "user": user, "assistant": "Yes."}]} for image, user in rows]
        return data_fingerprint(TrainingData(Rows(rows, str), lambda row, rng: row, None, 0))

    first = fingerprint(("a/1.png", "What?"), ("2.png", "Who?"))
    assert first == fingerprint(("b/1.png", "What?"), ("2.png", "Who?")) and first.startswith("2 rows, ")
    for others in ((("1.png", "What?"), ("3.png", "Who?")), (("1.png", "What?"), ("2.png", "Why?")), (("1.png", "What?"),)):
        assert fingerprint(*others) != first


@pytest.mark.parametrize("load", [load_conversations, load_checked])
def test_the_fingerprint_of_data_covers_every_row(load, tmp_path, own_cache):
    def fingerprint(folder, rows):
        folder.mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (60, 50)).save(folder / name)
        turns = ([{"images": [image], "user": "What?", "assistant": answer}] for image, answer in rows)
        lines = [json.dumps({"conversations": conversation}) for conversation in turns]
        (folder / "data.jsonl").write_text("\n".join(lines))
        return data_fingerprint(TrainingData(load(folder / "data.jsonl", folder), lambda row, rng: row, None, 0))

    rows = [("a.png", f"It is {number}.") for number in range(1000)]
    first = fingerprint(tmp_path / "first", rows)
    assert fingerprint(tmp_path / "moved", rows) == first
    # Rows 503 and 504 are not among those whose conversations are looked at.
    for name, changed in {
        "answer": [("a.png", "Another one."), rows[504]],
        "image": [("b.png", rows[503][1]), rows[504]],
        "order": [rows[504], rows[503]],
    }.items():
        assert fingerprint(tmp_path / name, [*rows[:503], *changed, *rows[505:]]) != first


WRITERS = {
    "Python": lambda path: path.write_bytes(bytes(9000)),
    "torch": lambda path: torch.save(torch.zeros(9000), path),
    "DeepSpeed": lambda path: torch.save(torch.zeros(9000), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file({"weight": torch.zeros(9000)}, path),
    "tokenizers": lambda path: Tokenizer.from_file(str(TINY / "tokenizer.json")).save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_reported_whatever_writes(writer, tmp_path):
    """A limit on file sizes stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(ValueError, match="saving failed .*free disk space"), saving():
            WRITERS[writer](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_other_errors_while_saving_are_not_attributed_to_the_disk():
    with pytest.raises(RuntimeError), saving():
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_file_system_is_reported_in_one_line(number, tmp_path, capfd, monkeypatch):
    def read(_):
        raise OSError(number, os.strerror(number), f"{tmp_path}/a.json")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        run(read, None)
    said = capfd.readouterr().err
    assert re.fullmatch(r"error: reading or writing failed \(\[Errno \d+\] .*a.json'\): (check|free) .* auto\n", said), said
    with (
        pytest.raises(ValueError, match=r"saving failed .*a.json'\): (check|free) .* are intact"),
        saving(),
    ):
        read(None)
