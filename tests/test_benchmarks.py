"""The benchmarks run, check that what they compare is the same, and the tables show what was measured."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from benchmarks import measure, table
from benchmarks.inputs import plain_crops
from benchmarks.pages import SHAPES, draw_pages
from common.phi3v import Phi3VImageProcessor
from common.phi3v.image_processing import crop_grid_size, num_image_tokens, to_crop_grid


def run(name, out, *flags):
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, flags), "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=900,
    )
    result = json.loads(out.read_text())
    assert result["benchmark"] == name
    assert result["command"].startswith(f"python -m benchmarks.{name}")
    assert {"cpu", "cores", "threads"} <= result["hardware"].keys() and result["versions"]["torch"] == torch.__version__
    return result


def test_ratios_are_of_neighbouring_repetitions():
    assert measure.ratios([4.0, 9.0, 20.0], [2.0, 3.0, 4.0]) == {"median": 3.0, "lowest": 2.0, "highest": 5.0}
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "LA"])
@pytest.mark.parametrize(("width", "height"), [(90, 200), (200, 90), (50, 50)])
def test_plain_pipeline_computes_the_same_pixels(tmp_path, mode, width, height):
    """The published way of computing, on its side and in colour, against the short cuts for portraits and grey pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(noise).convert(mode).save(path)
    pixels, size = plain_crops(path, num_crops=3)
    ours = Phi3VImageProcessor(num_crops=3)(Image.open(path))
    assert ours["image_sizes"].tolist() == [list(size)]
    assert torch.equal(pixels, ours["pixel_values"][0])
    assert (to_crop_grid(Image.open(path), 3).shape[2] == 1) == (mode in ("L", "1"))


def test_pages_have_the_published_mean_of_tokens(tmp_path):
    page, *_ = draw_pages(tmp_path, 1)
    assert Image.open(page).size == SHAPES[0] and Image.open(page).mode == "L"
    tokens = [num_image_tokens(*crop_grid_size(*shape, 16)) for shape in SHAPES]
    assert 2443 - 40 < sum(tokens) / len(tokens) < 2443 - 20


@pytest.mark.slow
def test_inputs(tmp_path):
    result = run("inputs", tmp_path / "result.json", "--num_images", 2, "--repetitions", 1)
    assert result["results"]["as they are"]["times_faster"]["median"] > 1
    assert (
        result["results"]["in colour"]["mib_a_picture"]["plain"] > 4 * result["results"]["in colour"]["mib_a_picture"]["ours"]
    )


@pytest.mark.slow
def test_step_checks_gradients_and_measures(tmp_path):
    result = run("step", tmp_path / "result.json", "--config", "tiny", "--repetitions", 1)
    assert result["largest_relative_difference_of_loss_and_gradients"] < 1e-3
    assert result["batch"]["views"] < result["batch"]["views with blank crops"]
    assert set(result["times_faster"]) == set(result["seconds"]) - {"packed"}


@pytest.mark.slow
def test_evaluation_gives_the_same_answers(tmp_path):
    result = run("evaluation", tmp_path / "result.json", "--documents", 2, "--repetitions", 1, "--max_new_tokens", 8)
    assert result["questions"] == 8 and result["same_answers"] == 8


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory on a CPU is read from Linux")
def test_memory(tmp_path):
    result = run("memory", tmp_path / "result.json", "--samples", 2, "--tokens", 1000, "--hidden_size", 64)
    assert result["times_less"] > 5
    assert result["peak_mib"]["full"] > result["mib_of_full_logits_alone"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_train_goes_through_the_real_path(tmp_path, method):
    flags = ["--random_weights", "--config", "tiny", "--methods", method, "--packing", "on", "off", "--checkpointing", "none"]
    flags += ["--num_images", 2, "--num_crops", 2, "--batch_size", 2, "--samples_at_once", 2, "--warmup", 1, "--steps", 1]
    rows = run("train", tmp_path / "result.json", *flags)["rows"]
    assert [row.get("error") for row in rows] == [None, None]
    assert [row["packing"] for row in rows] == [True, False]
    assert all(row["images_per_second"] > 0 and row["tflops"] > 0 and row["mfu"] is None for row in rows)
    assert set(rows[0]["seconds_a_step"]) == {"data", "tower", "decoder forward", "backward", "optimizer", "all"}


def test_train_reports_a_combination_that_fails(tmp_path, capsys):
    row = {
        "method": "full",
        "attention": "varlen",
        "packing": "on",
        "checkpointing": "none",
        "samples_at_once": 4,
        "kernels": "plain",
    }
    from benchmarks.train import describe

    assert describe(row | {"error": "CUDA out of memory"}).endswith("failed: CUDA out of memory")


def test_document_shows_the_results():
    """`make bench-table` has been run since results last changed; what no GPU measured says so."""
    document = table.DOCUMENT.read_text(encoding="utf-8")
    assert table.fill(document, table.render()) == document
    assert "not measured" in document and "31.736" in document


def test_lost_markers_are_named():
    with pytest.raises(ValueError, match="markers"):
        table.fill("no markers", "tables")
