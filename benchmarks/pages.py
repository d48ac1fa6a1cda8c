"""Generate pages with the dimensions of scanned documents, for benchmarks without a folder of real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from assets.samples.docvqa import draw_form

# Width and height in pixels. With --num_crops 16 they give 4 × 4 crops (2,509 tokens) and 4 × 3 crops (1,933 tokens). This
# mix averages about 2,413 tokens per page, or 2,443 with a question and answer of about 30 tokens, the published mean.
SHAPES = ((1700, 2200),) * 5 + ((1500, 2250),)


def find_pages(directory: Path) -> list[Path]:
    """Return the paths of the images in a folder; exit with an error if there are none."""
    paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"error: --image_dir {directory} contains no .jpg or .png files")
    return paths


def draw_pages(directory: Path, count: int, seed: int = 0) -> list[Path]:
    """Draw pages with many small forms as grayscale JPEG files, and return their paths."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        page = Image.new("L", SHAPES[number % len(SHAPES)], 250)
        for top in range(40, page.height - 336, 350):
            for left in range(40, page.width - 336, 350):
                form, _ = draw_form(rng, held_out=False)
                page.paste(form.draw(rng).convert("L"), (left, top))
        paths.append(directory / f"page_{number:04d}.jpg")
        page.save(paths[-1], quality=85)
    return paths
