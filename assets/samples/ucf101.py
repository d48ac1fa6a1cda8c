"""Short clips of moving shapes in ten classes, in the layout of the UCF-101 subset."""

import os
from pathlib import Path

import av
import numpy as np

from .page import COLOURS, SIDE, TOKEN, Page, Shape

FRAMES, FRAMES_PER_SECOND = 16, 8
# As in UCF-101 itself, most classes can be recognized from a single frame, here by shape and, where necessary, color. Each
# class has its own motion.
CLASSES = {
    "CircleRising": ("circle", ("orange",), "up"),
    "CircleRolling": ("circle", ("black",), "right"),
    "CrossDropping": ("cross", tuple(COLOURS), "down"),
    "DiamondGrowing": ("diamond", tuple(COLOURS), "grow"),
    "HeartBeating": ("heart", tuple(COLOURS), "beat"),
    "RingShrinking": ("ring", tuple(COLOURS), "shrink"),
    "SquareSliding": ("square", tuple(COLOURS), "left"),
    "StarFalling": ("star", ("blue",), "down"),
    "StarShooting": ("star", ("yellow",), "right"),
    "TriangleBouncing": ("triangle", tuple(COLOURS), "bounce"),
}


def draw_frames(kind: str, colour: str, motion: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the frames of a clip, uint8 (336, 336, 3) each, with one shape that moves or changes its size."""
    size = rng.uniform(22, 40)
    across, along = rng.uniform(-0.25, 0.25), rng.uniform(0.28, 0.38)
    paper, frames = rng.integers(2**32), []
    for moment in np.linspace(-1, 1, FRAMES):
        x = y = 0.0
        radius = size
        if motion in ("left", "right"):
            x, y = moment * along * (1 if motion == "right" else -1), across
        elif motion in ("up", "down"):
            x, y = across, moment * along * (1 if motion == "down" else -1)
        elif motion == "bounce":
            x, y = across, along - 2 * along * abs(np.cos(1.5 * np.pi * moment))
        else:
            x, y = across, across / 2
            swing = {"grow": moment, "shrink": -moment, "beat": np.sin(3 * np.pi * moment)}[motion]
            radius = 33 * (1 + 0.4 * swing)
        column, row = (round((place + 0.5) * SIDE / TOKEN - 0.5) for place in (x, y))
        # The same seed for all frames keeps paper and color constant.
        frames.append(np.asarray(Page(shapes=[Shape(kind, colour, row, column, radius)]).draw(np.random.default_rng(paper))))
    return frames


def write_clip(path: Path, frames: list[np.ndarray]) -> None:
    """Encode frames as a Motion JPEG AVI file, atomically."""
    unfinished = path.with_name(path.name + ".unfinished")
    with av.open(str(unfinished), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuvj420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(unfinished, path)


def draw_split(out_dir: Path, split: str, clips_a_class: int, rng: np.random.Generator) -> None:
    """Draw one split: `UCF101_subset/<split>/<class>/v_<class>_g<group>_c01.avi`."""
    # Group numbers continue across the splits, because a group of UCF-101 must not be in two splits.
    first_group = {"train": 1, "val": 401, "test": 701}[split]
    for name, (kind, colours, motion) in CLASSES.items():
        folder = out_dir / "UCF101_subset" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for group in range(first_group, first_group + clips_a_class):
            write_clip(folder / f"v_{name}_g{group:02d}_c01.avi", draw_frames(kind, str(rng.choice(colours)), motion, rng))
