"""Opening, checking and decoding images.

An image is a path, a dict ``{"bytes": …, "path": …}`` as stored by ``datasets``, or a PIL image.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from common.phi3v.image_processing import convert_picture
from common.runtime import InputError

Picture = str | Path | dict[str, Any] | Image.Image


# Formats that PIL decodes itself: for EPS, for example, it would run Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # from where on Pillow warns
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # found in the last bytes of a complete file


def open_picture(picture: Picture) -> Image.Image:
    """Open an image without decoding it; only its header is read.

    Raises
    ------
    InputError
        If the file is missing or not an image; the message names it.
    """
    if isinstance(picture, Image.Image):
        return picture
    try:
        if isinstance(picture, dict) and picture.get("bytes") is not None:
            image = Image.open(io.BytesIO(picture["bytes"]), formats=FORMATS)
        else:
            path = Path(picture["path"] if isinstance(picture, dict) else picture)
            if path.exists() and not path.is_file():  # opening a FIFO would wait
                raise OSError("not a file")
            image = Image.open(path, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"more than {MAX_PIXELS:,} pixels")
    except FileNotFoundError:
        raise InputError(f"{_describe(picture)} is missing: put the file there, or remove its row from the data") from None
    except Exception as error:  # PIL raises anything for a damaged file
        raise InputError(f"{_describe(picture)} cannot be read ({error}): replace it, or remove its row") from error
    return image


def picture_path(folder: str | Path, name: str) -> str:
    """Join a folder and the name of an image in it.

    Raises
    ------
    InputError
        If the name leads out of the folder. A symbolic link in the folder may.
    """
    path, root = os.path.join(folder, name), os.path.abspath(folder)
    if os.path.commonpath([root, os.path.abspath(path)]) != root:
        raise InputError(f"image {name} is outside {folder}: put it there, or pass another folder (/ allows all)")
    return path


def decode_picture(picture: Picture) -> Image.Image:
    """Open and decode an image: grayscale images as mode L, all others as RGB.

    Raises
    ------
    InputError
        As :func:`open_picture`, and if the file is truncated or corrupt.
    """
    image = open_picture(picture)
    try:
        return convert_picture(image)
    except Exception as error:  # PIL raises anything for a damaged file
        raise InputError(f"{_describe(picture)} cannot be decoded ({error}): replace it, or remove its row") from error


def check_picture(picture: Picture, whole: bool = False) -> tuple[int, int]:
    """Check that an image exists and can be decoded, without decoding it if a cheaper check is enough.

    Verifying the checksums of a PNG file takes about 2 % of the time of decoding it. In other formats, a missing end marker
    shows that the file is truncated. If the cheap check fails, the image is decoded.

    Parameters
    ----------
    picture : Picture
    whole : bool
        Check files completely: verify the checksums of PNG files, and decode other formats. Otherwise, only the end of a file
        is checked, and damage before it is found when the image is decoded for a batch. The checksums of images stored in
        rows are always verified, since they are in memory.

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
                valid = _checksums_match(image)
            else:
                valid = not whole and _has_end_marker(image, default=isinstance(picture, dict))
        if not valid:
            decode_picture(picture)
    return size


def _checksums_match(image: Image.Image) -> bool:
    try:
        image.verify()
    except Exception:  # PIL raises anything for a damaged file
        return False
    return True


def _has_end_marker(image: Image.Image, default: bool) -> bool:
    """Whether a file ends with the end marker of its format; ``default`` for formats without one."""
    if image.format not in END_MARKERS:
        return default
    image.fp.seek(max(0, image.fp.seek(0, io.SEEK_END) - 64))
    return END_MARKERS[image.format] in image.fp.read()


def _describe(picture: Picture) -> str:
    """Name of an image for messages."""
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "")
    else:
        name = picture.get("path") if isinstance(picture, dict) else picture
    return f"image {name}" if name else "an image stored in the dataset"
