"""Ten fast faults, and parts of what they meet; `make faults` runs all."""

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from common.data.batches import Lengths, PlannedBatches
from common.data.loader import WorkerLoader
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.model.checkpoint import load_processor
from common.runtime.process import InputError
from faults.faults import FAULTS
from faults.harness import run_fault


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "method"),
    [pytest.param(fault, fault.methods[-1], id=fault.name) for fault in FAULTS if fault.fast],
)
def test_a_fault_loses_nothing(fault, method, tmp_path):
    run_fault(fault, method, tmp_path)


class ThreeRows:
    """Rows of which the second one cannot be read, and the third one not be decoded."""

    def __getitem__(self, key):
        if key == 1:
            raise InputError("row 1")
        return {"value": key}


def collate(samples):
    values = [sample["value"] for sample in samples]
    if 2 in values:
        raise InputError("row 2")
    return {"values": values}


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_samples_are_replaced_and_named(workers):
    sampler = {"batch_sampler": [[0, 3], [0, 1, 2, 3]], "num_workers": workers}
    whole, replaced = WorkerLoader(ThreeRows(), collate, filler={"value": -1}, **sampler)
    assert whole == {"values": [0, 3]}
    assert replaced == {"values": [0, -1, -1, 3], "skipped": ["row 1", "row 2"]}
    with pytest.raises(InputError, match="row 1"):
        list(WorkerLoader(ThreeRows(), collate, **sampler))


def test_rows_whose_pictures_are_gone(tmp_path):
    """They count as nothing in the plan, and what was written since the start is not what was checked."""
    rows = [{"conversations": [{"images": [str(tmp_path / f"{row}.png")], "user": "A?", "assistant": "B"}]} for row in range(3)]
    for row in range(3):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{row}.png")
    data = TrainingData(Rows(rows, "row {}".format), lambda row, rng: row, load_processor(str(TINY), num_crops=1), seed=0)
    assert data[0, 1]["images"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match="row 1: .*1.png is missing"):
        data.measure(0, np.arange(3))
    lengths = data.measure(0, np.arange(3), skip_bad=True)
    assert lengths.tokens[1] == 1 and lengths.tokens[0] == lengths.tokens[2] > 100
    with pytest.raises(InputError, match="row 1: .*1.png is missing"):
        data[0, 1]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "2.png")
    data._checked_at -= 0.1  # file systems know the time less exactly
    with pytest.raises(InputError, match="row 2: .*2.png has changed since the run began"):
        data[0, 2]


def test_a_resumed_run_does_not_measure_what_was_done():
    measured = []

    def measure(epoch, rows):
        measured.append(epoch)
        return Lengths(np.full(len(rows), 9), np.ones(len(rows), dtype=np.int64))

    def epochs(batches):
        return [(batches.set_epoch(epoch), list(batches))[1] for epoch in (1, 2)]

    straight = epochs(PlannedBatches(40, 8, 0, 1, 2, 2, measure))
    resumed = PlannedBatches(40, 8, 0, 1, 2, 2, measure)
    resumed.begin_at(5 + 3)
    measured.clear()
    first, second = epochs(resumed)
    assert first == [[]] * 6 + straight[0][6:] and second == straight[1]
    assert measured == [1] * 2 + [2] * 5
