"""Opening, checking and decoding images.

An image is a path, a dict ``{"bytes": …, "path": …}`` as stored by ``datasets``, or a PIL image. A dict must contain the
bytes: the path may have come with a dataset, and could name any file of this machine.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from common.phi3v.image_processing import CROP_SIZE, convert_picture, upright_size
from common.runtime.process import InputError, excerpt

Picture = str | Path | dict[str, Any] | Image.Image

# Formats that PIL decodes itself: for EPS, for example, it would run Ghostscript on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# With a single crop, the short side of a longer image would be resized to less than a pixel.
MAX_ASPECT_RATIO = CROP_SIZE
PATCH_SIZE = 14  # pixels that the vision tower sees as one
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # found in the last bytes of a complete file


def open_picture(picture: Picture) -> Image.Image:
    """Open an image without decoding it; only its header is read.

    Raises
    ------
    InputError
        If the file is missing or not an image, or if the image is too narrow for the model; the message names it.
    """
    if isinstance(picture, Image.Image):
        image = picture
    else:
        try:
            image = Image.open(_source(picture), formats=FORMATS)
            if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or 0):
                raise Image.DecompressionBombError(f"more than {limit:,} pixels")
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(
                f"{describe_picture(picture)} is missing: put the file there, or remove its row from the data"
            ) from None
        except Exception as error:  # PIL raises anything for a damaged file
            raise _unusable(picture, "read", error) from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise InputError(
            f"{describe_picture(picture)} is {image.width:,} × {image.height:,} pixels, an aspect ratio of more than "
            f"{MAX_ASPECT_RATIO}: crop it, or remove its row"
        )
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
        raise InputError(f"image {excerpt(name)} is outside {folder}: put it there, or pass another folder (/ allows all)")
    return path


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of an image in pixels, as a viewer shows it; only its header is read. Raises as :func:`open_picture`."""
    return upright_size(open_picture(picture))


def decode_picture(picture: Picture) -> Image.Image:
    """Open and decode an image as a viewer shows it: grayscale images as mode L, all others as RGB.

    Raises
    ------
    InputError
        As :func:`open_picture`, and if the file is truncated or corrupt.
    """
    image = open_picture(picture)
    try:
        return convert_picture(image)
    except Exception as error:  # PIL raises anything for a damaged file
        raise _unusable(picture, "decoded", error) from error


def check_picture(picture: Picture, whole: bool = False) -> str | None:
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
    str or None
        What is suspicious about the image, for a warning.

    Raises
    ------
    InputError
        As :func:`decode_picture`.
    """
    image = open_picture(picture)
    try:
        doubt = picture_doubt(picture, image)
    except Exception as error:  # in the second frame
        raise _unusable(picture, "decoded", error) from error
    if not isinstance(picture, Image.Image):
        with image:
            if image.format == "PNG" and (whole or isinstance(picture, dict)):
                valid = _checksums_match(image)
            else:
                valid = not whole and _has_end_marker(image, default=isinstance(picture, dict))
        if not valid:
            decode_picture(picture)
    return doubt


def check_unchanged(picture: Picture, since: float) -> None:
    """Check that the file of an image was not written or replaced after ``since``, in seconds as of :func:`time.time`."""
    if not isinstance(picture, str | Path) or not os.path.exists(picture):
        return
    state = os.stat(picture)
    if max(state.st_mtime, state.st_ctime) > since:  # an older file that is moved here keeps its mtime
        raise InputError(
            f"{describe_picture(picture)} has changed since the run began: put the earlier file back and resume, or start a "
            "new run"
        )


def picture_doubt(picture: Picture, image: Image.Image) -> str | None:
    """Return what is suspicious about an opened image, for a warning: hardly any pixels, or further pages or frames."""
    if min(image.size) < PATCH_SIZE:
        return f"{describe_picture(picture)} is only {image.width:,} × {image.height:,} pixels"
    # A photo in MPO format is followed by previews of itself.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return f"{describe_picture(picture)} has several pages or frames, of which only the first is used"
    return None


def picture_content(picture: Picture) -> bytes:
    """Return a hash of the content of an image, the same for copies of a file."""
    if isinstance(picture, Image.Image):
        content = repr((picture.mode, picture.size)).encode() + picture.tobytes()
    elif isinstance(source := _source(picture), io.BytesIO):
        content = source.getvalue()
    else:
        content = Path(source).read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def describe_picture(picture: Picture) -> str:
    """Name of an image for messages."""
    if isinstance(picture, Image.Image):
        name = getattr(picture, "filename", "")
    else:
        name = picture.get("path") if isinstance(picture, dict) else picture
    text = str(name or "")
    return f"image {text if len(text) <= 80 else f'…{text[-79:]}'}" if text else "an image stored in the dataset"


def _source(picture: str | Path | dict[str, Any]) -> str | Path | io.BytesIO:
    if isinstance(picture, dict):
        if not isinstance(picture.get("bytes"), bytes):
            raise InputError(f"{describe_picture(picture)} is not stored in the dataset: store its bytes, or remove its row")
        return io.BytesIO(picture["bytes"])
    path = Path(picture)
    if path.exists() and not path.is_file():  # opening a FIFO would wait
        raise OSError("not a file")
    return path


def _unusable(picture: Picture, how: str, error: BaseException) -> InputError:
    # Messages of OSError and Pillow repeat the name of the file.
    reason = excerpt(getattr(error, "strerror", None) or error)
    return InputError(f"{describe_picture(picture)} cannot be {how} ({reason}): replace it, or remove its row")


def _checksums_match(image: Image.Image) -> bool:
    try:
        image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _has_end_marker(image: Image.Image, default: bool) -> bool:
    """Whether a file ends with the end marker of its format; ``default`` for formats without one."""
    if image.format not in END_MARKERS:
        return default
    file = image.fp  # type: ignore[attr-defined]  # of ImageFile
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    return END_MARKERS[image.format] in file.read()
