"""The report of a run: content, embedded files, missing and invalid files."""

import io
import json
import re
import shutil
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_runs import make_run, write_json

import tools.report
from common.report.charts import number
from common.report.gallery import group_samples, save_gallery_images, select_gallery
from common.report.page import report_run, write_comparison, write_report
from common.report.run import FILES


class Page(HTMLParser):
    """The elements and the text of a page, without styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.words, self.open = [], [], None
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        if self.open != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> list[str]:
        """The titles of the charts, without the images of the samples."""
        return [image["alt"].split(".")[0] for image in self.all("img") if image["src"].startswith("data:image/svg")]


def predictions(scores: dict) -> list[dict]:
    return [
        {"id": key, "question": f"What is {key}?", "prediction": "it", "answers": ["that"], "score": score}
        for key, score in scores.items()
    ]


def evaluation(scores: dict, **fields) -> dict:
    return {"metric": "anls", "anls": 0.5, "samples": len(scores), "predictions": predictions(scores), **fields}


@pytest.mark.parametrize(
    ("task", "metric", "charts", "images"),
    [
        ("DocVQA", "ANLS", [], 1),
        ("Hateful Memes", "AUROC", ["ROC", "Confusion before", "Confusion after"], 1),
        ("NLVR2", "Accuracy", ["Confusion before", "Confusion after"], 2),
        ("UCF-101", "Accuracy", ["Confusion before", "Confusion after"], 8),
    ],
)
def test_a_report_is_one_file_with_metrics_charts_samples_and_settings(tmp_path, task, metric, charts, images):
    make_run(tmp_path, task, samples=40, steps=24)
    page = Page(write_report(tmp_path))
    attributes = [(name, value) for _, found in page.elements for name, value in found.items()]
    addresses = [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
    assert addresses and all(address.startswith("data:") for address in addresses)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html and "url(" not in html and "default-src 'none'" in html and not page.all("script")
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert write_report(tmp_path).read_text(encoding="utf-8") == html, "not the same again"

    before, after = (json.loads((tmp_path / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    first, last = (
        f"{found[key]:.1%}" if (key := found["metric"]) == "accuracy" else f"{found[key]:.3f}" for found in (before, after)
    )
    assert f"{metric} before and after before {first} → after {last}" in page.text
    curves = ["Loss", "Gradient norm", "Learning rate", "Images per second", "Tokens per second", "Model FLOPs utilization"]
    assert page.charts == charts + curves
    samples = sum(map(len, select_gallery([before["predictions"], after["predictions"]]).values()))
    assert len(page.all("article")) == samples > 3
    assert len(page.all("img")) == images * samples + len(page.charts) and all(image["alt"] for image in page.all("img"))
    for text in ("torchrun --nproc_per_node=8", "microsoft/Phi-3.5-vision-instruct", "2.13.0", "learning_rate 5e-06"):
        assert text in page.text
    assert page.text.index("learning_rate 5e-06") < page.text.index("Other hyperparameters") < page.text.index("num_crops 16")
    assert "is missing" not in page.text and "null" not in page.text
    for path in (tmp_path / "curves" / f"{name}.png" for name in ("loss", "grad_norm", "learning_rate", "mfu")):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20


def test_classes_are_listed_worst_first_with_confusions_and_charts_only_for_few(tmp_path):
    rows = [("Archery", "Archery"), ("Archery", "BenchPress."), ("BenchPress", "benchpress"), ("Archery", "a man")]
    for extra, charts in (0, ["Confusion after"]), (28, ["Confusion after"]), (29, []):
        pairs = rows + [(f"class {number}", f"class {number}") for number in range(extra)]
        found = [
            {"id": str(number), "question": "?", "answers": [truth], "prediction": said, "score": 1.0}
            for number, (truth, said) in enumerate(pairs)
        ]
        per_class = {"BenchPress": 1.0, "Archery": 1 / 3}
        result = {"metric": "accuracy", "accuracy": 0.5, "accuracy_per_class": per_class, "predictions": found}
        write_json(tmp_path / "eval_after.json", result)
        page = Page(write_report(tmp_path))
        assert page.charts == charts
        assert "Archery — 33.3% BenchPress — 100.0%" in page.text
        assert "Archery (other) 1 Archery BenchPress 1" in page.text


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("memes"), "Hateful Memes", samples=20, steps=8)
    write_report(run)
    return run


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_a_corrupt_one_is_an_error(tmp_path, name, reported):
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    old = (tmp_path / "report.html").read_bytes()
    (tmp_path / name).write_text('{"metric": "anls", ')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: invalid JSON")):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old and not list(tmp_path.glob(".*"))

    (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert f"{name} is missing: {FILES[name]}" in page.text and page.all("article")
    assert ("AUROC before and after" in page.text) == (not name.startswith("eval"))
    assert ("Loss" in page.charts) == (name != "trainer_state.json")
    assert ("torchrun" in page.text) == (name != "run.json")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "expected a JSON object, got list"),
        ({"anls": 0.5}, "'metric' must be the key of a number"),
        ({"metric": "anls"}, "'metric' must be the key of a number"),
        ({"metric": "anls", "anls": 1, "predictions": [{"id": 1, "score": 1}]}, "prediction 0 is missing answers, predict"),
    ],
)
def test_an_invalid_evaluation_is_an_error_that_names_it(tmp_path, contents, message):
    write_json(tmp_path / "eval_after.json", contents)
    with pytest.raises(ValueError, match=f"eval_after.json.*{message}"):
        write_report(tmp_path)


def test_without_evaluations_and_with_values_that_are_not_finite(tmp_path):
    log = [{"step": 1, "loss": 2.0, "grad_norm": float("nan")}, {"step": 2, "loss": float("inf"), "grad_norm": 1.0}]
    write_json(tmp_path / "trainer_state.json", {"log_history": log})
    page = Page(write_report(tmp_path))
    assert page.charts == ["Loss", "Gradient norm"] and not page.all("article")
    write_json(tmp_path / "eval_after.json", evaluation({"a": 1.0}, metric="auroc", auroc=float("nan")))
    text = Page(write_report(tmp_path)).text
    assert "AUROC → after —" in text and "From 2 to 2, lowest 2 at step 1, 1 not finite." in text
    assert "nan" not in text.lower()


def test_all_text_is_escaped(tmp_path):
    attack = '</style><script>alert(1)</script><img src=x onerror="alert(2)">"\'$\\frac$ & {{ 7 * 7 }}'
    make_run(tmp_path, "UCF-101", samples=8, steps=8)
    fields = "metric accuracy accuracy_per_class samples predictions id question answers prediction score task date command "
    fields += "base_model method data hardware versions hyperparameters"

    def poisoned(value):
        if isinstance(value, dict):
            return {key if key in fields.split() else key + attack: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return value + attack if isinstance(value, str) and value not in fields.split() else value

    for name in ("eval_before.json", "eval_after.json", "run.json"):
        write_json(tmp_path / name, poisoned(json.loads((tmp_path / name).read_text())))
    comparison = write_comparison([tmp_path, make_run(tmp_path / "b", "NLVR2", 4, 8)], tmp_path / "comparison.html")
    for page in map(Page, (write_report(tmp_path), comparison)):
        assert not page.all("script") and len(page.all("style")) == 1
        assert all(image["src"].startswith("data:image/") for image in page.all("img"))
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert page.text.count("<script>alert(1)</script>") > 10


def test_the_gallery_shows_the_largest_changes_first():
    before = predictions({"a": 0.0, "b": 0.6, "c": 1.0, "d": 1.0, "e": 0.0, "f": 1.0, "g": 0.9, "only before": 0.0})
    after = predictions({"a": 0.7, "b": 1.0, "c": 0.0, "d": 0.8, "e": 0.0, "f": 1.0, "g": 0.9, "only after": 0.0})
    groups = group_samples([before, after])
    assert groups == {"better": ["a", "b"], "right": groups["right"], "wrong": ["e"], "worse": ["c", "d"]}
    assert set(groups["right"]) == {"f", "g"}
    assert select_gallery([before, after]) == {"better": ["a", "b"], "worse": ["c", "d"], "wrong": ["e"]}
    assert set(select_gallery([after])["wrong"]) == {"c", "e", "only after"}
    assert group_samples([before, before, after])["better"] == ["a", "b"]
    assert not any(select_gallery([]).values())
    many = {f"val-{index:04}": 0.0 for index in range(300)}
    chosen = select_gallery([predictions(many)])["wrong"]
    assert chosen == select_gallery([predictions(dict(reversed(many.items())))])["wrong"]
    assert len(chosen) == 12 and max(chosen) > "val-0150"
    assert select_gallery([predictions(many)], preferred=["val-0299"])["wrong"][0] == "val-0299"


def test_images_of_any_mode_and_ids_of_any_form_become_small_thumbnails(tmp_path):
    ids = [49153, "../../escape", "a b", "a/b", "a?b", ".hidden", "ü" * 300, "", "dev-1-0-1.png"]
    modes = dict(zip(map(str, ids), ["RGB", "L", "1", "P", "RGBA", "CMYK", "I", "F", "LA"], strict=True))
    save_gallery_images(tmp_path, lambda key: [Image.new(modes[key], size) for size in ((1500, 900), (30, 20))], modes)
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]
    files = sorted((tmp_path / "gallery").iterdir())
    assert len(files) == 2 * len(ids)
    for path in files:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == ((640, 384) if path.stem.endswith("_0") else (30, 20))
    write_json(tmp_path / "eval_after.json", evaluation(dict.fromkeys(ids, 1.0)))
    assert len(Page(write_report(tmp_path)).all("img")) == 2 * len(ids)


def test_the_first_row_with_an_id_is_shown_as_by_a_viewer(tmp_path):
    asked = []
    clear, exif, file = Image.new("RGBA", (60, 30), (0, 0, 0, 0)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by a viewer, and shown on white
    clear.save(file, "PNG", exif=exif)
    turn = {"images": [{"bytes": file.getvalue(), "path": None}], "user": "?", "assistant": "!"}
    for when in ("before", "after"):
        rows = predictions({"first": float(when == "after"), "second": 0.0})
        write_json(tmp_path / f"eval_{when}.json", evaluation({}, predictions=[row | {"id": "the same"} for row in rows]))
    report_run(tmp_path, lambda row: asked.append(row) or {"conversations": [turn]})
    assert asked == [0]
    with Image.open(*(tmp_path / "gallery").iterdir()) as shown:
        assert shown.size == (30, 60) and shown.getpixel((9, 9)) == (255, 255, 255)
    assert "1 got better" in Page(tmp_path / "report.html").text


def test_numbers_are_short():
    values = {200: "200", 12345: "12,345", 2.0: "2", 5e-6: "5e-06", 0.12345: "0.123", 8765.4: "8,765"}
    assert {value: number(value) for value in values} == values


def test_a_long_run_is_reported_within_seconds(tmp_path):
    make_run(tmp_path, "DocVQA", samples=6000, steps=20_000)
    start = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - start < 6
    assert path.stat().st_size < 8e6


def test_runs_are_compared(tmp_path, monkeypatch, capsys):
    first = make_run(tmp_path / "full" / "out", "DocVQA", samples=30, steps=16)
    second = make_run(tmp_path / "lora" / "out", "DocVQA", samples=30, steps=12, learning_rate=2e-4)
    (second / "eval_before.json").unlink()
    for version, run in zip(("0.19.0", "0.19.1"), (first, second), strict=True):
        settings = json.loads((run / "run.json").read_text())
        settings["versions"]["deepspeed"] = version
        settings["hyperparameters"]["deepspeed"] = "zero2.json"
        settings["command"] += " --deepspeed zero2.json" if run == second else ""
        write_json(run / "run.json", settings)
    monkeypatch.setattr(sys, "argv", ["report", str(first), str(second), "--output", str(tmp_path / "both.html")])
    tools.report.main(tools.report.parse_args())
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'both.html'}\n"
    page = Page(tmp_path / "both.html")
    assert "2 runs compared" in page.text
    differing, _, common = page.text.partition("Common settings")
    assert "full/out lora/out Samples evaluated 30 30 Steps 16 12" in differing
    assert "learning_rate 5e-06 0.0002 " in differing and "deepspeed (version) 0.19.0 0.19.1 " in differing
    assert "batch_size 64" in common and "learning_rate" not in common and "deepspeed zero2.json" in common
    after = [json.loads((run / "eval_after.json").read_text()) for run in (first, second)]
    assert re.search(rf"full/out ANLS [\d.]+ {after[0]['anls']:.3f} [+-][\d.]+ ANLS, case", page.text)
    assert re.search(rf"lora/out ANLS — {after[1]['anls']:.3f} ANLS, case", page.text)
    assert f"{second}, without eval_before.json" in page.text
    assert page.charts[:2] == ["Loss", "Gradient norm"]
    groups = group_samples([found["predictions"] for found in after])
    assert len(page.all("article")) == sum(len(groups[group][:12]) for group in ("better", "worse", "wrong")) > 0
    assert "Better than the first run" in page.text
    with pytest.raises(ValueError, match="same directory; pass each run only once"):
        write_comparison([first, first], tmp_path / "both.html")


def test_the_tool_reports_one_run_and_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit):
        tools.report.main(tools.report.parse_args())
    assert "contains no file of a run (run.json" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "nothing")
    write_json(tmp_path / "eval_after.json", evaluation({"a": 1.0}))
    tools.report.main(tools.report.parse_args())
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}\n"
