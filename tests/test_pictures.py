"""Images are read as a viewer shows them, and their sizes from headers alone."""

import io
import os
import struct
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from common.data.pictures import check_picture, check_unchanged, decode_picture, picture_content, picture_size
from common.phi3v import Phi3VImageProcessor


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": f"a.{kind.lower()}"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 6, 7])
def test_exif_orientation(kind, orientation):
    plain = Image.effect_noise((400, 90), 80)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = stored(plain, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(picture["bytes"])))
    shown = decode_picture(picture)
    assert np.array_equal(shown, expected.convert(shown.mode))
    assert picture_size(picture) == shown.size == ((90, 400) if orientation > 4 else (400, 90))
    # The processor does the same with an opened image.
    processor = Phi3VImageProcessor(num_crops=4)
    turned, upright = processor(Image.open(io.BytesIO(picture["bytes"]))), processor(shown)
    assert (turned["pixel_values"] == upright["pixel_values"]).all()


def test_damaged_exif_data_and_exif_data_at_the_end_are_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = stored(Image.new("RGB", (60, 40)), "PNG", exif=exif)["bytes"]
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    at_the_end = content[:start] + content[end:last] + content[start:end] + content[last:]
    damaged = stored(Image.new("RGB", (60, 40)), "JPEG", exif=exif)["bytes"].replace(b"MM\0*", b"MM\0?").replace(b"II*", b"II?")
    for picture in (at_the_end, damaged):
        assert picture_size({"bytes": picture}) == decode_picture({"bytes": picture}).size == (60, 40)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "LA", "P"])
def test_transparency_is_composed_on_white(kind):
    """Black on a transparent background, whose hidden color is black."""
    image = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((20, 20, 60, 40), fill=(0, 0, 0, 255))
    picture = stored(image.convert(kind), "PNG") if kind in ("LA", "P") else stored(image, kind)
    assert Image.open(io.BytesIO(picture["bytes"])).has_transparency_data
    shown = np.asarray(decode_picture(picture).convert("RGB"))
    assert (shown[0, 0] == 255).all() and (shown[30, 30] == 0).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_other_images_keep_their_pixels(mode):
    image = Image.effect_noise((90, 60), 80).convert("RGB").convert(mode)
    shown = decode_picture(stored(image, "PNG"))
    assert shown.mode == ("L" if mode in ("L", "1") else "RGB")
    assert np.array_equal(shown, image.convert(shown.mode))


RAMP = np.linspace(0, 1, 64).reshape(8, 8)
UNKNOWN = np.where(RAMP < 0.5, RAMP, np.nan)


@pytest.mark.parametrize(
    ("pixels", "kind", "expected"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG", RAMP),
        ((RAMP * 65535).astype(np.uint16), "TIFF", RAMP),
        ((RAMP * 4_000_000 - 9).astype(np.int32), "TIFF", RAMP),
        ((RAMP * 200).astype(np.int32), "TIFF", RAMP * 200 / 255),
        ((RAMP * 0.8).astype(np.float32), "TIFF", RAMP * 0.8),
        ((RAMP * 200).astype(np.float32), "TIFF", RAMP * 200 / 255),
        ((RAMP * 3e5 - 1e5).astype(np.float32), "TIFF", RAMP),
        (UNKNOWN.astype(np.float32), "TIFF", np.nan_to_num(UNKNOWN)),
        (np.full((8, 8), 70_000, np.int32), "TIFF", np.ones((8, 8))),
    ],
)  # fmt: skip
def test_deep_pixels_are_scaled_to_eight_bits(pixels, kind, expected):
    shown = decode_picture(stored(Image.fromarray(pixels), kind))
    assert shown.mode == "L"
    assert np.abs(np.asarray(shown) - 255 * expected).max() <= 1


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP"])
def test_the_first_of_several_pages_is_used_with_a_warning(kind, tmp_path):
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    path = tmp_path / f"pages.{kind.lower()}"
    pages[0].save(path, kind, save_all=True, append_images=pages[1:])
    assert check_picture(str(path)).endswith(f"{path.name} has several pages or frames, of which only the first is used")
    red, _, blue = np.asarray(decode_picture(path).convert("RGB"))[5, 5]
    assert red > 250 and blue < 5


def test_narrow_images_are_refused_and_tiny_ones_reported():
    for read in (check_picture, picture_size, decode_picture):
        with pytest.raises(ValueError, match=r"image a\.png is 5,000 × 3 pixels, an aspect ratio of more than 336: crop it"):
            read(stored(Image.new("RGB", (5000, 3)), "PNG"))
    assert check_picture(stored(Image.new("RGB", (1, 1)), "PNG")) == "image a.png is only 1 × 1 pixels"
    assert check_picture(stored(Image.new("RGB", (336 * 14, 14)), "PNG")) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damage_is_found_as_far_as_a_picture_is_checked(kind, tmp_path):
    path = tmp_path / f"page.{kind.lower()}"
    noise = Image.effect_noise((300, 200), 50)
    noise.save(path, kind)
    whole = path.read_bytes()
    half = len(whole) // 2
    assert check_picture({"bytes": whole + bytes(1000)}) is None  # bytes after the end are ignored
    cut = {"bytes": whole[:half], "path": "a.png"}
    with pytest.raises(ValueError, match="image a.png cannot be decoded"):
        check_picture(cut)
    check_picture(path, whole=True)
    path.write_bytes(whole[:half] + b"\xff\xc0" + bytes(100) + whole[half + 102 :])
    check_picture(path)
    with pytest.raises(ValueError, match=f"{path.name} cannot be decoded"):
        check_picture(path, whole=True)


def test_a_picture_in_an_unsupported_format_is_named():
    """Pillow raises NotImplementedError for some DDS files."""
    fields = [124, 0x1007, 8, 8, 0, 0, 0, *[0] * 11, 32, 0x4, int.from_bytes(b"none", "little"), *[0] * 5, 0x1000, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="image none.dds cannot be (read|decoded)"):
        check_picture({"bytes": b"DDS " + struct.pack("<31I", *fields) + bytes(64), "path": "none.dds"})


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = stored(Image.new("1", (20_000, 5_000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
        check_picture(bomb, whole=True)


def test_no_program_is_run_for_a_picture(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.eps cannot be read"):
        check_picture(tmp_path / "a.eps")


def test_long_names_are_shortened_in_messages():
    for name in ("A" * 26_733, f"data:image/png;base64,{'A' * 26_733}"):
        with pytest.raises(ValueError, match="image .*cannot be read") as raised:
            check_picture(name)
        assert len(str(raised.value)) < 300


def test_an_older_file_in_the_place_of_another_is_noticed(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (50, 50)).save(tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9))
    time.sleep(0.05)  # file systems know the time less exactly
    begin = time.time()
    time.sleep(0.05)
    check_unchanged(tmp_path / "a.png", begin)
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has changed since the run began"):
        check_unchanged(tmp_path / "a.png", begin)


def test_copies_are_recognized(tmp_path):
    picture = stored(Image.new("RGB", (50, 50)), "PNG")
    (tmp_path / "a.png").write_bytes(picture["bytes"])
    assert picture_content(picture) == picture_content(str(tmp_path / "a.png"))
    assert picture_content(picture) != picture_content(stored(Image.new("RGB", (50, 51)), "PNG"))
