"""Small AVI clips for tests, each frame of which says which one it is."""

import struct
from pathlib import Path

import av
import numpy as np
from PIL import Image

DARKEST, STEP = 16, 3


def write_clip(path: Path, num_frames: int, stated: int | None = None, codec: str = "mpeg4") -> Path:
    """Write a clip of plain grey frames, frame i of brightness DARKEST + STEP * i.

    Parameters
    ----------
    num_frames : int
        How many frames it holds, at most 75 so that brightness tells them apart.
    stated : int, optional
        The frame count to state in the container's headers instead of the true one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream(codec, rate=10, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.bit_rate = 4_000_000  # else the small steps in brightness are coded away
        for index in range(num_frames):
            picture = np.full((48, 64, 3), DARKEST + STEP * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    if stated is not None:
        content = bytearray(path.read_bytes())
        # dwTotalFrames of the main header and dwLength of the stream's, past each chunk's id and size.
        struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, stated)
        struct.pack_into("<I", content, content.index(b"strh") + 8 + 32, stated)
        path.write_bytes(content)
    return path


def truncate(path: Path, share: float) -> Path:
    """Cut a clip off after a share of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def frame_number(picture: Path) -> int:
    """Which frame of its clip a picture shows."""
    with Image.open(picture) as image:
        return round((np.asarray(image.convert("L")).mean() - DARKEST) / STEP)
