"""A headless Chromium, and accessibility checks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

# The contrast of every visible text with its background, which is composed of all layers behind it. Visually hidden texts are
# left out.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paint = (element) => {
    const style = getComputedStyle(element);
    const [r, g, b, a] = rgba(style.backgroundColor);
    return [r, g, b, a * style.opacity];
  };
  const results = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || ["SCRIPT", "STYLE", "style"].includes(element.tagName)) continue;
    const visible = element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!visible || element.closest(".visually-hidden")) continue;
    const range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    element.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
    const box = range.getClientRects()[0];
    if (!box || box.width < 2 || box.height < 2) continue;
    const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    if (!stack.length) continue;
    const layers = stack.map(paint).reverse();
    const backdrop = layers.reduce((below, top) => over(top, below), rgba("Canvas").slice(0, 3));
    const ink = rgba(getComputedStyle(element).color);
    const [high, low] = [luminance(over(ink, backdrop)), luminance(backdrop)].sort((a, b) => b - a);
    results.push([text.slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return results;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield a headless Chromium, or skip the test if none is installed."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium on PATH (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, width: int, scheme: str = "light", allowed: str = "file:") -> Iterator[Page]:
    """Yield a page that must not log an error, open a dialog, or request anything but `allowed` and embedded data."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else 0)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.on(
        "request",
        lambda request: complaints.append(request.url) if not request.url.startswith((allowed, "data:", "blob:")) else 0,
    )
    yield page
    page.close()
    assert complaints == []


def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def low_contrast(page: Page, least: float = 4.5, enough: int = 20) -> list[list]:
    """Return the texts with too little contrast, with their contrast; at least `enough` texts must be visible."""
    measured = page.evaluate(CONTRAST)
    assert len(measured) >= enough, f"the page shows hardly any text: {measured}"
    return [[text, round(contrast, 2)] for text, contrast in measured if contrast < least]
