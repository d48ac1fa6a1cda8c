"""The benchmarks run and compare equal results, and the tables show what was measured."""

import json
import sys

import numpy as np
import pytest
import torch
from forked import run_program
from PIL import Image
from transformers import AutoProcessor

from benchmarks import evaluation, inputs, measure, micro_batch, table, train
from benchmarks.pages import SHAPES, draw_pages, find_pages
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.phi3v import Phi3VImageProcessor
from common.phi3v.image_processing import convert_picture, to_crop_grid
from tools.runs import load_published


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a benchmark in this process and returns its result."""

    def run_module(module, *flags):
        name, out = module.__name__.removeprefix("benchmarks."), tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags), "--out", str(out)])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        module.main(module.parse_args())
        result = json.loads(out.read_text())
        assert result["benchmark"] == name
        assert result["command"].startswith(f"python -m benchmarks.{name} --")
        assert {"cpu", "cores", "threads"} <= result["hardware"].keys()
        assert result["versions"]["torch"] == torch.__version__ and result["versions"].get("cuda") == torch.version.cuda
        return result

    return run_module


def test_ratios_are_of_neighbouring_repetitions():
    assert measure.ratios([4.0, 9.0, 20.0], [2.0, 3.0, 4.0]) == {"median": 3.0, "lowest": 2.0, "highest": 5.0}
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "LA"])
@pytest.mark.parametrize(("width", "height"), [(90, 200), (200, 90), (50, 50)])
def test_plain_pipeline_computes_the_same_pixels(tmp_path, mode, width, height):
    """The published method, against the shortcuts for upright and greyscale images."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(noise).convert(mode).save(path)
    pixels, size = inputs.plain_crops(path, num_crops=3)
    ours = Phi3VImageProcessor(num_crops=3)(Image.open(path))
    assert ours["image_sizes"].tolist() == [list(size)]
    assert torch.equal(pixels, ours["pixel_values"][0])
    assert (to_crop_grid(convert_picture(Image.open(path)), 3).shape[2] == 1) == (mode in ("L", "1"))


def test_samples_have_the_published_mean_number_of_tokens(tmp_path):
    page, *_ = draw_pages(tmp_path, 1)
    assert Image.open(page).size == SHAPES[0] and Image.open(page).mode == "L"
    pages = []
    for number, shape in enumerate(SHAPES):
        pages.append(tmp_path / f"blank_{number}.png")
        Image.new("L", shape).save(pages[-1])
    processor = AutoProcessor.from_pretrained(train.TOKENIZER, num_crops=16)
    rows = train.draw_rows(pages, 256, np.random.default_rng(0))
    lengths = TrainingData(Rows(rows, str), lambda row, _: row, processor, seed=0).lengths(epoch=0)
    assert lengths.tokens.mean() == pytest.approx(table.PUBLISHED_BATCH.tokens, abs=5)
    assert lengths.views.mean() == pytest.approx(table.PUBLISHED_BATCH.views, abs=0.1)


def test_only_images_of_a_folder_are_pages(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.jpeg"):
        (tmp_path / name).touch()
    assert [path.name for path in find_pages(tmp_path)] == ["a.jpg", "b.PNG", "c.jpeg"]
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match=r"none contains no \.jpg or \.png files"):
        find_pages(tmp_path / "none")


def test_inputs(run, tmp_path):
    """Of a folder with fewer images than asked for."""
    draw_pages(tmp_path / "pages", 1)
    result = run(inputs, "--image_dir", tmp_path / "pages", "--num_images", 24, "--repetitions", 1)
    assert result["pictures"] == {"count": 1, "modes": ["L"]}
    results = result["results"]
    assert results["as they are"]["times_faster"]["median"] > 1
    assert results["in colour"]["mib_a_picture"]["plain"] > 4 * results["in colour"]["mib_a_picture"]["ours"]


def test_evaluation_gives_the_same_answers(run):
    result = run(evaluation, "--documents", 1, "--repetitions", 1, "--max_new_tokens", 8)
    assert result["questions"] == 4 and result["same_answers"] == 4


@pytest.mark.slow
def test_train_runs_the_recipe_and_measures_its_phases(run, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", lambda command, **_: run_program(*command[1:]))  # without starting Python
    flags = ["--random_weights", "--config", "tiny", "--methods", "full", "--checkpointing", "auto", "--num_images", 2]
    flags += ["--num_crops", 2, "--batch_size", 2, "--samples_at_once", 2, "--warmup", 1, "--steps", 1]
    flags += ["--dataloader_num_workers", 0]
    [row] = run(train, *flags)["rows"]
    assert row.get("error") is None and row["checkpointing"] == "none" and row["packing"] == "on"
    assert row["images_per_second"] > 0 and row["tflops"] > 0 and row["mfu"] is None
    assert set(row["seconds_a_step"]) == {"data", "tower", "decoder forward", "backward", "optimizer", "all"}


def wanted(monkeypatch, *flags):
    """Method, recomputation and samples per micro-batch of each combination that the flags select."""
    monkeypatch.setattr(sys, "argv", ["train", "--random_weights", *flags])
    return [(values[0], *values[3:5]) for values in train.combinations(train.parse_args())]


def test_train_measures_the_combinations_of_the_targets(monkeypatch):
    by_default = [(method, "auto", samples) for method in train.METHOD_FLAGS for samples in (1, 4)]
    assert wanted(monkeypatch) == [*by_default, ("lora", "full", 1), ("qlora", "full", 1)]
    assert wanted(monkeypatch, "--methods", "full", "--samples_at_once", "2") == [("full", "auto", 2)]
    asked = ["--methods", "lora", "--checkpointing", "none", "full", "--samples_at_once", "4"]
    assert wanted(monkeypatch, *asked) == [("lora", "none", 4), ("lora", "full", 4)]


ROW = {"attention": "varlen", "packing": "on", "kernels": "plain", "images_per_second": 5.0, "tokens_per_second": 12215.0}
ROW |= {"tflops": 300.0, "mfu": 0.4, "peak_memory_gb": 15.25, "data_wait_share": 0.01}


def test_train_reports_a_combination_that_fails():
    row = ROW | {"method": "full", "checkpointing": "none", "samples_at_once": 4}
    assert train.describe(row | {"error": "CUDA out of memory"}).endswith(
        "4 at once, plain kernels: failed: CUDA out of memory"
    )
    assert "40.0 % MFU, 15.2 GB, 1.0 % waiting" in train.describe(row)


def of_a_gpu(*measured, **more):
    """A result of a GPU, from method, recomputation and samples per micro-batch of each row."""
    rows = [
        ROW | {"method": method, "checkpointing": mode, "samples_at_once": samples, "optim": "adamw_torch_fused"} | more
        for method, mode, samples in measured
    ]
    return {"config": "real", "hardware": {"gpu": "H100"}, "date": "2026-01-02 03:04 UTC", "file": "train.json", "rows": rows}


def test_the_published_table_shows_the_fastest_measured_row_of_each_method():
    slow, fast = of_a_gpu(("lora", "full", 1)), of_a_gpu(("lora", "none", 4), images_per_second=6.5, peak_memory_gb=30.0)
    failed = of_a_gpu(("qlora", "none", 4), error="CUDA out of memory")
    shown = table.published_table(load_published()["speed"], {"train": [slow, fast, failed]}).splitlines()
    assert sum("published upstream" in line for line in shown) == 15
    lora, qlora = (
        next(line for line in shown if f"| 1 | {title} |" in line and "8×" not in line) for title in ("LoRA", "QLoRA")
    )
    assert lora.startswith("| 1×H100 | 1 | LoRA | 6.500 | 30.0 | 40.0 % | H100, 2026-01-02")
    assert qlora == "| one GPU | 1 | QLoRA | not measured | not measured | not measured | – |"


def test_targets_are_shown_in_their_rows():
    result = of_a_gpu(("lora", "full", 1), ("lora", "full", 4), ("lora", "none", 1))
    shown = table.gpu_table({"train": [result]})
    lines = [line for line in shown.splitlines() if line.startswith("| LoRA")]
    assert [line.split(" | ")[10] for line in lines] == ["≤ 16", "–", "–"]
    assert all("1 per micro-batch, plain kernels, adamw_torch_fused | full" in line or "≤ 16" not in line for line in lines)
    assert "| 15.2 |" in lines[0] and "peak GB" in shown
    assert table.gpu_table({"train": [result | {"config": "tiny"}]}) == table.gpu_table({})


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="markers"):
        table.fill("no markers", "tables")


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (
            "  raise ValueError\nValueError: no\nWarning: destroy_process_group() was not called",
            "ValueError: no",
        ),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory\nWARNING: cleanup",
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("error: --bf16: this GPU has no bf16", "error: --bf16: this GPU has no bf16"),
        ("Killed", None),
    ],
)
def test_a_failed_row_reports_its_exception(output, error):
    assert train.find_error(output) == error


def test_a_micro_batch_is_measured_with_plain_and_fused_layers(run, capsys):
    flags = ["--config", "tiny", "--samples", 1, "--num_crops", 1, "--repetitions", 1]
    rows = run(micro_batch, *flags, "--methods", "lora", "--layers", "plain", "fused", "--recompute", "none")["rows"]
    assert [(row["method"], row["layers"]) for row in rows] == [("lora", "plain"), ("lora", "fused")]
    assert all(row["seconds"] >= row["issue_seconds"] > 0 and row["tflops"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
