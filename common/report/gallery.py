"""The samples in a report, with thumbnails of their images."""

import base64
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from common.runtime import replacing

from .run import RIGHT, Run, predictions_by_id

GROUPS = {
    "better": "Got better",
    "worse": "Got worse",
    "stayed_wrong": "Stayed wrong",
    "wrong": "Wrong",
    "right": "Right",
}
THUMBNAIL_SIDE = 640
FOREMOST = 3  # samples of each group that are shown initially


def select_gallery(before: dict | None, after: dict | None, limit_per_group: int = 12) -> dict[str, list[str]]:
    """Select samples for the report: those that changed most in training, and those that are still wrong.

    Parameters
    ----------
    before, after : dict or None
        Evaluations as in `eval_before.json` and `eval_after.json`; either may be missing.
    limit_per_group : int
        Maximum number of samples per group.

    Returns
    -------
    dict of str to list of str
        Ids by group: `better`, `worse` and `stayed_wrong`; with only one evaluation `wrong` and `right`. The largest change
        comes first. Samples with equal change are in an arbitrary but deterministic order.
    """
    first, last = predictions_by_id(before), predictions_by_id(after)
    arbitrary = sorted(first.keys() & last.keys() if first and last else first or last, key=_arbitrary_order)
    if not (first and last):
        only = {key: (last or first)[key]["score"] for key in arbitrary}
        groups = {
            "wrong": [key for key in arbitrary if only[key] < RIGHT],
            "right": [key for key in arbitrary if only[key] >= RIGHT],
        }
    else:
        gain = {key: last[key]["score"] - first[key]["score"] for key in arbitrary}
        groups = {
            "better": sorted((key for key in arbitrary if gain[key] > 0), key=lambda key: -gain[key]),
            "worse": sorted((key for key in arbitrary if gain[key] < 0), key=lambda key: gain[key]),
            "stayed_wrong": [key for key in arbitrary if gain[key] == 0 and last[key]["score"] < RIGHT],
        }
    return {group: ids[:limit_per_group] for group, ids in groups.items()}


def save_gallery_images(
    output_dir: str | os.PathLike, pictures: Callable[[str], Sequence[Image.Image]], ids: Iterable[str]
) -> None:
    """Save thumbnails of the images of samples as `gallery/<id>_<k>.jpg`, at most 640 pixels on the longer side.

    Parameters
    ----------
    output_dir : path
        The run directory.
    pictures : callable
        Returns the images of a sample, in any mode, for its id.
    ids : iterable of str
        Ids of the samples. Ids that are not valid file names are replaced in the file name.
    """
    for key in ids:
        for k, image in enumerate(pictures(key)):
            thumbnail = image.convert("RGB")
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            with replacing(_thumbnail_path(Path(output_dir), key, k)) as temporary:
                thumbnail.save(temporary, format="JPEG", quality=85)


def gallery(run: Run, groups: dict[str, list[str]]) -> dict:
    """Return the samples of the gallery, and their question if all of them have the same one."""
    first, last = predictions_by_id(run.before), predictions_by_id(run.after)
    samples = []
    for group, ids in groups.items():
        for number, key in enumerate(ids):
            row = last.get(key) or first[key]
            samples.append(
                {
                    "group": group,
                    "foremost": number < FOREMOST,
                    "id": key,
                    "question": row["question"],
                    "answers": list(dict.fromkeys(row["answers"])),
                    "predictions": {"before": first.get(key), "after": last.get(key)},
                    "pictures": list(_thumbnails(run.directory, key)),
                }
            )
    questions = {sample["question"] for sample in samples}
    return {"samples": samples, "question": questions.pop() if len(questions) == 1 and len(samples) > 1 else None}


def _arbitrary_order(key: str) -> tuple[int, str]:
    return zlib.crc32(key.encode()), key


def _thumbnail_path(directory: Path, key: str, k: int) -> Path:
    valid = re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,79}", key)
    stem = key if valid else re.sub(r"[^A-Za-z0-9-]+", "-", key)[:40] + "-" + hashlib.sha1(key.encode()).hexdigest()[:12]
    return directory / "gallery" / f"{stem}_{k}.jpg"


def _thumbnails(directory: Path, key: str) -> Iterator[str]:
    k = 0
    while (path := _thumbnail_path(directory, key, k)).is_file():
        yield "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
        k += 1
