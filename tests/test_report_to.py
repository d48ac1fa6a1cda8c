"""The figures of a run where ``--report_to`` sends them."""

import json

import pytest
from runs import finetune, write_docvqa
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


def test_tensorboard_gets_the_figures_of_the_log(tmp_path):
    output = tmp_path / "run"
    finetune(write_docvqa(tmp_path, train=8), output, processes=1, max_steps=2, deepspeed="none", report_to="tensorboard")
    logged = [entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    [file] = output.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    for name in ("loss", "learning_rate", "grad_norm", "images_per_second", "tokens_per_second"):
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in shown] == [1, 2]
        assert [value for _, value in shown] == pytest.approx([entry[name] for entry in logged], rel=1e-5), name
