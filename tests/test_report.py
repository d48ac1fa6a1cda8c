"""The report of a run: content, embedded files, missing and invalid files."""

import html
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from report_runs import make_run, write_json

import tools.report
from common.report.gallery import by_id, group_samples, in_gallery, save_thumbnails
from common.report.page import report_run, write_report
from common.report.run import FILES, read_run

TAG = re.compile(r"<style>.*?</style>|<[^>]*>", re.DOTALL)


def report(*runs: Path) -> str:
    """The report of runs, as HTML."""
    path = runs[0] / "report.html"
    write_report(runs, path)
    return path.read_text(encoding="utf-8")


def text(page: str) -> str:
    return " ".join(html.unescape(TAG.sub(" ", page)).split())


def charts(page: str) -> list[str]:
    return re.findall(r'<img src="data:image/svg[^"]*" alt="([^:"]*)', page)


def evaluation(scores: dict, **fields) -> dict:
    rows = [
        {"id": key, "question": f"What is {key}?", "prediction": "it", "answers": ["that"], "score": score}
        for key, score in scores.items()
    ]
    return {"metric": "anls", "anls": 0.5, "samples": len(scores), "predictions": rows} | fields


def by_score(scores: dict) -> dict[str, dict]:
    return by_id(evaluation(scores)["predictions"])


def test_a_report_is_one_file_with_metrics_charts_samples_and_settings(tmp_path):
    make_run(tmp_path, "UCF-101", samples=40, steps=24)
    page = report(tmp_path)
    addresses = re.findall(r' (?:src|href|srcset|action)="([^"]*)', page)
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "@import" not in page and "url(" not in page and "default-src 'none'" in page and "<script" not in page
    ids = re.findall(r' id="([^"]*)', page)
    assert len(ids) == len(set(ids))
    assert report(tmp_path) == page, "not the same again"

    words = text(page)
    before, after = (json.loads((tmp_path / f"eval_{when}.json").read_text())["accuracy"] for when in ("before", "after"))
    assert f"Accuracy before and after before {before:.1%} → after {after:.1%}" in words
    curves = ["Loss", "Gradient norm", "Learning rate", "Images per second", "Tokens per second", "Model FLOPs utilization"]
    assert charts(page) == curves
    samples = len(in_gallery(read_run(tmp_path)))
    assert page.count("<article") == samples > 3
    assert page.count('src="data:image/jpeg') == 8 * samples and 'alt=""' not in page
    assert page.count("<img") == page.count(" alt=") == 8 * samples + len(curves)
    for part in ("torchrun --nproc_per_node=8", "microsoft/Phi-3.5-vision-instruct", "2.13.0", "2026-03-14, 09:26 UTC"):
        assert part in words
    assert re.search(r"Steps 24 Epochs 2 Mean loss 0\.612 .*Tokens per second 2\d,\d{3} .*Training time 1 h 20 min", words)
    assert "num_crops 16" in words and "is missing" not in words and "null" not in words
    for path in (tmp_path / "curves" / f"{name}.png" for name in ("loss", "grad_norm", "learning_rate", "mfu")):
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20


def test_classes_are_listed_worst_first_with_the_most_frequent_wrong_answer(tmp_path):
    pairs = [("Archery", "Archery"), ("Archery", "BenchPress"), ("BenchPress", "benchpress"), ("Archery", "BenchPress")]
    rows = [
        {"id": number, "question": "?", "answers": [truth], "prediction": said, "score": float(truth.lower() == said.lower())}
        for number, (truth, said) in enumerate(pairs)
    ]
    per_class = {"BenchPress": 1.0, "Archery": 1 / 3}
    result = {"metric": "accuracy", "accuracy": 0.5, "accuracy_per_class": per_class, "predictions": rows}
    write_json(tmp_path / "eval_after.json", result)
    assert "Archery — 33.3% BenchPress (2) BenchPress — 100.0% —" in text(report(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_a_corrupt_one_is_an_error(tmp_path, name):
    make_run(tmp_path, "DocVQA", samples=20, steps=8)
    (tmp_path / "report.html").write_text("the last one")
    (tmp_path / name).write_text('{"metric": "anls", ')
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: invalid JSON")):
        report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "the last one" and not list(tmp_path.glob(".*"))

    (tmp_path / name).unlink()
    page = report(tmp_path)
    assert f"{name} is missing: {FILES[name]}" in text(page) and "<article" in page
    assert ("ANLS before and after" in text(page)) == (not name.startswith("eval"))
    assert ("Loss" in charts(page)) == (name != "trainer_state.json")
    assert ("torchrun" in page) == (name != "run.json")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"anls": 0.5}, "'metric' must be the key of a number"),
        ({"metric": "anls"}, "'metric' must be the key of a number"),
        ({"metric": "anls", "anls": 1, "predictions": [{"id": 1, "score": 1}]}, "has no question"),
        ({"metric": "anls", "anls": 1, "predictions": None}, "predictions must be a list of objects"),
        (evaluation({"a": "high"}), "score must be a finite number"),
    ],
)
def test_an_invalid_evaluation_is_an_error_that_names_it(tmp_path, contents, message):
    write_json(tmp_path / "eval_after.json", contents)
    with pytest.raises(ValueError, match=f"eval_after.json.*{message}"):
        report(tmp_path)


def test_values_that_are_missing_or_not_finite(tmp_path):
    log = [{"step": 1, "loss": 2.0, "grad_norm": float("nan")}, {"step": 2, "loss": float("inf"), "grad_norm": 1.0}]
    write_json(tmp_path / "trainer_state.json", {"log_history": log})
    page = report(tmp_path)
    assert charts(page) == ["Loss", "Gradient norm"] and "<article" not in page
    write_json(tmp_path / "eval_before.json", evaluation({"a": 1.0}, metric="auroc", auroc=0.5, accuracy=None))
    after = evaluation({"a": 1.0}, metric="auroc", auroc=float("nan"), accuracy=0.5)
    after["predictions"][0]["p_yes"] = 0.25
    write_json(tmp_path / "eval_after.json", after)
    write_json(tmp_path / "run.json", {"task": "Memes"})
    words = text(report(tmp_path))
    assert "before 0.500 → after —" in words and "Accuracy — 50.0%" in words and "2 → 2, 1 not finite" in words
    assert "P(yes) 0.25" in words and "Command and settings" in words and "nan" not in words.lower()


def test_all_text_is_escaped(tmp_path):
    attack = '</style><script>alert(1)</script><img src=x onerror="alert(2)">"\'$\\frac$ & {{ 7 * 7 }}'
    runs = [make_run(tmp_path / name, "UCF-101", samples=8, steps=8) for name in "ab"]
    described = json.loads((runs[0] / "run.json").read_text())
    for name in ("hyperparameters", "versions"):
        described[name] = {key + attack: str(value) + attack for key, value in described[name].items()}
    texts = {key: value + attack for key, value in described.items() if isinstance(value, str)}
    write_json(runs[0] / "run.json", described | texts)
    for path in (runs[0] / f"eval_{when}.json" for when in ("before", "after")):
        found = json.loads(path.read_text())
        found["accuracy_per_class"] = {name + attack: value for name, value in found["accuracy_per_class"].items()}
        for row in found["predictions"]:
            row |= {key: row[key] + attack for key in ("id", "question", "prediction")} | {"answers": [attack]}
        write_json(path, found)
    for compared in (runs[:1], runs):
        page = report(*compared)
        assert "<script" not in page and page.count("</style>") == 1 and not re.search(r"<[^>]* on\w+=", page)
        assert page.count("<img ") == page.count('<img src="data:image/')
        assert text(page).count("<script>alert(1)</script>") > 10 and "{{ 7 * 7 }}" in text(page)


def test_the_gallery_shows_the_largest_changes_first():
    before = by_score({"a": 0.0, "b": 0.6, "c": 1.0, "d": 1.0, "e": 0.0, "f": 1.0, "g": 0.9, "only before": 0.0})
    after = by_score({"a": 0.7, "b": 1.0, "c": 0.0, "d": 0.8, "e": 0.0, "f": 1.0, "g": 0.9, "only after": 0.0})
    groups = group_samples([before, after])
    assert groups == {"better": ["a", "b"], "right": groups["right"], "wrong": ["e"], "worse": ["c", "d"]}
    assert set(groups["right"]) == {"f", "g"}
    assert set(group_samples([after])["wrong"]) == {"c", "e", "only after"}
    assert group_samples([before, before, after])["better"] == ["a", "b"]
    assert not any(group_samples([]).values())
    many = {f"val-{index:04}": 0.0 for index in range(300)}
    shuffled = group_samples([by_score(many)])["wrong"]
    assert shuffled == group_samples([by_score(dict(reversed(many.items())))])["wrong"]
    assert max(shuffled[:12]) > "val-0150"
    assert group_samples([by_score(many)], preferred=["val-0299"])["wrong"][0] == "val-0299"


def test_images_become_small_thumbnails_whatever_their_ids(tmp_path):
    ids = [49153, "../../escape", "a b", "a/b", "a?b", ".hidden", "ü" * 300, "", "dev-1-0-1.png"]
    save_thumbnails(tmp_path, lambda _: [Image.new("RGB", (1500, 900)), Image.new("L", (30, 20))], map(str, ids))
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]
    files = list((tmp_path / "gallery").iterdir())
    assert len(files) == 2 * len(ids)
    for path in files:
        with Image.open(path) as picture:
            assert picture.format == "JPEG" and picture.size == ((640, 384) if path.stem.endswith("_0") else (30, 20))
    write_json(tmp_path / "eval_after.json", evaluation(dict.fromkeys(ids, 1.0)))
    assert report(tmp_path).count("<img") == 2 * len(ids)


def test_the_first_row_with_an_id_is_shown(tmp_path):
    asked = []
    Image.new("RGB", (60, 30)).save(tmp_path / "a.png")
    turn = {"images": [str(tmp_path / "a.png")], "user": "?", "assistant": "!"}
    for when in ("before", "after"):
        rows = evaluation({"first": float(when == "after"), "second": 0.0})["predictions"]
        write_json(tmp_path / f"eval_{when}.json", evaluation({}, predictions=[row | {"id": "the same"} for row in rows]))
    report_run(tmp_path, lambda row: asked.append(row) or {"conversations": [turn]})
    assert asked == [0]
    page = (tmp_path / "report.html").read_text()
    assert "1 better than before" in text(page) and page.count("<article") == page.count("data:image/jpeg") == 1


def test_the_tool_compares_runs_and_reports_errors(tmp_path, run_main, capsys):
    first = make_run(tmp_path / "full" / "out", "DocVQA", samples=30, steps=16)
    second = make_run(tmp_path / "lora" / "out", "DocVQA", samples=30, steps=12, learning_rate=2e-4)
    (second / "eval_before.json").unlink()
    settings = json.loads((second / "run.json").read_text())
    settings["versions"]["deepspeed"] = "0.19.1"
    settings["eval_set"] = {"split": "val"}
    write_json(second / "run.json", settings)
    elsewhere = tmp_path / "elsewhere"  # a run may be read-only
    assert run_main(tools.report, first, "--output", elsewhere / "full.html") == f"Wrote {elsewhere / 'full.html'}\n"
    assert not (elsewhere / "curves").exists() and not (first / "curves").exists()
    assert run_main(tools.report, first) == f"Wrote {first / 'report.html'}\n"
    run_main(tools.report, first, second, "--output", elsewhere / "both.html")
    page = (elsewhere / "both.html").read_text()
    assert "eval_set" not in page and "split — val" in text(page)
    words = text(page)
    assert "2 runs compared" in words and "lora/out/eval_before.json is missing" in words
    _, differing, common = re.split("What differs|What is the same", words)
    assert "full/out lora/out Steps 16 12" in differing
    assert "learning_rate 5e-06 0.0002 " in differing and "deepspeed (version) 0.19.0 0.19.1 " in differing
    assert "batch_size 64" in common and "learning_rate" not in common
    after = [json.loads((run / "eval_after.json").read_text()) for run in (first, second)]
    assert re.search(rf"full/out ANLS before and after before [\d.]+ → after {after[0]['anls']:.3f} ", words)
    assert f"lora/out ANLS after {after[1]['anls']:.3f} " in words
    groups = group_samples([by_id(found["predictions"]) for found in after])
    assert page.count("<article") == sum(len(ids[:12]) for ids in groups.values()) > 0
    assert f"{len(groups['better'])} better than the first run" in words
    for runs, message in (
        ([first, first], "same directory; pass each run only once"),
        ([tmp_path], "no file of a run (run.json"),
    ):
        with pytest.raises(SystemExit):
            run_main(tools.report, *runs)
        assert message in capsys.readouterr().err
