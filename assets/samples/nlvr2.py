"""Pairs of pictures with a statement, in the layout of the official NLVR2 release."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .page import COLOURS, SHAPES, Page, Shape, write_json_lines

NUMBERS = ("no", "one", "two", "three", "four")
PAIRS_A_SENTENCE = 4


def scatter(rng: np.random.Generator, count: int) -> Page:
    """Draw `count` shapes of up to three kinds and colours at different places of a 4 × 4 grid."""
    kinds, colours = rng.choice(SHAPES, 3, replace=False), rng.choice(list(COLOURS), 3, replace=False)
    shapes = []
    for place in rng.choice(16, count, replace=False):
        kind, colour = str(kinds[rng.integers(3)]), str(colours[rng.integers(3)])
        shapes.append(Shape(kind, colour, 1 + 3 * int(place // 4), 1 + 3 * int(place % 4), rng.uniform(16, 34)))
    return Page(shapes=shapes)


def _draw_statement(rng: np.random.Generator) -> tuple[str, Callable[[Page, Page], bool], tuple[str, str]]:
    """Draw a sentence, the test whether it holds for two pages, and the shape that it is about."""
    kind, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    thing = f"{colour} {kind}"

    def count(page: Page) -> int:
        return sum((shape.kind, shape.colour) == (kind, colour) for shape in page.shapes)

    form, side = rng.integers(4), int(rng.integers(2))
    name = ("left", "right")[side]
    if form == 0:
        return f"The {name} image shows a {thing}.", lambda *pages: count(pages[side]) > 0, (kind, colour)
    if form == 1:
        return f"Both images show a {thing}.", lambda *pages: min(map(count, pages)) > 0, (kind, colour)
    if form == 2:
        return (
            f"Only the {name} image shows a {thing}.",
            lambda *pages: count(pages[side]) > 0 == count(pages[1 - side]),
            (kind, colour),
        )
    total = int(rng.integers(1, 4))
    plural = "s" if total > 1 else ""
    sentence = f"There {'are' if plural else 'is'} {NUMBERS[total]} {kind}{plural} in the {name} image."
    return sentence, lambda *pages: sum(s.kind == kind for s in pages[side].shapes) == total, (kind, colour)


def draw_pair(rng: np.random.Generator, holds: Callable[[Page, Page], bool], about: tuple[str, str], truth: bool):
    """Draw two pages for which `holds` is `truth`, with the shape that it is about on some of them."""
    while True:
        pages = scatter(rng, int(rng.integers(1, 5))), scatter(rng, int(rng.integers(1, 5)))
        for page in pages:
            for shape in page.shapes:
                if rng.random() < 0.3:
                    shape.kind = about[0]
                    shape.colour = about[1] if rng.random() < 0.7 else shape.colour
        if holds(*pages) == truth:
            return pages


def draw_split(out_dir: Path, split: str, sentences: int, rng: np.random.Generator) -> None:
    """Draw one split: `<split>.json` and its pictures, four pairs a sentence of which two are true."""
    rows = []
    for number in range(sentences):
        sentence, holds, about = _draw_statement(rng)
        for pair, truth in enumerate(rng.permutation([True, False] * (PAIRS_A_SENTENCE // 2))):
            name, directory = f"{split}-{number}-{pair}", str(number % 100)
            folder = out_dir / "images" / split / (directory if split == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            for side, page in enumerate(draw_pair(rng, holds, about, bool(truth))):
                page.draw(rng).save(folder / f"{name}-img{side}.png", compress_level=1)
            row = {"identifier": f"{name}-0", "sentence": sentence, "label": str(bool(truth))}
            rows.append(row | ({"directory": directory} if split == "train" else {}))
    write_json_lines(out_dir / f"{split}.json", rows)
