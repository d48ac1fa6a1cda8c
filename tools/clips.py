"""Frames of video clips as JPEG files: decoding, sampling and writing, in parallel worker processes.

The JPEG comment of each image identifies its clip, its frame and the settings, so that an interrupted conversion continues
where it ended, and images from other settings or another clip are replaced.
"""

import argparse
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from pathlib import Path, PurePath, PurePosixPath

import av
from PIL import Image
from tqdm import tqdm

from common.runtime.files import replacing, write_file
from common.runtime.process import InputError, counted

LARGEST_CLIP = 2**30  # bytes; a clip is read into memory
JPEG_QUALITY = 95
JPEG_END = b"\xff\xd9"  # missing from a truncated file
COMMENT_START = "convert_ucf101:"

# Reads each clip, in the order in which they are to be read.
Readers = Mapping[PurePosixPath, Callable[[], bytes]]


class BrokenClip(ValueError):
    """No frame of a clip can be decoded."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`convert_clips` reads."""
    group = parser.add_argument_group("frames")
    group.add_argument("--num_frames", type=positive_int, default=8, help="images per clip (default: %(default)s)")
    group.add_argument("--skip_broken", action="store_true", help="skip and report clips that cannot be decoded")

    group = parser.add_argument_group("running")
    group.add_argument(
        "--num_workers", type=positive_int, default=os.cpu_count(), help="decoding processes (default: one per CPU)"
    )
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def run(convert: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Convert clips, and end the program with a message if that fails."""
    try:
        convert(args)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to resume.")


def check_names(files: Iterable[tuple[PurePosixPath, PurePath]]) -> None:
    """Check the names of clips, given with the files that contain them.

    Raises
    ------
    InputError
        If a name is not valid UTF-8, or two clips would have the same images.
    """
    names: dict[PurePosixPath, PurePath] = {}
    for clip, file in files:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of {str(file)[-80:]!r} is not valid UTF-8: rename it") from None
        other = names.setdefault(clip.with_suffix(""), file)
        if other != file:
            raise InputError(f"{other} and {file} would have the same image names: rename one of them")


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
    for path, comment, picture in zip(paths, comments, pictures, strict=True):
        with replacing(path) as temporary:
            picture.save(temporary, "JPEG", quality=JPEG_QUALITY, comment=comment)
    return True


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
    readers: Readers, paths: Mapping[PurePosixPath, list[Path]], num_workers: int
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


def convert_clips(readers: Readers, args: argparse.Namespace) -> dict[PurePosixPath, list[str]]:
    """Convert clips to `images/` in `args.out_dir`.

    Returns
    -------
    dict of PurePosixPath to list of str
        For each clip, the names of its images, evenly spaced over it. Broken clips are left out.

    Raises
    ------
    InputError
        If all clips are broken, or some are and `--skip_broken` is not set.
    """
    names = {clip: [f"{clip.with_suffix('')}.{i}.jpg" for i in range(args.num_frames)] for clip in readers}
    paths = {clip: [args.out_dir / "images" / name for name in images] for clip, images in names.items()}
    show_bar = args.tqdm and sys.stderr.isatty()
    written = 0
    with tqdm(desc="Converting", total=len(readers), unit="clip", disable=not show_bar) as bar:
        for done, (clip, outcome) in enumerate(convert_in_parallel(readers, paths, args.num_workers), start=1):
            bar.update()
            if isinstance(outcome, BrokenClip):
                del names[clip]
                tqdm.write(f"Broken clip: {clip} ({outcome})", file=sys.stderr)
            else:
                written += outcome
            if not show_bar and done * 10 // len(readers) > (done - 1) * 10 // len(readers):
                print(f"{done} of {len(readers)} clips", flush=True)
    if len(names) < len(readers):
        broken = f"{len(readers) - len(names):,} of {counted(len(readers), 'clip')} cannot be decoded (listed above)"
        if not (names and args.skip_broken):
            raise InputError(f"{broken}: replace them" + ("" if args.skip_broken else ", or pass --skip_broken"))
        print(f"{broken} and skipped")
    print(
        f"{args.out_dir}: {counted(len(names) * args.num_frames, 'image')} of {counted(len(names), 'clip')} "
        f"({written:,} converted, {len(names) - written:,} up to date)"
    )
    return names


def remove_strays(out_dir: Path, images: Mapping[PurePosixPath, list[str]]) -> None:
    """Remove partial files, and images that `convert_clip` wrote to `images/` for other clips or settings than these."""
    keep = {out_dir / "images" / name for names in images.values() for name in names}
    for path in [*out_dir.glob(".*.part"), *(out_dir / "images").rglob("*.*")]:
        half_written = re.fullmatch(r"\.[0-9a-f]{8}\..+-\d+\.part", path.name)  # see common.runtime.files.replacing
        if half_written or (path not in keep and read_comment(path).startswith(COMMENT_START)):
            path.unlink()
            with suppress(OSError):  # the folder is not empty
                path.parent.rmdir()


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """Write a JSON Lines file atomically."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
