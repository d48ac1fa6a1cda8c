"""Pictures with words on them, in the layout of the official Hateful Memes release.

A harmless stand-in for its label: 1 where the words name another colour or shape than the picture shows. Neither
the words nor the picture tell it alone.
"""

from pathlib import Path

import numpy as np

from .page import COLOURS, COLUMNS, SHAPES, Page, Shape, write_json_lines

OPENINGS = ("LOOK AT THIS", "WHEN YOU GET A", "NOT AGAIN A", "SUCH A FINE", "MY NEW", "EVERYONE LOVES A", "SO PROUD OF MY")


def draw_meme(rng: np.random.Generator, clash: bool) -> tuple[Page, str]:
    """Draw a shape between two lines of words and return it with the words."""
    colours, kinds = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
    shown = [str(colours[0]), str(kinds[0])]
    named = list(shown)
    if clash:
        changed = rng.integers(2)
        named[changed] = str((colours, kinds)[changed][1])
    page = Page(shapes=[Shape(shown[1], shown[0], int(rng.integers(5, 7)), int(rng.integers(4, 8)), rng.uniform(38, 65))])
    words = [OPENINGS[rng.integers(len(OPENINGS))], " ".join(named).upper()]
    for line, text in zip((1, 10), words, strict=True):
        page.write(line, (COLUMNS - len(text)) // 2, text)
    return page, " ".join(words).lower()


def draw_split(out_dir: Path, name: str, count: int, first_id: int, rng: np.random.Generator) -> None:
    """Draw one split: `img/<id>.png` and `<name>.jsonl`, half of each label."""
    (out_dir / "img").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, label in zip(range(first_id, first_id + count), rng.permutation(np.arange(count) % 2), strict=True):
        page, text = draw_meme(rng, clash=bool(label))
        image = f"img/{number:05d}.png"
        page.draw(rng).save(out_dir / image, compress_level=1)
        rows.append({"id": number, "img": image, "label": int(label), "text": text})
    write_json_lines(out_dir / f"{name}.jsonl", rows)
