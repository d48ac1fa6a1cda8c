"""--report_to sends the values of the log."""

import json
import sqlite3

import pytest
from forked import torchrun
from runs import SCRIPT, flags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

FIGURES = ("loss", "learning_rate", "grad_norm", "images_per_second", "tokens_per_second")


@pytest.fixture(scope="module")
def run(docvqa_data, random_model, tmp_path_factory):
    """A run of two steps that reports to two places: its directory, its log, and its ANLS before and after."""
    folder = tmp_path_factory.mktemp("run")
    output = folder / "run"
    options = {"model_name_or_path": random_model, "max_steps": 2, "deepspeed": "none"}
    options |= {"report_to": ["tensorboard", "trackio"]}
    words = flags(docvqa_data, output, **options, dataloader_num_workers=0)
    run = torchrun(SCRIPT, *words, processes=1, TRACKIO_DIR=str(folder / "trackio"))
    assert run.returncode == 0, run.stdout[-4000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    scores = [json.loads((output / f"eval_{when}.json").read_text())["anls"] for when in ("before", "after")]
    return output, [entry for entry in history if "loss" in entry], scores


def test_trackio_gets_the_log(run):
    output, logged, scores = run
    [database] = (output.parent / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
    shown = [json.loads(metrics) for name, metrics in rows if name == "run"]
    for name in FIGURES:
        values = [metrics[f"train/{name}"] for metrics in shown if f"train/{name}" in metrics]
        assert values == pytest.approx([entry[name] for entry in logged], rel=1e-5), name
    evaluated = [(metrics["train/global_step"], metrics["eval/anls"]) for metrics in shown if "eval/anls" in metrics]
    assert evaluated == list(zip((0, 2), scores, strict=True))


def test_tensorboard_gets_the_log(run):
    output, logged, scores = run
    [folder] = {file.parent for file in output.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in FIGURES:
        shown = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in shown] == [1, 2]
        assert [value for _, value in shown] == pytest.approx([entry[name] for entry in logged], rel=1e-5), name
    evaluated = [(event.step, event.value) for event in events.Scalars("eval/anls")]
    assert evaluated == [(step, pytest.approx(score)) for step, score in zip((0, 2), scores, strict=True)]
