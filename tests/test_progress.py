"""Progress: one bar on a terminal, sparse plain lines elsewhere, and nothing from any process but the first."""

import io
import sys

import pytest

import common.progress
from common.progress import Progress, limit_library_bars, show_bars, track


class Screen(io.StringIO):
    """What stderr is: a terminal or not."""

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
    """A clock that stands still until it is told to go on."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(common.progress, "time", clock)
    return clock


def test_a_terminal_shows_a_bar(screen):
    shown = screen(terminal=True)
    assert list(track(["a", "b"], "Reading", "files")) == ["a", "b"]
    assert "\rReading: 100%" in shown.getvalue() and "2/2" in shown.getvalue()


@pytest.mark.parametrize("terminal, bar", [(False, True), (True, False)])
def test_without_a_bar_there_are_plain_lines(screen, clock, terminal, bar):
    shown = screen(terminal)
    with Progress("Reading", "files", 2000, bar) as progress:
        for _ in range(20):
            clock.now += 6
            progress.update(100, note="loss 0.5")
    assert shown.getvalue().splitlines() == [
        f"Reading: {share}%, {20 * share:,} of 2,000 files, {gone} gone, {left} left, loss 0.5"
        for share, gone, left in [
            (10, "00:12", "01:48"),
            (20, "00:24", "01:36"),
            (30, "00:36", "01:24"),
            (40, "00:48", "01:12"),
            (50, "01:00", "01:00"),
            (60, "01:12", "00:48"),
            (70, "01:24", "00:36"),
            (80, "01:36", "00:24"),
            (90, "01:48", "00:12"),
            (100, "02:00", "00:00"),
        ]
    ]


def test_what_is_quick_says_only_that_it_is_done(screen, clock):
    shown = screen(terminal=False)
    for _ in track(range(40), "Reading", "files"):
        clock.now += 0.125
    assert shown.getvalue() == "Reading: 100%, 40 of 40 files, 00:05 gone, 00:00 left\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_other_processes_show_nothing(screen, monkeypatch, terminal):
    shown = screen(terminal)
    monkeypatch.setenv("RANK", "1")
    assert list(track([1, 2], "Reading", "files")) == [1, 2]
    assert shown.getvalue() == ""


@pytest.mark.parametrize(
    "terminal, wanted, rank, bars",
    [(True, True, "0", True), (True, False, "0", False), (False, True, "0", False), (True, True, "3", False)],
)
def test_bars_of_libraries_follow_the_same_rule(screen, monkeypatch, terminal, wanted, rank, bars):
    screen(terminal)
    monkeypatch.setenv("RANK", rank)
    switched_off = []
    monkeypatch.setattr(common.progress.logging, "disable_progress_bar", lambda: switched_off.append("transformers"))
    monkeypatch.setattr(common.progress.datasets, "disable_progress_bars", lambda: switched_off.append("datasets"))
    limit_library_bars(wanted)
    assert show_bars(wanted) == bars
    assert switched_off == ([] if bars else ["transformers", "datasets"])
