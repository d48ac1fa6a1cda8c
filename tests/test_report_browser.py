"""The report in a browser: readable on a phone and on a desk, in the dark, by keyboard, and with nothing fetched."""

import pytest
from browser import chromium, low_contrast, overflow, watched
from report_runs import make_run

from common.report.page import write_report


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reports")
    runs = {task: [make_run(directory / task, task)] for task in ("UCF-101", "DocVQA")}
    runs["comparison"] = [*runs["DocVQA"], make_run(directory / "another run of DocVQA", "DocVQA", learning_rate=2e-4)]
    for name, compared in runs.items():
        write_report(compared, directory / f"{name}.html")
    return {name: (directory / f"{name}.html").as_uri() for name in runs}


# The words of headings, tables and lists are not broken, and no column is cut off.
BROKEN = """() => [...document.querySelectorAll("h1, h2, th, td, dt, label")].filter((element) => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return element.checkVisibility() && range.getBoundingClientRect().right > innerWidth;
}).map((element) => element.textContent)"""


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1400, "dark")])
@pytest.mark.parametrize("name", ["UCF-101", "comparison"])
def test_a_report_is_readable(browser, reports, name, width, scheme):
    with watched(browser, width, scheme) as page:
        page.goto(reports[name])
        assert overflow(page) == 0 and page.evaluate(BROKEN) == []
        assert page.locator("h1").is_visible()
        charts = page.locator("figure img")
        assert charts.count() == 6
        assert all(chart.bounding_box()["width"] > 250 for chart in charts.all())
        broken = "images => images.filter(image => !image.complete || !image.naturalWidth).length"
        assert page.locator("img:visible").evaluate_all(broken) == 0
        assert low_contrast(page) == []
        page.add_style_tag(content="dt { color: #888 !important; background: #888 }")
        assert "Expected" in [text for text, _ in low_contrast(page)], "the contrast is not measured"


@pytest.mark.parametrize("name", ["DocVQA", "comparison"])
def test_samples_are_filtered_and_images_enlarged_by_keyboard(browser, reports, name):
    with watched(browser, 1400) as page:
        page.goto(reports[name])
        shown, every = page.locator("article:visible"), page.locator("article").count()
        assert 3 < shown.count() < every
        page.locator("#show-few").focus()
        assert page.evaluate("getComputedStyle(document.activeElement.parentElement).outlineStyle") == "solid"
        for group in page.locator("fieldset input").evaluate_all("inputs => inputs.slice(1, -1).map(input => input.id)"):
            page.keyboard.press("ArrowRight")
            assert page.locator(f"#{group}").is_checked()
            assert shown.count() == page.locator(f"article.{group.removeprefix('show-')}").count() > 0
        page.keyboard.press("ArrowRight")
        assert shown.count() == every
        image = page.locator("article img").first
        small = image.bounding_box()["height"]
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert image.bounding_box()["height"] > 2 * small
        page.keyboard.press("Enter")
        assert image.bounding_box()["height"] == small
