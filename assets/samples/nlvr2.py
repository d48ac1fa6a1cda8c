"""Image pairs with a statement, in the layout of the official NLVR2 release."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .page import NAMED_COLOURS, NAMED_SHAPES, Page, Shape, write_json_lines

PAIRS_A_SENTENCE = 4


def _draw_statement(rng: np.random.Generator) -> tuple[str, Callable[[Page, Page], bool], tuple[str, str]]:
    """Draw a sentence; return it with a function that tests it on two pages, and the color and kind that it names."""
    colour, kind = str(rng.choice(NAMED_COLOURS)), str(rng.choice(NAMED_SHAPES))
    with_colour = rng.random() < 0.6
    thing = f"{colour} {kind}" if with_colour else kind

    def shown(page: Page) -> bool:
        return any(shape.kind == kind and (shape.colour == colour or not with_colour) for shape in page.shapes)

    form, side = rng.integers(3), int(rng.integers(2))
    if form == 0:
        return f"The {('left', 'right')[side]} image shows a {thing}.", lambda *pages: shown(pages[side]), (colour, kind)
    if form == 1:
        return f"Both images show a {thing}.", lambda *pages: all(map(shown, pages)), (colour, kind)
    return f"At least one image shows a {thing}.", lambda *pages: any(map(shown, pages)), (colour, kind)


def _draw_page(rng: np.random.Generator, about: tuple[str, str]) -> Page:
    """Draw one shape, usually with the color and the kind that the statement names."""
    drawn = (str(rng.choice(options)) for options in (NAMED_COLOURS, NAMED_SHAPES))
    colour, kind = (wanted if rng.random() < 0.6 else other for wanted, other in zip(about, drawn, strict=True))
    row, column = (int(place) for place in rng.integers(3, 9, 2))
    return Page(shapes=[Shape(kind, colour, row, column, rng.uniform(22, 42))])


def draw_split(out_dir: Path, split: str, sentences: int, rng: np.random.Generator) -> None:
    """Draw one split: `<split>.json` and its images, with four pairs per sentence, two of them true."""
    rows = []
    for number in range(sentences):
        sentence, holds, about = _draw_statement(rng)
        for pair, truth in enumerate(rng.permutation([True, False] * (PAIRS_A_SENTENCE // 2))):
            name, directory = f"{split}-{number}-{pair}", str(number % 100)
            folder = out_dir / "images" / split / (directory if split == "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            pages = None
            while pages is None or holds(*pages) != truth:
                pages = [_draw_page(rng, about) for _ in range(2)]
            for side, page in enumerate(pages):
                page.draw(rng).save(folder / f"{name}-img{side}.png", compress_level=1)
            row = {"identifier": f"{name}-0", "sentence": sentence, "label": str(bool(truth))}
            rows.append(row | ({"directory": directory} if split == "train" else {}))
    write_json_lines(out_dir / f"{split}.json", rows)
