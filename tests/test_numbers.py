"""A run ends if its numbers are not finite, and warns if training changes nothing."""

import re
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn
from transformers import Trainer, TrainerState

from common.evaluation.predictions import Evaluation, exact_match, write_evaluation
from common.training.callbacks import SKIPPED_STEPS, CheckNumbers
from common.training.trainer import FinetuningTrainer

DECODER, VISION, PROJECTOR = (
    f"model.{name}.weight" for name in ("layers.0", "vision_embed_tokens.img_processor", "vision_embed_tokens.img_projection")
)


def train(losses, max_steps=100, limit=3, fp16=False, skipped=True, stuck=(VISION,), frozen=PROJECTOR):
    """Make steps with these losses, in which all weights change except stuck and frozen ones; return the number of steps."""
    weights = {name: nn.Parameter(torch.ones(4), requires_grad=name != frozen) for name in (DECODER, VISION, PROJECTOR)}
    weights[DECODER].data = weights[DECODER].data.bfloat16()
    trainer = SimpleNamespace(
        model=SimpleNamespace(named_parameters=weights.items),
        accelerator=SimpleNamespace(optimizer_step_was_skipped=skipped),
        grad_norm=1.0,
        rows_of=lambda step: f" (row {step})",
    )
    check, state, args = CheckNumbers(trainer, limit), TrainerState(max_steps=max_steps), SimpleNamespace(fp16=fp16)
    check.on_train_begin(args, state, None)
    for loss in losses:
        trainer.step_loss = torch.tensor(loss)
        for name in weights.keys() - {*stuck, frozen}:
            weights[name].data[0] += 1
        state.global_step += 1
        check.on_step_end(args, state, None)
    return state.global_step


@pytest.mark.parametrize(("max_steps", "steps"), [(100, 10), (4, 4)])
def test_a_part_that_does_not_change_is_reported_once(max_steps, steps, capsys):
    train([1.0] * min(max_steps, 30), max_steps)
    assert capsys.readouterr().err == f"warning: vision did not change in {steps} steps: check learning rates and data\n"
    train([1.0] * 30, stuck=())
    assert not capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_several_nonfinite_losses_in_a_row_end_a_run(bad):
    assert train([1.0, bad, bad, 1.0, bad, bad, 1.0]) == 7
    with pytest.raises(ValueError, match=r"not finite in 3 consecutive steps, starting at step 3 \(row 2\): nothing was saved"):
        train([1.0, 1.0, bad, bad, bad])
    with pytest.raises(ValueError, match=r"not finite in 1 consecutive step, starting at step 2 \(row 1\)"):
        train([1.0, bad], limit=1)
    assert train([bad] * (SKIPPED_STEPS - 1), fp16=True) == SKIPPED_STEPS - 1  # while fp16 looks for its loss scale
    with pytest.raises(ValueError, match=f"not finite in {SKIPPED_STEPS} consecutive step"):
        train([bad] * SKIPPED_STEPS, fp16=True)
    with pytest.raises(ValueError, match="not finite in 3 consecutive step"):
        train([bad] * SKIPPED_STEPS, fp16=True, skipped=False)


def test_fp16_that_overflows_ends_before_deepspeed_fails(monkeypatch):
    """With its initial loss scale; with a lower one, what DeepSpeed raises is reported in the same way."""
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist", SimpleNamespace(get_rank=lambda: 1))  # prints nothing
    scaler = DynamicLossScaler(2**16, 1000, 1, delayed_shift=2, consecutive_hysteresis=False)
    for _ in range(SKIPPED_STEPS):
        scaler.update_scale(True)
    with pytest.raises(ValueError, match=f"not finite in {SKIPPED_STEPS} consecutive steps, starting at step 1"):
        train([1.0] * SKIPPED_STEPS, fp16=True)  # DeepSpeed hides gradients that are not finite

    def step(*_):
        for _ in range(SKIPPED_STEPS):
            scaler.update_scale(True)

    monkeypatch.setattr(Trainer, "training_step", step)
    trainer = object.__new__(FinetuningTrainer)
    trainer.throughput, trainer.state = SimpleNamespace(add=list), TrainerState(global_step=6)
    trainer.rows_of = lambda step: f" (row {step})"
    trainer.check_numbers = CheckNumbers(trainer, 3)
    trainer.check_numbers.bad = 2
    with pytest.raises(ValueError, match=r"not finite in 3 consecutive steps, starting at step 5 \(row 4\)"):
        trainer.training_step(None, {})


@pytest.mark.parametrize(("answers", "same"), [(["1", "2"], True), (["1", "3"], False)])
def test_unchanged_answers_are_reported(answers, same, tmp_path, capsys):
    before, after = (
        Evaluation("accuracy", {"accuracy": 0.5}, [exact_match(str(row), "?", text, "1") for row, text in enumerate(texts)])
        for texts in (["1", "2"], answers)
    )
    write_evaluation(tmp_path / "eval_before.json", before)
    trainer = object.__new__(FinetuningTrainer)
    trainer.model, trainer.evaluate_task, trainer.log, trainer.eval_dataset = None, lambda _: after, list, range(2)
    trainer.flags = SimpleNamespace(output_dir=tmp_path, metric="accuracy")
    trainer.evaluate_after()
    assert ("warning: no answer differs from before training" in capsys.readouterr().err) == same
    assert (tmp_path / "eval_after.json").is_file()
    (tmp_path / "eval_before.json").write_text("{")
    (tmp_path / "eval_after.json").unlink()
    trainer.evaluate_after()
    assert re.search(r"warning: .*eval_before.json: invalid JSON .*: delete it", capsys.readouterr().err)
    assert (tmp_path / "eval_after.json").is_file()
