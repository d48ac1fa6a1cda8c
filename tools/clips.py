"""Frames of video clips as JPEG files: decoding, sampling and writing, in parallel worker processes.

The JPEG comment of each image identifies its clip, its frame and the settings, so that an interrupted conversion continues
where it ended, and images from other settings or another clip are replaced.
"""

import argparse
import hashlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from pathlib import Path, PurePosixPath

import av
from PIL import Image
from tqdm import tqdm

from common.runtime.process import InputError

LARGEST_CLIP = 2**30  # bytes; a clip is read into memory
JPEG_QUALITY = 95
JPEG_END = b"\xff\xd9"  # missing from a truncated file
COMMENT_START = "convert_ucf101:"


class BrokenClip(ValueError):
    """No frame of a clip can be decoded."""


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def decode_frames(video: bytes) -> Iterator[av.VideoFrame]:
    """Decode all frames of a clip, skipping damaged packets; the frame count in the header is ignored."""
    with av.open(io.BytesIO(video), "r", metadata_errors="ignore") as container:
        if not container.streams.video:
            raise BrokenClip("no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise BrokenClip("unknown video codec")
        # The clips already keep all CPUs busy; more threads per clip would only compete for them.
        stream.codec_context.thread_count = 1
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:  # truncated file: keep the frames so far
                packet = None
            with suppress(av.FFmpegError):
                yield from stream.codec_context.decode(packet)
            if packet is None:
                return


def sample_frames(video: bytes, num_frames: int) -> list[Image.Image]:
    """Sample `num_frames` evenly spaced frames: of n decoded frames, frame floor(i * n / num_frames) for each i.

    A first pass counts the frames, because keeping all frames of a long clip would take gigabytes of memory.
    """
    try:
        total = sum(1 for _ in decode_frames(video))
        if not total:
            raise BrokenClip("no frame can be decoded")
        wanted = [i * total // num_frames for i in range(num_frames)]
        # Phones record upright videos lying, with a rotation.
        frames = {i: frame for i, frame in enumerate(decode_frames(video)) if i in wanted}
        pictures = {i: frame.to_image().rotate(frame.rotation, expand=True) for i, frame in frames.items()}
    except av.FFmpegError as error:
        raise BrokenClip(error.strerror) from error
    return [pictures[i] for i in wanted]


def read_comment(path: Path) -> str:
    """Return the JPEG comment of a file; empty if it has none or is not a JPEG image."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            return image.info.get("comment", b"").decode("utf-8", "replace")
    except (OSError, Image.DecompressionBombError):
        return ""


def convert_clip(video: bytes, paths: list[Path]) -> bool:
    """Write the images of a clip unless they are up to date; return whether they were written."""
    made_from = f"of {len(paths)}, quality {JPEG_QUALITY}, clip sha256 {hashlib.sha256(video).hexdigest()}"
    comments = [f"{COMMENT_START} picture {i} {made_from}" for i in range(len(paths))]
    there = (
        read_comment(path) == comment and path.read_bytes().endswith(JPEG_END)
        for path, comment in zip(paths, comments, strict=True)
    )
    if all(there):
        return False
    pictures = sample_frames(video, len(paths))
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, comment, picture in zip(paths, comments, pictures, strict=True):
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=JPEG_QUALITY, comment=comment)
        write_whole(path, jpeg.getvalue())
    return True


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def start_worker() -> None:
    """Ignore Ctrl-C in a worker process, and exit with the main process even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    parent = parent_process()
    assert parent

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def convert_in_parallel(
    readers: Mapping[PurePosixPath, Callable[[], bytes]], paths: Mapping[PurePosixPath, list[Path]], num_workers: int
) -> Iterator[tuple[PurePosixPath, bool | BrokenClip]]:
    """Yield each finished clip with the result of `convert_clip` or its BrokenClip error."""
    pending: dict[Future, PurePosixPath] = {}

    def finished() -> Iterator[tuple[PurePosixPath, bool | BrokenClip]]:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            try:
                yield pending[future], future.result()
            except BrokenClip as error:
                yield pending[future], error
            del pending[future]

    # "spawn", because forking a process with threads (from the pool or FFmpeg) can deadlock the child.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), start_worker) as pool:
        try:
            for clip, read in readers.items():
                pending[pool.submit(convert_clip, read(), paths[clip])] = clip
                if len(pending) > 2 * num_workers:  # limits the number of clips in memory
                    yield from finished()
            while pending:
                yield from finished()
        except BrokenProcessPool as error:
            suspects = ", ".join(str(clip) for clip in pending.values())
            raise InputError(f"a worker process died, either out of memory or while decoding one of: {suspects}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def convert_clips(
    readers: Mapping[PurePosixPath, Callable[[], bytes]],
    paths: Mapping[PurePosixPath, list[Path]],
    num_workers: int,
    show_progress: bool,
) -> tuple[int, set[PurePosixPath]]:
    """Convert clips in parallel, show the progress, and name broken clips.

    Parameters
    ----------
    readers : mapping of PurePosixPath to callable
        Reads each clip, in the order in which they are to be read.
    paths : mapping of PurePosixPath to list of Path
        The images of each clip, evenly spaced over it.
    num_workers : int
        Decoding processes.
    show_progress : bool
        Show a bar instead of plain lines.

    Returns
    -------
    tuple of (int, set of PurePosixPath)
        Number of clips whose images were written, because they were not up to date, and the broken clips.
    """
    done, written, broken = 0, 0, set()
    with tqdm(desc="Converting", total=len(readers), unit="clip", disable=not show_progress) as bar:
        for clip, outcome in convert_in_parallel(readers, paths, num_workers):
            bar.update()
            done += 1
            if isinstance(outcome, BrokenClip):
                broken.add(clip)
                tqdm.write(f"Broken clip: {clip} ({outcome})", file=sys.stderr)
            else:
                written += outcome
            if not show_progress and done * 10 // len(readers) > (done - 1) * 10 // len(readers):
                print(f"{done} of {len(readers)} clips", flush=True)
    return written, broken


def remove_strays(out_dir: Path, keep: set[Path]) -> None:
    """Remove partial files, and images that `convert_clip` wrote to `images/` and that are not in `keep`."""
    for path in [*out_dir.glob(".*.part"), *(out_dir / "images").rglob("*.*")]:
        half_written = re.fullmatch(r"\.\d+\.part", path.name)
        if half_written or (path not in keep and read_comment(path).startswith(COMMENT_START)):
            path.unlink()
            with suppress(OSError):  # the folder is not empty
                path.parent.rmdir()
