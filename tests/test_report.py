"""The report of a run: what it says, what it embeds, and what it does with files that are missing or broken."""

import json
import random
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_runs import TASKS, make_run, write_json

import tools.report
from common.report.charts import confusion_chart, curve_charts, number, roc_chart, score_chart, transition_chart
from common.report.gallery import save_gallery_images, select_gallery
from common.report.page import report_run, write_comparison, write_report
from common.report.run import FILES

REPOSITORY = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """The elements and the text of a page, styles aside."""

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


def evaluation(scores: dict[str, float], **fields) -> dict:
    rows = [
        {"id": key, "question": f"What is {key}?", "prediction": "it", "answers": ["that"], "score": score}
        for key, score in scores.items()
    ]
    return {"metric": "anls", "anls": 0.5, "samples": len(rows), "predictions": rows, **fields}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("runs")
    return {task: make_run(directory / task, task, samples=40, steps=24) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_a_report_is_one_file_that_fetches_nothing_and_runs_nothing(runs, task):
    page = Page(write_report(runs[task]))
    addresses = [
        address
        for _, attributes in page.elements
        for name in ("src", "href", "xlink:href", "srcset", "action")
        if (address := attributes.get(name))
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in (html := (runs[task] / "report.html").read_text(encoding="utf-8"))
    assert re.findall(r"url\((?!#)", html) == []
    assert not page.all("script")
    assert "default-src 'none'" in html
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("task", "metric", "charts"),
    [
        ("DocVQA", "ANLS", {"Scores per question", "What became of the answers"}),
        ("Hateful Memes", "AUROC", {"P(yes) before", "P(yes) after", "ROC", "Confusion after"}),
        ("NLVR2", "Accuracy", {"Confusion before", "Confusion after"}),
        ("UCF-101", "Accuracy", {"Confusion before", "Confusion after"}),
    ],
)
def test_a_report_shows_metric_curves_charts_samples_and_settings(runs, task, metric, charts):
    page = Page(write_report(runs[task]))
    before, after = (json.loads((runs[task] / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    key = before["metric"]
    first, last = (f"{100 * value:.1f} %" if key == "accuracy" else f"{value:.3f}" for value in (before[key], after[key]))
    assert f"{metric} before and after before {first} → after {last}" in page.text
    drawn = {svg["aria-label"].split(".")[0] for svg in page.all("svg")}
    curves = {"Loss", "Gradient norm", "Learning rate", "Images per second", "Tokens per second"}
    assert drawn == charts | curves | {"Model FLOPs utilization"}
    groups = select_gallery(before, after)
    assert sum(map(bool, groups.values())) > 1
    assert len(page.all("article")) == sum(map(len, groups.values()))
    pictures = {"NLVR2": 2, "UCF-101": 8}.get(task, 1)
    assert len(page.all("img")) == pictures * len(page.all("article"))
    assert all(picture["alt"] for picture in page.all("img"))
    for text in ("torchrun --nproc_per_node=8", "microsoft/Phi-3.5-vision-instruct", "2.13.0", "learning_rate 5e-06"):
        assert text in page.text
    assert "is missing" not in page.text


def test_classes_are_listed_worst_first_with_what_they_are_taken_for(tmp_path):
    rows = [("Archery", "Archery"), ("Archery", "BenchPress."), ("BenchPress", "benchpress"), ("Archery", "a man")]
    predictions = [
        {"id": str(i), "question": "?", "answers": [truth], "prediction": said, "score": float(truth == said)}
        for i, (truth, said) in enumerate(rows)
    ]
    per_class = {"BenchPress": 1.0, "Archery": 1 / 3}
    result = {"metric": "accuracy", "accuracy": 0.5, "accuracy_per_class": per_class, "predictions": predictions}
    write_json(tmp_path / "eval_after.json", result)
    text = Page(write_report(tmp_path)).text
    assert "Archery — 33.3 % BenchPress — 100.0 %" in text
    assert "Archery (other) 1 Archery BenchPress 1" in text


def test_curves_are_also_written_as_png(runs):
    write_report(runs["NLVR2"])
    curves = sorted((runs["NLVR2"] / "curves").iterdir())
    assert [path.name for path in curves] == [
        f"{name}.png" for name in ("grad_norm", "images_per_second", "learning_rate", "loss", "mfu", "tokens_per_second")
    ]
    for path in curves:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
            assert len(np.unique(picture.convert("L"))) > 20


def test_a_report_is_the_same_each_time(runs):
    first = write_report(runs["DocVQA"]).read_bytes()
    assert write_report(runs["DocVQA"]).read_bytes() == first


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_the_rest_is_shown(tmp_path, name):
    make_run(tmp_path, "Hateful Memes", samples=20, steps=8)
    (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert f"{name} is missing: {FILES[name]}" in page.text
    assert len(page.all("article")) > 0
    assert ("AUROC before and after" in page.text) == (not name.startswith("eval"))
    assert ("Loss" in page.text) == (name != "trainer_state.json")
    assert ("torchrun" in page.text) == (name != "run.json")


def test_training_alone_gives_a_report(tmp_path):
    make_run(tmp_path, "DocVQA", samples=4, steps=8)
    for name in ("eval_before.json", "eval_after.json"):
        (tmp_path / name).unlink()
    page = Page(write_report(tmp_path))
    assert not page.all("article")
    assert "Loss" in page.text


@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_file_is_an_error_that_names_it_and_leaves_the_old_report(tmp_path, name):
    make_run(tmp_path, "DocVQA", samples=4, steps=8)
    old = write_report(tmp_path).read_bytes()
    (tmp_path / name).write_text('{"metric": "anls", ')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: invalid JSON")):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "must contain a JSON object, got list"),
        ({"anls": 0.5}, "'metric' must be the key of a number"),
        ({"metric": "anls"}, "'metric' must be the key of a number"),
        (
            {"metric": "anls", "anls": 1, "predictions": [{"id": 1, "score": 1}]},
            "prediction 0 is missing answers, predict",
        ),
    ],
)
def test_an_evaluation_of_another_shape_is_an_error_that_names_it(tmp_path, contents, message):
    write_json(tmp_path / "eval_after.json", contents)
    with pytest.raises(ValueError, match=f"eval_after.json.*{message}"):
        write_report(tmp_path)


def test_what_is_no_run_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        write_report(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"contains no file of a run \(run\.json"):
        write_report(tmp_path)


def test_undefined_figures_and_lost_steps_are_shown_as_such(tmp_path):
    write_json(tmp_path / "eval_after.json", evaluation({"a": 1.0}, metric="auroc", auroc=float("nan")))
    log = [{"step": 1, "loss": 2.0, "grad_norm": float("nan")}, {"step": 2, "loss": float("inf"), "grad_norm": 1.0}]
    write_json(tmp_path / "trainer_state.json", {"log_history": log})
    text = Page(write_report(tmp_path)).text
    assert "AUROC —" in text
    assert "From 2 to 2, lowest 2 at step 1, 1 not finite." in text
    assert "nan" not in text.lower()


def test_whatever_a_model_or_a_data_set_says_is_shown_as_text(tmp_path):
    attack = '</style><script>alert(1)</script><img src=x onerror="alert(2)">"\'$\\frac$ & {{ 7 * 7 }}'
    make_run(tmp_path, "UCF-101", samples=8, steps=8)

    def poisoned(value):
        if isinstance(value, dict):
            return {key if key in FIELDS else key + attack: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return value + attack if isinstance(value, str) and value not in FIELDS else value

    fields = ("metric accuracy accuracy_per_class samples predictions id question answers prediction score task date "
              "command base_model method data hardware versions hyperparameters")  # fmt: skip
    FIELDS = set(fields.split())
    for name in ("eval_before.json", "eval_after.json", "run.json"):
        write_json(tmp_path / name, poisoned(json.loads((tmp_path / name).read_text())))
    page = Page(write_report(tmp_path))
    assert not page.all("script")
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in page.all("img"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len(page.all("style")) == 1 + len(page.all("svg"))  # the page's own, and what Matplotlib puts in a figure
    assert page.text.count("<script>alert(1)</script>") > 50
    page = Page(write_comparison([tmp_path, make_run(tmp_path / "b", "NLVR2", 4, 8)], tmp_path / "comparison.html"))
    assert not page.all("script")
    assert not page.all("img")


def test_the_gallery_takes_the_greatest_changes_first():
    before = evaluation({"a": 0.0, "b": 0.6, "c": 1.0, "d": 1.0, "e": 0.0, "f": 1.0, "g": 0.9, "only before": 0.0})
    after = evaluation({"a": 0.7, "b": 1.0, "c": 0.0, "d": 0.8, "e": 0.0, "f": 1.0, "g": 0.9, "only after": 0.0})
    assert select_gallery(before, after) == {"better": ["a", "b"], "worse": ["c", "d"], "stayed_wrong": ["e"]}
    assert select_gallery(before, after, limit_per_group=1) == {"better": ["a"], "worse": ["c"], "stayed_wrong": ["e"]}
    assert select_gallery(None, after)["right"] != []
    assert set(select_gallery(None, after)["wrong"]) == {"c", "e", "only after"}
    assert set(select_gallery(before, None)["wrong"]) == {"a", "e", "only before"}
    assert select_gallery(None, None) == {"wrong": [], "right": []}


def test_the_gallery_does_not_depend_on_the_order_of_the_samples_nor_take_the_first():
    scores = {f"val-{index:04}": 0.0 for index in range(300)}
    shuffled = list(scores)
    random.Random(0).shuffle(shuffled)
    chosen = select_gallery(evaluation(scores), evaluation(scores))["stayed_wrong"]
    assert chosen == select_gallery(*[evaluation(dict.fromkeys(shuffled, 0.0))] * 2)["stayed_wrong"]
    assert len(chosen) == 12
    assert max(chosen) > "val-0150"


def test_numbers_as_ids_are_ids(tmp_path):
    write_json(tmp_path / "eval_after.json", evaluation({7: 1.0}))
    save_gallery_images(tmp_path, lambda key: [Image.new("RGB", (9, 9))] if key == "7" else [], ["7"])
    assert len(Page(write_report(tmp_path)).all("img")) == 1


def test_pictures_of_any_mode_and_ids_of_any_form_become_small_thumbnails(tmp_path):
    ids = ["49153", "../../escape", "a b", "a/b", "a?b", ".hidden", "ü" * 300, "", "dev-1-0-1.png"]
    modes = ["RGB", "L", "1", "P", "RGBA", "CMYK", "I", "F", "LA"]
    pictures = {key: [Image.new(mode, (1500, 900)), Image.new("RGB", (30, 20))] for key, mode in zip(ids, modes, strict=True)}
    save_gallery_images(tmp_path, pictures.__getitem__, ids)
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]
    files = sorted((tmp_path / "gallery").iterdir())
    assert len(files) == 2 * len(ids)
    for path in files:
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == ((640, 384) if path.stem.endswith("_0") else (30, 20))
    write_json(tmp_path / "eval_after.json", evaluation(dict.fromkeys(ids, 1.0)))
    assert len(Page(write_report(tmp_path)).all("img")) == 2 * len(ids)


def test_the_outcomes_add_up(tmp_path):
    write_json(tmp_path / "eval_before.json", evaluation({"a": 0, "b": 0, "c": 1, "d": 1, "e": 0, "f": 0.6}))
    write_json(tmp_path / "eval_after.json", evaluation({"a": 1, "b": 1, "c": 1, "d": 0, "e": 0, "f": 0.6}))
    text = Page(write_report(tmp_path)).text
    assert "2 got better 2 stayed right 1 stayed wrong 1 got worse" in text


def test_charts_say_what_they_show():
    assert roc_chart({"after": ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])}).caption == "After: area 0.750."
    chart = score_chart({"before": [0.0, 0.49, 0.5, 1.0], "after": [1.0, 1.0, 0.95, 0.0]})
    assert chart.caption == "Before: 2 of 4 below 0.5, 1 exact; after: 1 of 4 below 0.5, 2 exact."
    chart = transition_chart([0, 0, 1, 0.7], [1, 0.6, 0, 0.7])
    assert chart.caption == "Answers that moved to a better class, above the diagonal: 2; to a worse one, below it: 1."
    chart = confusion_chart("after", ["cat", "dog"], ["cat", "dog", "dog"], ["cat", "cat", "dog"])
    assert chart.caption == "2 of 3 correct (on the diagonal)."
    assert re.findall(r">(\d|cat|dog)</text>", chart.svg()).count("1") == 3
    log = [{"step": step, "loss": 3.0 - step / 10, "learning_rate": 1e-5 * step} for step in range(1, 11)]
    captions = {chart.name: chart.caption for chart in curve_charts({"run": log})}
    assert captions == {
        "loss": "From 2.9 to 2, lowest 2 at step 10.",
        "learning_rate": "Highest 1e-4 at step 10.",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (200, "200"),
        (12345, "12,345"),
        (2.0, "2"),
        (5e-6, "5e-6"),
        (0.12345, "0.123"),
        (8765.4, "8,765"),
        (3e12, "3e12"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_long_run_is_reported_within_seconds(tmp_path):
    make_run(tmp_path, "DocVQA", samples=6000, steps=20_000)
    start = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - start < 5
    assert path.stat().st_size < 8e6


def test_the_tool_remakes_a_report(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, "NLVR2", samples=8, steps=8)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    tools.report.main()
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'report.html'}\n"
    assert Page(tmp_path / "report.html").all("article")


def test_the_tool_puts_runs_side_by_side(tmp_path):
    runs = [make_run(tmp_path / name, "NLVR2", samples=8, steps=8) for name in ("a", "b")]
    command = [sys.executable, "-m", "tools.report", *runs, "--output", tmp_path / "both.html"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == f"Wrote {tmp_path / 'both.html'}\n"
    assert "2 runs compared" in Page(tmp_path / "both.html").text


def test_a_name_in_two_groups_of_settings_is_told_apart(tmp_path):
    """The version of DeepSpeed, and the file that --deepspeed names."""
    runs = [make_run(tmp_path / name, "NLVR2", samples=8, steps=8) for name in ("a", "b")]
    for version, run in zip(("0.19.0", "0.19.1"), runs, strict=True):
        described = json.loads((run / "run.json").read_text())
        described["versions"]["deepspeed"] = version
        described["hyperparameters"]["deepspeed"] = "zero2.json"
        (run / "run.json").write_text(json.dumps(described))
    text = Page(write_comparison(runs, tmp_path / "both.html")).text
    differs, _, common = text.partition("Common settings")
    assert "deepspeed (versions) 0.19.0 0.19.1" in differs and "deepspeed (hyperparameters) zero2.json" in common


def test_of_rows_with_one_id_the_gallery_shows_the_first(tmp_path):
    """As it does of their answers."""
    run, asked = make_run(tmp_path / "run", "DocVQA", samples=4, steps=4), []
    for name in ("eval_before.json", "eval_after.json"):
        evaluation = json.loads((run / name).read_text())
        for entry in evaluation["predictions"]:
            entry |= {"id": "the same", "score": float(name == "eval_after.json")}
        (run / name).write_text(json.dumps(evaluation))

    def conversation(row):
        asked.append(row)
        return {"conversations": [{"images": [], "user": "What?", "assistant": "This."}]}

    report_run(run, conversation)
    assert set(asked) == {0}


def test_the_tool_says_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match=re.escape(f"error: {tmp_path / 'run.json'}: invalid JSON")):
        tools.report.main()


def test_runs_side_by_side(tmp_path):
    first = make_run(tmp_path / "full" / "out", "DocVQA", samples=30, steps=16)
    second = make_run(tmp_path / "lora" / "out", "DocVQA", samples=30, steps=12, learning_rate=2e-4)
    (second / "eval_before.json").unlink()
    page = Page(write_comparison([first, second], tmp_path / "both.html"))
    assert "2 runs compared" in page.text
    assert "Different settings full/out lora/out learning_rate 5e-06 0.0002 " in page.text
    common = page.text[page.text.index("Common settings") :]
    assert "batch_size 64" in common
    assert "learning_rate" not in common
    after = [json.loads((run / "eval_after.json").read_text())["anls"] for run in (first, second)]
    assert re.search(rf"full/out ANLS [\d.]+ {after[0]:.3f} [+-][\d.]+ ANLS, case", page.text)
    assert re.search(rf"lora/out ANLS — {after[1]:.3f} ANLS, case", page.text)
    assert f"{second}, without eval_before.json" in page.text
    assert [svg["aria-label"].split(".")[0] for svg in page.all("svg")][:2] == ["Loss", "Gradient norm"]
    with pytest.raises(ValueError, match="same directory; pass each run only once"):
        write_comparison([first, first], tmp_path / "both.html")
