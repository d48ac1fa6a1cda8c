"""The samples in a report: how their answers changed, and thumbnails of their images."""

import hashlib
import re
import zlib
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from common.runtime.files import replacing

from .run import RIGHT, Run

Predictions = dict[str, dict[str, Any]]  # by id
THUMBNAIL_SIDE = 640
PER_GROUP = 12  # samples with thumbnails


def by_id(predictions: Sequence[dict[str, Any]]) -> Predictions:
    """Return predictions by id. If an id occurs several times, its first prediction is used."""
    return {str(row["id"]): row for row in reversed(predictions)}


def group_samples(evaluations: Sequence[Predictions], preferred: Collection[str] = ()) -> dict[str, list[str]]:
    """Group the samples that evaluations have in common by how their scores differ from those of the first evaluation.

    Parameters
    ----------
    evaluations : sequence of dict
        Predictions by id, see :func:`by_id`.
    preferred : collection of str
        Ids that come first among those with the same change.

    Returns
    -------
    dict of str to list of str
        Ids by group: `better`, `worse`, and with equal scores `wrong` and `right`. The largest change comes first. Samples with
        equal change are in an arbitrary but deterministic order.
    """
    groups: dict[str, list[str]] = {"better": [], "worse": [], "wrong": [], "right": []}
    ids = set(evaluations[0]).intersection(*evaluations) if evaluations else ()
    scores = {key: [rows[key]["score"] for rows in evaluations] for key in ids}
    gains = {key: max((score - of_key[0] for score in of_key), key=abs) for key, of_key in scores.items()}
    for key in sorted(ids, key=lambda key: (-abs(gains[key]), key not in preferred, zlib.crc32(key.encode()), key)):
        same = "right" if scores[key][0] >= RIGHT else "wrong"
        groups["better" if gains[key] > 0 else "worse" if gains[key] < 0 else same].append(key)
    return groups


def in_gallery(run: Run) -> list[str]:
    """Return the ids of the samples in the gallery of a run, whose images are saved."""
    groups = group_samples([by_id(rows) for rows in run.predictions.values()])
    return [key for ids in groups.values() for key in ids[:PER_GROUP]]


def save_thumbnails(output_dir: Path, pictures: Callable[[str], Iterable[Image.Image]], ids: Iterable[str]) -> None:
    """Save the images of samples as `gallery/<id>_<k>.jpg`, at most 640 pixels on the longer side.

    Parameters
    ----------
    output_dir : Path
        The run directory.
    pictures : callable
        Returns the images of a sample, in mode RGB or L, for its id.
    ids : iterable of str
        Ids of the samples. An id that is not a valid file name is replaced by its hash.
    """
    for key in ids:
        for k, image in enumerate(pictures(key)):
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            with replacing(_path(output_dir, key, k)) as temporary:
                image.save(temporary, format="JPEG", quality=85)


def thumbnails(directories: Sequence[Path], key: str) -> list[str]:
    """Return the thumbnails of a sample as `data:` addresses, from the first run directory that has some."""
    for directory in directories:
        paths = takewhile(Path.is_file, (_path(directory, key, k) for k in count()))
        if found := ["data:image/jpeg;base64," + b64encode(path.read_bytes()).decode() for path in paths]:
            return found
    return []


def _path(directory: Path, key: str, k: int) -> Path:
    valid = re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,79}", key)
    return directory / "gallery" / f"{key if valid else hashlib.sha1(key.encode()).hexdigest()}_{k}.jpg"
