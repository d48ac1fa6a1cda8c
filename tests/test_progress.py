"""Progress: a bar on a terminal, a few plain lines elsewhere, and nothing on other processes."""

import io
import os
import sys

import pytest
from transformers import TrainerState

import common.runtime.progress
import common.training.progress
from common.runtime.progress import Progress, limit_library_bars, show_bars, track
from common.training.progress import TrainingProgress


class Screen(io.StringIO):
    """stderr, as a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def put(terminal: bool) -> Screen:
        monkeypatch.setattr(sys, "stderr", Screen(terminal))
        return sys.stderr

    return put


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    for module in (common.runtime.progress, common.training.progress):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_terminal_shows_a_bar(screen):
    shown = screen(terminal=True)
    assert list(track(["a", "b"], "Reading", "files")) == ["a", "b"]
    assert "\rReading: 100%" in shown.getvalue() and "2/2" in shown.getvalue()


@pytest.mark.parametrize("terminal, bar", [(False, True), (True, False)])
def test_without_a_bar_plain_lines_are_printed(screen, clock, terminal, bar):
    shown = screen(terminal)
    with Progress("Reading", "files", 2000, bar) as progress:
        for _ in range(20):
            clock.now += 6
            progress.update(100, note="loss 0.5")
    lines = shown.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "Reading: 5%, 100 of 2,000 files, 00:06 elapsed, 01:54 left, loss 0.5"
    assert lines[9] == "Reading: 100%, 2,000 of 2,000 files, 02:00 elapsed, 00:00 left, loss 0.5"


def test_fast_work_prints_only_its_end(screen, clock):
    shown = screen(terminal=False)
    for _ in track(range(40), "Reading", "files"):
        clock.now += 0.0375
    with Progress("Checking data", "bytes", 0) as progress:  # nothing to do
        clock.now += 5
        progress.update(0)
    assert shown.getvalue() == "Reading: 100%, 40 of 40 files, 00:01 elapsed, 00:00 left\n"


def test_the_items_of_all_processes_are_counted(screen, clock, monkeypatch):
    shown = screen(terminal=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with Progress("Reading", "files", 10, shared=True) as progress:
        for _ in range(3):  # of the main process; the others have 3, 2 and 2
            clock.now += 3
            progress.update()
    assert shown.getvalue().splitlines() == [
        "Reading: 40%, 4 of 10 files, 00:03 elapsed, 00:04 left",
        "Reading: 100%, 10 of 10 files, 00:09 elapsed, 00:00 left",
    ]


@pytest.mark.parametrize(
    "terminal, wanted, rank, bars",
    [(True, True, "0", True), (True, False, "0", False), (False, True, "0", False), (True, True, "3", False)],
)
def test_progress_bars_of_libraries_are_switched_off(screen, monkeypatch, terminal, wanted, rank, bars):
    screen(terminal)
    monkeypatch.setenv("RANK", rank)
    switched_off = []
    monkeypatch.setattr(common.runtime.progress.logging, "disable_progress_bar", lambda: switched_off.append("transformers"))
    monkeypatch.setattr(common.runtime.progress.datasets, "disable_progress_bars", lambda: switched_off.append("datasets"))
    limit_library_bars(wanted)
    assert show_bars(wanted) == bars
    assert switched_off == ([] if bars else ["transformers", "datasets"])


LOGS = {"loss": 1.5, "grad_norm": 0.25, "learning_rate": 2e-5, "images_per_second": 8.657, "tokens_per_second": 21151.2}
FIGURES = "loss 1.5000, gradient norm 0.25, learning rate 2.00e-05, 8.66 images/s, 21,151 tokens/s"


def train(clock, **logs):
    """The second half of a run of 20 steps, three seconds each, with two log lines and an evaluation."""
    state = TrainerState(global_step=10, max_steps=20, is_world_process_zero="RANK" not in os.environ)
    progress = TrainingProgress(bar=True)
    progress.on_train_begin(None, state, None)
    for step in range(11, 21):
        clock.now += 3
        state.global_step = step
        progress.on_step_end(None, state, None)
        if step % 5 == 0:
            progress.on_log(None, state, None, logs=LOGS | logs)
    progress.on_log(None, state, None, logs={"eval_loss": 1.25, "eval_anls": 0.5, "eval_runtime": 3.0, "epoch": 2.0})
    progress.on_log(None, state, None, logs={"eval_anls": 0.5})
    progress.on_log(None, state, None, logs={"train_runtime": 30.0})
    progress.on_train_end(None, state, None)


def test_training_on_a_terminal_shows_a_bar(screen, clock, capsys):
    shown = screen(terminal=True)
    train(clock, mfu=0.412)
    bar = shown.getvalue()
    assert "\rTraining:  50%" in bar and "10/20" in bar and "20/20" in bar
    assert f"{FIGURES}, MFU 41%" in bar and "evaluation loss 1.2500, anls 0.5000" in bar
    assert not capsys.readouterr().out


def test_training_without_a_bar_prints_plain_lines(screen, clock, capsys):
    shown = screen(terminal=False)
    train(clock)
    assert capsys.readouterr().out.splitlines() == [
        f"step 15 of 20, 00:15 elapsed, 00:15 left: {FIGURES}",
        f"step 20 of 20, 00:30 elapsed, 00:00 left: {FIGURES}",
        "step 20 of 20, 00:30 elapsed, 00:00 left: evaluation loss 1.2500, anls 0.5000",
    ]
    assert shown.getvalue() == ""


def test_other_processes_show_nothing(screen, clock, capsys, monkeypatch):
    shown = screen(terminal=True)
    monkeypatch.setenv("RANK", "1")
    assert list(track([1, 2], "Reading", "files")) == [1, 2]
    train(clock)
    assert shown.getvalue() == capsys.readouterr().out == ""
