"""A page that shows images as the model sees them: resized to whole crops, and padded."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from common.data.pictures import decode_picture
from common.phi3v.image_processing import CROP_SIZE, to_crop_grid
from common.runtime.files import write_file

from .checker import CheckedImage, CheckedRow

MAX_IMAGES = 24
TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the model sees with {{ num_crops }} crops</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 90rem; padding: 0 1rem; }
main { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; overflow-wrap: anywhere; }
div { overflow: auto; }
img { border: 1px solid #888; box-sizing: border-box; height: auto; max-width: 100%; }
img.full { max-width: none; }
pre { white-space: pre-wrap; margin: 0.3rem 0; }
</style>
<h1>What the model sees with {{ num_crops }} crop{{ "s" if num_crops > 1 }}</h1>
<p>{{ images | length }} of {{ "{:,}".format(total) }} images, resized to whole crops of {{ side }} × {{ side }} pixels. What
you cannot read here, the model cannot read either: raise --num_crops, or cut the image. Click on an image to enlarge it.</p>
<main>
{% for image in images %}
<figure>
<div><img src="{{ image.data }}" alt="" width="{{ image.width }}" onclick="this.classList.toggle('full')"></div>
<figcaption><b>{{ image.name }}</b>{{ " (" + image.why + ")" if image.why }}: {{ image.before }} pixels, {{ image.after }} for
the model, {{ image.tokens }} tokens<pre>{{ image.question }}</pre><pre>→ {{ image.answer }}</pre></figcaption>
</figure>
{% endfor %}
</main>
</html>
"""


def write_contact_sheet(path: Path, images: list[tuple[str, CheckedImage, CheckedRow]], num_crops: int) -> None:
    """Write the page, a single HTML file.

    Parameters
    ----------
    path : Path
    images : list of (str, CheckedImage, CheckedRow)
        Name and facts of each image, and the first row with it. At most 24 are shown: the smallest, the largest and the most
        elongated one, and others that are evenly spaced.
    num_crops : int
        Maximum number of crops per image.
    """
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    shown = [_figure(*images[index], why, num_crops) for index, why in choose(images).items()]
    write_file(path, page.render(images=shown, total=len(images), num_crops=num_crops, side=CROP_SIZE))


def choose(images: list[tuple[str, CheckedImage, CheckedRow]]) -> dict[int, str]:
    """Return the indices of the images to show, with the reason for the extreme ones."""
    if not images:
        return {}
    sizes = [image.size for _, image, _ in images]
    extremes = {
        "smallest": min(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1]),
        "largest": max(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1]),
        "most elongated": max(range(len(sizes)), key=lambda index: max(sizes[index]) / min(sizes[index])),
    }
    chosen: dict[int, str] = {}
    for why, index in extremes.items():
        chosen[index] = f"{chosen[index]}, {why}" if index in chosen else why
    step = max(1, len(images) // (MAX_IMAGES - len(chosen)))
    for index in range(0, len(images), step):
        if len(chosen) < MAX_IMAGES:
            chosen.setdefault(index, "")
    return chosen


def _figure(name: str, image: CheckedImage, row: CheckedRow, why: str, num_crops: int) -> dict[str, object]:
    grid = to_crop_grid(decode_picture(image.path), num_crops)
    height, width, channels = grid.shape
    jpeg = io.BytesIO()
    Image.fromarray(grid if channels == 3 else grid[:, :, 0]).save(jpeg, "JPEG", quality=90)
    return {
        "data": f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}",
        "name": name,
        "why": why,
        "width": width,
        "before": "{:,} × {:,}".format(*image.size),
        "after": f"{width:,} × {height:,}",
        "tokens": f"{image.num_tokens:,}",
        "question": row.question,
        "answer": row.answer,
    }
