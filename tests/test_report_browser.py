"""The report in a real browser: readable on a phone and on a desk, by keyboard, in the dark, and with nothing fetched."""

import pytest
from browser import chromium, low_contrast, overflow, wait_until, watched
from report_runs import TASKS, make_run

from common.report.page import write_comparison, write_report


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reports")
    runs = [make_run(directory / task, task, samples=60, steps=80) for task in TASKS]
    reports = {task: write_report(run) for task, run in zip(TASKS, runs, strict=True)}
    return {**reports, "comparison": write_comparison(runs, directory / "comparison.html")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", [*TASKS, "comparison"])
def test_a_report_is_readable(browser, reports, name, width, scheme):
    with watched(browser, width, scheme) as page:
        page.goto(reports[name].as_uri())
        assert overflow(page) == 0
        assert page.locator("h1").is_visible()
        assert page.locator("svg[role=img]").count() >= 6
        for chart in page.locator("svg[role=img]").all():
            assert chart.bounding_box()["width"] > 250
        for picture in page.locator("img:visible").all():
            assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
        assert low_contrast(page) == []


def test_contrast_is_really_measured(browser, reports):
    with watched(browser, 1400) as page:
        page.goto(reports["UCF-101"].as_uri())
        page.add_style_tag(content=".lead { color: #bbb } svg text { fill: #0e6252 !important }")
        low = [text for text, _ in low_contrast(page)]
        assert "microsoft/Phi-3.5-vision-instruct · full" in low
        assert any(text.isdigit() for text in low), "no count on a dark cell of the confusion matrix"


def test_the_samples_are_filtered_by_keyboard(browser, reports):
    with watched(browser, 1400) as page:
        page.goto(reports["DocVQA"].as_uri())
        shown = page.locator("article:visible")
        few, every = shown.count(), page.locator("article").count()
        assert 3 < few < every
        page.locator("#show-few").focus()
        assert page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineStyle") == "solid"
        for group in page.locator("fieldset input").evaluate_all("inputs => inputs.slice(1, -1).map(input => input.id)"):
            page.keyboard.press("ArrowRight")
            assert page.locator(f"#{group}").is_checked()
            assert shown.count() == page.locator(f"article.{group.removeprefix('show-')}").count() > 0
        page.keyboard.press("ArrowRight")
        assert shown.count() == every


def test_a_picture_is_enlarged_by_keyboard(browser, reports):
    with watched(browser, 1400) as page:
        page.goto(reports["NLVR2"].as_uri())
        summary, picture = page.locator(".pictures summary").first, page.locator(".pictures img").first
        small = picture.bounding_box()["width"]
        page.locator("#show-few").focus()
        page.keyboard.press("Tab")
        assert summary.evaluate("summary => summary === document.activeElement")
        assert summary.evaluate("summary => getComputedStyle(summary).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert picture.bounding_box()["width"] > 2 * small
        page.keyboard.press("Enter")
        assert picture.bounding_box()["width"] == small


def test_wide_tables_scroll_by_themselves_and_by_keyboard(browser, reports):
    with watched(browser, 400) as page:
        page.goto(reports["comparison"].as_uri())
        table = page.locator(".scroll").first
        table.focus()
        page.keyboard.press("ArrowRight")
        wait_until(page, "document.querySelector('.scroll').scrollLeft > 0")
        assert overflow(page) == 0


def test_a_prediction_that_attacks_does_nothing(browser, tmp_path):
    attack = '"><img src=x onerror=alert(1)><script>alert(2)</script><a href="https://example.com">x</a>'
    make_run(tmp_path, "NLVR2", samples=8, steps=8)
    for name in ("eval_before.json", "eval_after.json", "run.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        attacked = text.replace('"No."', f'"{attack.replace(chr(34), chr(92) + chr(34))}"').replace("full", "<b>full")
        assert attacked != text or name == "run.json"
        (tmp_path / name).write_text(attacked, encoding="utf-8")
    with watched(browser, 1400) as page:
        page.goto(write_report(tmp_path).as_uri())
        assert page.get_by_text("<script>alert(2)</script>").count() > 0
        assert page.locator("a, script, article b:not(.tag b)").count() == 0
