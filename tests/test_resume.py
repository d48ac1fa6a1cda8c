"""Runs that are stopped and resumed give the result of an uninterrupted one."""

import json
import os
import shutil
import signal
from functools import partial

import pytest
import torch
import transformers.trainer
from forked import be_process, finetune_forked, run_script
from runs import flags, steps, weights
from transformers import TrainerCallback

from common.training.checkpoints import why_incomplete
from common.training.output import remove_outputs

pytestmark = pytest.mark.slow


class Interrupt(TrainerCallback):
    """Sends SIGTERM to its process in a step, or at the end of training."""

    def __init__(self, when):
        self.when = when

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.when:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, args, state, control, **kwargs):
        if self.when == "end":
            os.kill(os.getpid(), signal.SIGTERM)


def be_interrupted(when, rank, *arguments):
    if rank == 1:  # process 0 has to be told
        transformers.trainer.DEFAULT_CALLBACKS.append(Interrupt(when))
    be_process(rank, *arguments)


def interrupt(when, output, **options):
    """Run on two processes until the second one gets SIGTERM, and return what was printed."""
    log = output.with_name(f"{output.name}.log")
    codes = run_script(flags(options["data_dir"], output, **options), log, target=partial(be_interrupted, when))
    printed = log.read_text()
    log.unlink()
    assert codes == [128 + signal.SIGTERM] * 2, printed[-6000:]
    return printed


def resume(output, **options):
    return finetune_forked(options["data_dir"], output, resume_from_checkpoint="auto", **options)


def read(output, name="trainer_state"):
    return json.loads((output / f"{name}.json").read_text())


def evaluations(output):
    """Step and metrics of every evaluation during training."""
    history = [entry for entry in read(output)["log_history"] if "eval_loss" in entry]
    return [{key: entry[key] for key in ("step", "eval_loss", "eval_anls") if key in entry} for entry in history]


def assert_same_result(output, expected):
    assert read(output, "train_results")["train_loss"] == read(expected, "train_results")["train_loss"]
    for name in ("global_step", "best_metric", "best_global_step"):
        assert read(output)[name] == read(expected)[name], name
    found, wanted = weights(output), weights(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def options(random_model, docvqa_data):
    """Four steps per epoch."""
    return {"model_name_or_path": random_model, "data_dir": docvqa_data, "dataloader_num_workers": 0, "max_new_tokens": 1}


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """Ten steps with ZeRO-2, which end within an epoch: a log entry every four steps, a checkpoint after eight."""
    output = tmp_path_factory.mktemp("straight") / "run"
    options = options | {"max_steps": 10, "logging_steps": 4, "save_strategy": "steps", "save_steps": 8}
    return output, finetune_forked(options["data_dir"], output, **options), options


def test_a_stopped_run_gives_the_result_of_an_uninterrupted_one(straight, tmp_path):
    """Its log entries are means over as many steps, and its training time is that of the whole run."""
    expected, log, options = straight
    output = tmp_path / "run"
    assert "stopped by SIGTERM after step 3;" in interrupt(3, output, **options)
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3"}
    assert not (output / "eval_after.json").exists()
    trained = read(output / "checkpoint-3", "totals")["seconds"]
    assert resume(output, **options) == log
    assert [entry["step"] for entry in log] == [4, 8]
    assert_same_result(output, expected)
    assert read(output, "train_results")["train_runtime"] > trained


def test_a_run_stopped_after_training_is_only_evaluated(straight, tmp_path):
    expected, log, options = straight
    output = tmp_path / "run"
    shutil.copytree(expected / "checkpoint-8", output / "checkpoint-8")
    assert "stopped by SIGTERM after training" in interrupt("end", output, resume_from_checkpoint="auto", **options)
    assert steps(output) == log and not (output / "eval_after.json").exists()
    assert_same_result(output, expected)
    shutil.rmtree(output / "checkpoint-8")
    assert resume(output, **options) == log
    assert f"resuming from {output / 'checkpoint-10'}" in (tmp_path / "run.log").read_text()
    assert_same_result(output, expected)
    assert read(output, "eval_after") == read(expected, "eval_after")


def test_patience_counts_across_a_stop(options, tmp_path):
    """LoRA is stopped when an evaluation is due: the resumed run does it, and it counts. The result is the best model.

    With --save_total_limit 1, the last checkpoint is kept beside the best one, also when training has ended.
    """
    options = options | {"max_steps": 8, "learning_rate": 1e-9, "use_lora": True, "save_strategy": "steps", "save_steps": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_metric_steps": 1, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "early_stopping_patience": 3, "max_eval_samples": 1}
    finetune_forked(options["data_dir"], tmp_path / "straight", **options)
    output = tmp_path / "run"
    interrupt(3, output, **options)
    assert {path.parent.name for path in output.glob("checkpoint-*/complete.json")} == {"checkpoint-1", "checkpoint-3"}
    resume(output, **options)
    assert [entry["step"] for entry in evaluations(output)] == [1, 2, 3, 4]
    assert evaluations(output) == evaluations(tmp_path / "straight")
    assert_same_result(output, tmp_path / "straight")
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    best = weights(output / "checkpoint-1")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights(output).items())


def test_the_evaluation_of_an_epoch_whose_last_step_was_stopped_is_done_on_resume(options, tmp_path):
    options = options | {"num_train_epochs": 2, "max_steps": None, "save_strategy": "epoch", "eval_strategy": "epoch"}
    options |= {"load_best_model_at_end": True, "deepspeed": "none", "max_train_samples": 8}
    log = finetune_forked(options["data_dir"], tmp_path / "straight", **options)
    output = tmp_path / "run"
    assert "evaluation loss" not in interrupt(2, output, **options)
    assert why_incomplete(output / "checkpoint-2") is None and not evaluations(output / "checkpoint-2")
    assert resume(output, **options) == log
    assert [entry["step"] for entry in evaluations(output)] == [2, 4]
    assert evaluations(output) == evaluations(tmp_path / "straight")
    assert_same_result(output, tmp_path / "straight")


def test_an_extended_run_is_the_longer_run(straight, tmp_path):
    """ZeRO-2; learning rate and weight decay change too, which had no effect in the first step, whose rate is 0.

    The evaluation before training is done again if it is to be of other rows.
    """
    expected, log, options = straight
    output = tmp_path / "run"
    finetune_forked(options["data_dir"], output, **options | {"max_steps": 1, "save_steps": 1, "learning_rate": 0.1, "wd": 0.3})
    assert resume(output, **options, accept_changes=["learning_rate", "wd"], max_eval_samples=2) == log
    assert [read(output, f"eval_{when}")["samples"] for when in ("before", "after")] == [2, 2]
    assert "planned for 10 steps instead of 1" in (tmp_path / "run.log").read_text()
    assert_same_result(output, expected)
    remove_outputs(output)
    assert [path.name for path in output.iterdir()] == ["_lock"]


@pytest.mark.parametrize(
    ("changes", "kept", "words"),
    [
        ({"deepspeed": "none", "warmup_steps": 0}, [], "consecutive step"),
        ({"save_strategy": "steps", "save_steps": 1}, ["checkpoint-1"], "not finite after step 2"),
    ],
    ids=["loss, DDP", "weights, ZeRO-2"],
)
def test_nonfinite_numbers_end_a_run(changes, kept, words, options, tmp_path):
    """Such weights are never saved, earlier checkpoints are kept, and the message names the step and its rows."""
    with pytest.raises(AssertionError, match=words) as error:
        finetune_forked(options["data_dir"], tmp_path / "run", **options, learning_rate=1e300, max_steps=9, **changes)
    assert "entry" in str(error.value) and not (tmp_path / "run/model.safetensors").exists()
    assert [path.parent.name for path in (tmp_path / "run").rglob("complete.json")] == kept


def test_a_named_checkpoint_and_other_intervals(straight, tmp_path):
    """The flags count, not the checkpoint's; --overwrite_output_dir removes another run's files."""
    expected, _, options = straight
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_model.safetensors").touch()
    others = options | {"logging_steps": 1, "save_steps": 9, "resume_from_checkpoint": expected / "checkpoint-8"}
    others |= {"overwrite_output_dir": True}
    log = finetune_forked(options["data_dir"], tmp_path / "run", **others)
    assert [entry["step"] for entry in log] == [4, 8, 9, 10]
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}
    assert (expected / "checkpoint-8").exists() and not (tmp_path / "run/adapter_model.safetensors").exists()
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(tmp_path / "run").items())
