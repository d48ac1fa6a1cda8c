"""Image processing with PIL and PyTorch, bit-identical to the published processor for upright, opaque images of 8 bits.

Other images are converted to what an image viewer shows, see :func:`convert_picture`; the published processor ignores EXIF
orientation, composes transparency on black and clips deeper pixels.

An image is resized and padded to a grid of 336 px crops (:func:`to_crop_grid`), normalized, and preceded by a global view
(:func:`normalize_with_global_view`). The second step runs on any device, so that training only transfers uint8 crops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

CROP_SIZE = 336
TOKENS_PER_SIDE = 12
MAX_CROPS = 16
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def crop_grid_size(width: int, height: int, num_crops: int) -> tuple[int, int]:
    """Compute the size of an image after resizing and padding to whole crops.

    Parameters
    ----------
    width, height : int
        Size of the image in pixels.
    num_crops : int
        Maximum number of crops per image.

    Returns
    -------
    tuple of int
        Height and width in pixels, both multiples of 336, as in ``image_sizes``.
    """
    resized_width, resized_height = _resized(max(width, height), min(width, height), num_crops)
    long_side, short_side = resized_width, math.ceil(resized_height / CROP_SIZE) * CROP_SIZE
    return (long_side, short_side) if width < height else (short_side, long_side)


def num_image_tokens(height: int, width: int, side: int = TOKENS_PER_SIDE) -> int:
    """Number of tokens of an image with ``image_sizes`` (height, width): ``(h*w + 1)*side² + 1 + (h + 1)*side``, h×w crops."""
    rows, columns = height // CROP_SIZE, width // CROP_SIZE
    return (rows * columns + 1) * side**2 + 1 + (rows + 1) * side


def num_views(height: int, width: int) -> int:
    """Number of views (crops and global view) that the vision tower processes for ``image_sizes`` (height, width).

    The only crop of a single-crop image is bit-identical to its global view, so it is processed once.
    """
    crops = (height // CROP_SIZE) * (width // CROP_SIZE)
    return crops + (crops > 1)


def convert_picture(image: Image.Image) -> Image.Image:
    """Decode an image as a viewer shows it: grayscale images as mode L, all others as RGB.

    The first page or frame is used and turned by its EXIF orientation. Transparency is composed on white. 16-bit pixels are
    scaled to 8 bits; 32-bit integers from 0 to 255 and floats from 0 to 1 or 255 likewise, others from their own range.
    """
    turn = _turn(image)
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    mode = "L" if image.mode in ("1", "L") else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # contains the orientation
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image after :func:`convert_picture`, without decoding it."""
    swapped = _turn(image) in [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
    return (image.height, image.width) if swapped else image.size


def _turn(image: Image.Image) -> Image.Transpose | None:
    # Pillow turns TIFF images itself. If a PNG image has no EXIF data in its header, getexif would decode the image.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Damaged EXIF data raises errors of many types. Viewers ignore it.
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        finite = pixels[np.isfinite(pixels)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        usual = [depth for depth in ((1.0, 255.0) if image.mode == "F" else (255.0,)) if low >= 0 and high <= depth]
        if usual:
            low, high = 0.0, usual[0]
        elif low == high:
            low, high = min(low, 0.0), max(high, 0.0)
    return Image.fromarray((np.nan_to_num((pixels - low) / (high - low)).clip(0, 1) * 255).round().astype(np.uint8))


def to_crop_grid(image: Image.Image, num_crops: int) -> np.ndarray:
    """Resize an image and pad it with white to whole crops.

    Parameters
    ----------
    image : PIL.Image.Image
        As returned by :func:`convert_picture`.
    num_crops : int
        Maximum number of crops per image.

    Returns
    -------
    numpy.ndarray
        uint8, (height, width, 3), or (height, width, 1) for a grayscale image, whose channels are equal; both sides are
        multiples of 336.
    """
    if image.width < image.height:
        height, width = _resized(image.height, image.width, num_crops)
        # The published code transposes portrait images, so that the long side is resized and rounded first.
        image = image.resize((image.width, height), Image.Resampling.BILINEAR)
    else:
        width, height = _resized(image.width, image.height, num_crops)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    missing_width, missing_height = -width % CROP_SIZE, -height % CROP_SIZE
    if missing_width or missing_height:
        padded = Image.new(image.mode, (width + missing_width, height + missing_height), "white")
        padded.paste(image, (missing_width // 2, missing_height // 2))
        image = padded
    return np.array(image).reshape(image.height, image.width, -1)


def grid_to_crops(grid: np.ndarray) -> torch.Tensor:
    """Split the grid of an image into crops, in row-major order.

    Parameters
    ----------
    grid : numpy.ndarray
        (height, width, 3 or 1), as returned by :func:`to_crop_grid`.

    Returns
    -------
    torch.Tensor
        (rows * columns, 3, 336, 336).
    """
    height, width, _ = grid.shape
    pixels = torch.from_numpy(grid).permute(2, 0, 1).expand(3, -1, -1)
    crops = pixels.reshape(3, height // CROP_SIZE, CROP_SIZE, width // CROP_SIZE, CROP_SIZE)
    return crops.permute(1, 3, 0, 2, 4).reshape(-1, 3, CROP_SIZE, CROP_SIZE)


def join_crops(crops: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo :func:`grid_to_crops`: (rows * columns, 3, 336, 336) to (3, height, width)."""
    rows, columns = height // CROP_SIZE, width // CROP_SIZE
    grid = crops.reshape(rows, columns, *crops.shape[1:])
    return grid.permute(2, 0, 3, 1, 4).reshape(crops.shape[1], height, width)


def normalize_with_global_view(crops: torch.Tensor, image_sizes: list[tuple[int, int]]) -> torch.Tensor:
    """Normalize uint8 crops and insert the global view of each image before its crops, on the device of the crops.

    Parameters
    ----------
    crops : torch.Tensor
        uint8, (all crops of all images, 3, 336, 336).
    image_sizes : list of (int, int)
        Height and width of each image in pixels, after resizing and padding.

    Returns
    -------
    torch.Tensor
        float32, (views, 3, 336, 336): for each image its global view, then its crops in row-major order; a single view for
        a single-crop image, see :func:`num_views`.
    """
    mean = torch.tensor(IMAGE_MEAN, device=crops.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=crops.device).view(3, 1, 1)
    normalized = crops.float().div_(255).sub_(mean).div_(std)
    views, start = [], 0
    for height, width in image_sizes:
        count = (height // CROP_SIZE) * (width // CROP_SIZE)
        image_crops = normalized[start : start + count]
        if count > 1:
            whole = join_crops(image_crops, height, width)[None]
            views.append(torch.nn.functional.interpolate(whole, size=(CROP_SIZE, CROP_SIZE), mode="bicubic"))
        views.append(image_crops)
        start += count
    return torch.cat(views)


def _resized(width: int, height: int, num_crops: int) -> tuple[int, int]:
    # Requires width >= height.
    ratio = width / height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    return scale * CROP_SIZE, max(1, int(scale * CROP_SIZE / ratio))


class Phi3VImagesKwargs(ImagesKwargs, total=False):
    """Arguments of ``from_pretrained`` in addition to those of transformers."""

    num_crops: int
    num_img_tokens: int


class Phi3VImageProcessor(BaseImageProcessor):
    """The published image processor, which converts images to normalized crops with a global view.

    Parameters
    ----------
    num_crops : int
        Maximum number of crops per image, 1 to 16. Published recommendation: 16 for one image, 4 for several images or
        video frames.
    image_mean, image_std : sequence of float
        Mean and standard deviation of CLIP, as in all published checkpoints. Other values are not supported.
    num_img_tokens : int
        Number of tokens per crop, 144.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Phi3VImagesKwargs

    def __init__(
        self,
        num_crops: int = 1,
        image_mean: tuple[float, ...] = IMAGE_MEAN,
        image_std: tuple[float, ...] = IMAGE_STD,
        do_convert_rgb: bool = True,
        num_img_tokens: int = TOKENS_PER_SIDE**2,
        **kwargs: Any,
    ) -> None:
        if tuple(image_mean) != IMAGE_MEAN or tuple(image_std) != IMAGE_STD:
            raise ValueError(
                f"preprocessor_config.json has image_mean {image_mean} and image_std {image_std}, "
                f"but only the values of CLIP are supported: {IMAGE_MEAN} and {IMAGE_STD}"
            )
        if not isinstance(num_crops, int) or not 1 <= num_crops <= MAX_CROPS:
            raise ValueError(f"num_crops must be an integer from 1 to {MAX_CROPS}, got {num_crops!r}")
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.num_crops = num_crops
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.num_img_tokens = num_img_tokens

    def num_tokens(self, width: int, height: int) -> int:
        """Number of tokens of an image of ``width`` × ``height`` pixels."""
        return num_image_tokens(*crop_grid_size(width, height, self.num_crops))

    def preprocess(self, images: Image.Image | list[Image.Image], return_tensors: str | None = "pt") -> BatchFeature:
        """Convert images to model inputs.

        Parameters
        ----------
        images : PIL.Image.Image or list of PIL.Image.Image
            One or several images.
        return_tensors : str, optional
            Type of the returned tensors, ``"pt"`` by default.

        Returns
        -------
        BatchFeature
            ``pixel_values``, float32 (images, num_crops + 1, 3, 336, 336): global view, crops in row-major order, zeros;
            and ``image_sizes``, int64 (images, 2): height and width after resizing and padding.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("expected at least one image, got none: omit images for text-only input")
        pixel_values = torch.zeros(len(images), self.num_crops + 1, 3, CROP_SIZE, CROP_SIZE)
        image_sizes = []
        for output, image in zip(pixel_values, images, strict=True):
            grid = to_crop_grid(convert_picture(image), self.num_crops)
            size = grid.shape[:2]
            crops = grid_to_crops(grid)
            output[: 1 + len(crops)] = normalize_with_global_view(crops, [size])
            image_sizes.append(size)
        data = {"pixel_values": pixel_values, "image_sizes": torch.tensor(image_sizes)}
        return BatchFeature(data=data, tensor_type=return_tensors)
