"""Images of 336 × 336 px with monospaced text and colored shapes.

Text is on a grid of 12 lines × 24 columns with cells of 14 × 28 px, so that one image token of Phi-3-V (28 × 28 px) covers
two characters. Shapes are on the coarser grid of tokens.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, LINES, COLUMNS = 336, 12, 24
CELL_WIDTH, CELL_HEIGHT, TOKEN = 14, 28, 28
JITTER = 3

COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 210),
    "green": (40, 150, 60),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "black": (25, 25, 25),
    "pink": (245, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
# Used by memes and image pairs: few enough for the tiny checkpoint to learn each word well.
NAMED_COLOURS, NAMED_SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle", "star")


@cache
def _glyph(character: str) -> np.ndarray:
    """Return the coverage of a character, float32 from 0 to 1, (CELL_HEIGHT, CELL_WIDTH)."""
    # matplotlib includes this font on every platform; with a system font, the images would depend on the machine.
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), 23)
    cell = Image.new("L", (CELL_WIDTH, CELL_HEIGHT), 0)
    ImageDraw.Draw(cell).text((0, 22), character, fill=255, font=font, anchor="ls")
    return np.asarray(cell, dtype=np.float32) / 255


def _outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the vertices of a polygonal shape."""
    if kind == "square":
        angles, radii = np.pi / 4 + np.arange(4) * np.pi / 2, [1.2]
    elif kind == "triangle":
        angles, radii = -np.pi / 2 + np.arange(3) * 2 * np.pi / 3, [1.2]
    elif kind == "diamond":
        angles, radii = np.arange(4) * np.pi / 2, [0.75, 1.25]
    elif kind == "star":
        angles, radii = -np.pi / 2 + np.arange(10) * np.pi / 5, [1.25, 0.5]
    elif kind == "cross":
        arm = radius / 3
        return [
            (x + dx * arm, y + dy * arm)
            for dx, dy in [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)]
            + [(-3, -1), (-1, -1)]
        ]
    else:  # heart
        t = np.linspace(0, 2 * np.pi, 40)
        wide = 16 * np.sin(t) ** 3
        high = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return list(zip(x + wide * radius / 16, y + high * radius / 16, strict=True))
    return [
        (x + radius * radii[i % len(radii)] * np.cos(a), y + radius * radii[i % len(radii)] * np.sin(a))
        for i, a in enumerate(angles)
    ]


def draw_shape(draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    """Draw one of SHAPES centered at (x, y); positions and radius in pixels."""
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        draw.ellipse(box, fill=fill)
    elif kind == "ring":
        draw.ellipse(box, outline=fill, width=max(3, int(radius * 0.4)))
    else:
        draw.polygon(_outline(kind, x, y, radius), fill=fill)


@dataclass
class Shape:
    """A shape with a radius in pixels, centered on the token at `row` and `column` (0 to 11)."""

    kind: str
    colour: str
    row: int
    column: int
    radius: float


@dataclass
class Page:
    """The content of an image, before it is drawn.

    Attributes
    ----------
    texts
        Entries of (line 0 to 11, column 0 to 23, characters), one per run of text.
    shapes
        The shapes, drawn below the text.
    rules
        Lines of the grid that are underlined with a thin rule.
    """

    texts: list[tuple[int, int, str]] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    rules: list[int] = field(default_factory=list)

    def write(self, line: int, column: int, text: str) -> None:
        """Put `text` on the grid.

        Raises
        ------
        ValueError
            If it does not fit on the page.
        """
        if not (0 <= line < LINES and column >= 0 and column + len(text) <= COLUMNS):
            raise ValueError(f"{text!r} does not fit at line {line}, column {column} of {LINES} × {COLUMNS} cells.")
        self.texts.append((line, column, text))

    def grid(self) -> np.ndarray:
        """Return the characters as an array of str, (12, 24), with spaces in empty cells."""
        grid = np.full((LINES, COLUMNS), " ")
        for line, column, text in self.texts:
            grid[line, column : column + len(text)] = list(text)
        return grid

    def draw(self, rng: np.random.Generator) -> Image.Image:
        """Draw the page; `rng` determines paper, ink, and small shifts of each run and shape."""
        paper = rng.integers(228, 256) - rng.integers(0, 10, 3)
        image = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in paper))
        draw = ImageDraw.Draw(image)
        for line in self.rules:
            y = (line + 1) * CELL_HEIGHT - 1 + int(rng.integers(-1, 2))
            draw.line((6, y, SIDE - 6, y), fill=(150, 150, 150))
        for shape in self.shapes:
            x, y = ((shape.column + 0.5) * TOKEN, (shape.row + 0.5) * TOKEN) + rng.uniform(-7, 7, 2)
            fill = np.clip(np.array(COLOURS[shape.colour]) + rng.integers(-14, 15, 3), 0, 255)
            draw_shape(draw, shape.kind, x, y, shape.radius, tuple(int(v) for v in fill))
        if not self.texts:
            return image
        ink = rng.integers(0, 70, 3).astype(np.float32)
        # The margin is for glyphs that are shifted beyond the edge.
        coverage = np.zeros((SIDE + 2 * JITTER, SIDE + 2 * JITTER), np.float32)
        for line, column, text in self.texts:
            # No shift beyond the upper and left edge.
            dx, dy = rng.integers((JITTER * (column == 0), JITTER * (line == 0)), 2 * JITTER + 1)
            for i, character in enumerate(text):
                if character != " ":
                    x, y = (column + i) * CELL_WIDTH + dx, line * CELL_HEIGHT + dy
                    window = coverage[y : y + CELL_HEIGHT, x : x + CELL_WIDTH]
                    np.maximum(window, _glyph(character), out=window)
        coverage = coverage[JITTER : JITTER + SIDE, JITTER : JITTER + SIDE, None]
        pixels = np.asarray(image, dtype=np.float32)
        return Image.fromarray((pixels * (1 - coverage) + ink * coverage).round().astype(np.uint8))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    _write_whole(path, json.dumps(content, indent=1))


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON Lines file atomically."""
    _write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
