"""Pictures: found, checked and decoded.

A picture is a path, a dict ``{"bytes": …, "path": …}`` as ``datasets`` stores it, or a PIL image.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from common.phi3v.image_processing import convert_picture
from common.runtime import InputError

Picture = str | Path | dict[str, Any] | Image.Image


ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # what stands in the last bytes of a file that is whole


def open_picture(picture: Picture) -> Image.Image:
    """Open a picture without decoding it: its size is known, its pixels are read on use.

    Raises
    ------
    InputError
        If there is no such file, or it is no picture; names it.
    """
    if isinstance(picture, Image.Image):
        return picture
    source = picture
    if isinstance(picture, dict):
        source = io.BytesIO(picture["bytes"]) if picture.get("bytes") is not None else picture["path"]
    try:
        return Image.open(source)
    except FileNotFoundError:
        raise InputError(f"{_describe(picture)} is missing: put the file there, or take its row out of the data") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, NotImplementedError, OSError, ValueError) as error:
        raise InputError(f"{_describe(picture)} can't be read ({error}): replace it, or take its row out") from None


def decode_picture(picture: Picture) -> Image.Image:
    """Open a picture and decode its pixels: grey ones as mode L, all others as RGB.

    Raises
    ------
    InputError
        As :func:`open_picture`, and if the file is cut short.
    """
    image = open_picture(picture)
    try:
        return convert_picture(image)
    except (Image.DecompressionBombError, NotImplementedError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{_describe(picture)} can't be decoded ({error}): replace it, or take its row out") from None


def check_picture(picture: Picture, whole: bool = False) -> tuple[int, int]:
    """Check that a picture is there and can be decoded, by what takes little time; where that shows a fault, by decoding it.

    PNG files hold checksums, which are read in about a fiftieth of the time that decoding takes; others have an end that is
    missing from a file cut short.

    Parameters
    ----------
    picture : Picture
    whole : bool
        Read files to their end: checksums of PNG files, and other formats are decoded. Otherwise only the last bytes of a file
        are looked at, and damage before them is found once it is decoded for a batch. Of pictures stored in rows, which are
        in memory, checksums are always looked at.

    Returns
    -------
    tuple of int
        Width and height in pixels.

    Raises
    ------
    InputError
        As :func:`decode_picture`.
    """
    image = open_picture(picture)
    size = image.size
    if not isinstance(picture, Image.Image):
        with image:
            if image.format == "PNG" and (whole or isinstance(picture, dict)):
                sound = _checksums_hold(image)
            else:
                sound = not whole and _ends_well(image, unknown=isinstance(picture, dict))
        if not sound:
            decode_picture(picture)
    return size


def _checksums_hold(image: Image.Image) -> bool:
    try:
        image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _ends_well(image: Image.Image, unknown: bool) -> bool:
    """Whether a file's last bytes are its format's; `unknown` of a format that has none."""
    if image.format not in ENDS:
        return unknown
    image.fp.seek(max(0, image.fp.seek(0, io.SEEK_END) - 64))
    return ENDS[image.format] in image.fp.read()


def _describe(picture: Picture) -> str:
    """What messages call a picture."""
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "")
    else:
        name = picture.get("path") if isinstance(picture, dict) else picture
    return f"picture {name}" if name else "a picture stored in the data set"
