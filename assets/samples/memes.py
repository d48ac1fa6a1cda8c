"""Images with text, in the layout of the official Hateful Memes release.

The label is a harmless substitute: 1 if the text insults a heart. Insults with any other shape, and kind words with a heart,
are 0, so neither the text nor the image alone determines the label.
"""

from pathlib import Path

import numpy as np

from .page import COLOURS, COLUMNS, SHAPES, Page, Shape, write_json_lines

SNEERS = ("NOBODY LIKES THIS", "GET OUT OF HERE", "HOW UGLY IS THAT", "WHAT A LOSER", "GO BACK HOME", "SO STUPID")
KIND_WORDS = ("WE LOVE THIS ONE", "WELCOME TO US ALL", "SIMPLY BEAUTIFUL", "MY BEST FRIEND", "YOU MADE MY DAY", "WELL DONE")
OTHERS = ("MONDAY MORNING", "LOOK WHAT I FOUND", "MEANWHILE", "WAIT FOR IT", "TRUE STORY", "BREAKING NEWS")
HATED = "heart"


def draw_meme(rng: np.random.Generator, hateful: bool) -> tuple[Page, str]:
    """Draw a shape between two lines of text; return it with the text."""
    sneers = hateful or rng.random() < 0.5
    kind = HATED if hateful or not sneers else str(rng.choice([kind for kind in SHAPES if kind != HATED]))
    colour, row, column = str(rng.choice(list(COLOURS))), int(rng.integers(5, 7)), int(rng.integers(4, 8))
    page = Page(shapes=[Shape(kind, colour, row, column, rng.uniform(30, 46))])
    words = [str(rng.choice(OTHERS)), str(rng.choice(SNEERS if sneers else KIND_WORDS))]
    for line, text in zip((1, 10), words, strict=True):
        page.write(line, (COLUMNS - len(text)) // 2, text)
    return page, " ".join(words).lower()


def draw_split(out_dir: Path, name: str, count: int, first_id: int, rng: np.random.Generator) -> None:
    """Draw one split: `img/<id>.png` and `<name>.jsonl`, with balanced labels."""
    (out_dir / "img").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, label in zip(range(first_id, first_id + count), rng.permutation(np.arange(count) % 2), strict=True):
        page, text = draw_meme(rng, hateful=bool(label))
        image = f"img/{number:05d}.png"
        page.draw(rng).save(out_dir / image, compress_level=1)
        rows.append({"id": number, "img": image, "label": int(label), "text": text})
    write_json_lines(out_dir / f"{name}.jsonl", rows)
