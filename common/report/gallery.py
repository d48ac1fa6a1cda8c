"""The samples in a report, with thumbnails of their images."""

import hashlib
import os
import re
import zlib
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.runtime.files import replacing

from .run import RIGHT

THUMBNAIL_SIDE = 640
PER_GROUP = 12


def by_id(predictions: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return predictions by id. If an id occurs several times, its first prediction is used."""
    return {str(row["id"]): row for row in reversed(predictions)}


def group_samples(evaluations: Sequence[Sequence[dict[str, Any]]], preferred: Collection[str] = ()) -> dict[str, list[str]]:
    """Group the samples that evaluations have in common by how their scores differ from those of the first evaluation.

    Parameters
    ----------
    evaluations : sequence of list of dict
        Predictions, with ``id`` and ``score``.
    preferred : collection of str
        Ids that come first among those with the same change.

    Returns
    -------
    dict of str to list of str
        Ids by group: `better`, `worse`, and with equal scores `wrong` and `right`. The largest change comes first. Samples with
        equal change are in an arbitrary but deterministic order.
    """
    scores = [{key: row["score"] for key, row in by_id(predictions).items()} for predictions in evaluations]
    ids = set(scores[0]).intersection(*scores) if scores else set()
    gains = {key: max((of_id[key] - scores[0][key] for of_id in scores), key=abs) for key in ids}
    groups: dict[str, list[str]] = {"better": [], "right": [], "wrong": [], "worse": []}
    for key in sorted(ids, key=lambda key: (-abs(gains[key]), key not in preferred, zlib.crc32(key.encode()), key)):
        same = "right" if scores[0][key] >= RIGHT else "wrong"
        groups["better" if gains[key] > 0 else "worse" if gains[key] < 0 else same].append(key)
    return groups


def select_gallery(evaluations: Sequence[Sequence[dict[str, Any]]], preferred: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the first ids of each group of :func:`group_samples`; those that are always right only for a single evaluation."""
    groups = group_samples(evaluations, preferred)
    shown = ("wrong", "right") if len(evaluations) == 1 else ("better", "worse", "wrong")
    return {group: groups[group][:PER_GROUP] for group in shown}


def save_gallery_images(
    output_dir: str | os.PathLike[str], pictures: Callable[[str], Sequence[Image.Image]], ids: Iterable[str]
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


def samples(
    groups: dict[str, list[str]], answers: dict[str, list[dict[str, Any]]], directories: Sequence[Path]
) -> list[dict[str, Any]]:
    """Return the samples to show.

    Parameters
    ----------
    groups : dict of str to list of str
        Ids by group.
    answers : dict of str to list of dict
        Predictions, by the name under which they are shown.
    directories : sequence of Path
        Run directories in which to look for images.
    """
    rows = {name: by_id(predictions) for name, predictions in answers.items()}
    first = next(iter(rows.values()), {})
    return [
        {
            "group": group,
            "few": place < 3,  # shown initially
            "id": key,
            "question": first[key]["question"],
            "answers": first[key]["answers"],
            "predictions": {name: of_id[key] for name, of_id in rows.items()},
            "images": next(filter(None, (_thumbnails(directory, key) for directory in directories)), []),
        }
        for group, ids in groups.items()
        for place, key in enumerate(ids)
    ]


def _thumbnails(directory: Path, key: str) -> list[str]:
    found: list[str] = []
    while (path := _thumbnail_path(directory, key, len(found))).is_file():
        found.append("data:image/jpeg;base64," + b64encode(path.read_bytes()).decode())
    return found


def _thumbnail_path(directory: Path, key: str, k: int) -> Path:
    valid = re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,79}", key)
    stem = key if valid else re.sub(r"[^A-Za-z0-9-]+", "-", key)[:40] + "-" + hashlib.sha1(key.encode()).hexdigest()[:12]
    return directory / "gallery" / f"{stem}_{k}.jpg"
