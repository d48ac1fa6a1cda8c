"""Processes that stop responding are named. tests/faults/faults.py stops a real one."""

import time
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from common.runtime.heartbeat import BEATS, Heartbeat

TIMEOUT = 2  # a silence of one second is reported


def watch_three(store: dist.Store) -> list[Heartbeat]:
    beats = [Heartbeat(store, rank, 3, TIMEOUT) for rank in range(3)]
    for heartbeat in beats:
        heartbeat.start()
    time.sleep(4 * TIMEOUT / 2 / BEATS)
    return beats


@pytest.mark.parametrize("hanging", [2, 0])
def test_a_process_that_hangs_is_reported_once(hanging, capsys):
    """By the main process, or by the second one if the main process hangs."""
    beats = watch_three(dist.HashStore())
    beats[hanging].store = dist.HashStore()  # the others do not see its beats
    time.sleep(TIMEOUT)
    for heartbeat in beats[:hanging] + beats[hanging + 1 :]:
        heartbeat.end()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: process {hanging} on ")
    assert "has not responded for 1 second; the others end after --ddp_timeout (2 seconds)" in line


def test_processes_that_have_ended_or_not_begun_are_not_reported(capsys):
    store = dist.HashStore()
    beats = watch_three(store)
    for heartbeat in beats[1:]:
        heartbeat.end()
    late = Heartbeat(store, 0, 5, TIMEOUT)  # processes 3 and 4 are still being started
    late.start()
    time.sleep(TIMEOUT)
    late.end()
    beats[0].end()
    assert not capsys.readouterr().err


def test_a_process_ends_although_the_one_with_the_store_hangs():
    hanging = SimpleNamespace(set=lambda *_: Event().wait())
    heartbeat = Heartbeat(hanging, 1, 2, TIMEOUT)
    heartbeat.start()
    time.sleep(2 * heartbeat.patience / BEATS)
    ending = Thread(target=heartbeat.end, daemon=True)
    ending.start()
    ending.join(5)
    assert not ending.is_alive()
