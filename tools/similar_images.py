"""Finding images that look alike: resized or recompressed copies, neighbouring frames, pages with hardly a difference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 16  # a signature has SIDE² bits, one for each cell of a grid
LEAST_DIFFERENCE = 3  # gray levels between neighbouring cells; smaller differences are noise
MAX_BITS, MAX_LEVELS = 6, 8  # by which the signatures and the mean colors of similar images differ at most
IMAGES_AT_ONCE = 512


def signature(image: Image.Image) -> bytes:
    """Describe the look of an image, independently of its size and compression, in 35 bytes.

    A difference hash, 256 bits: whether each cell of a 16 × 16 grid is darker than the next one to its right. And the mean
    color, which tells plain images apart.
    """
    cells = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    darker = np.diff(cells, axis=1) > LEAST_DIFFERENCE
    color = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).tobytes()
    return np.packbits(darker).tobytes() + color


def similar_pairs(signatures: list[bytes]) -> Iterator[np.ndarray]:
    """Yield the indices of images that look alike, the smaller one first, as arrays of int64 (pairs, 2)."""
    if not signatures:
        return
    table = np.frombuffer(b"".join(signatures), dtype=np.uint8).reshape(len(signatures), -1)
    bits = 2 * np.unpackbits(table[:, :-3], axis=1).astype(np.float32) - 1
    colors = table[:, -3:].astype(np.int16)
    for start in range(0, len(bits), IMAGES_AT_ONCE):
        block = slice(start, start + IMAGES_AT_ONCE)
        # The product of two vectors of ±1 is their length minus twice the number of bits that differ.
        alike = bits[block] @ bits.T >= bits.shape[1] - 2 * MAX_BITS
        for channel in range(3):
            alike &= np.abs(colors[block, None, channel] - colors[None, :, channel]) <= MAX_LEVELS
        yield np.argwhere(np.triu(alike, start + 1)) + [start, 0]
