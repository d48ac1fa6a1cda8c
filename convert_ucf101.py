"""Convert UCF-101 clips to the images and JSONL files that `finetune_hf_trainer_ucf101.py` reads.

    python convert_ucf101.py --out_dir data/ucf101                                  # ten classes, from the Hub
    python convert_ucf101.py --out_dir data/ucf101 --source UCF101_subset.tar.gz    # a downloaded archive
    python convert_ucf101.py --out_dir data/mine --source my_clips                  # {train,val,test}/<class>/*.avi

It writes `images/{train,val,test}/<class>/<clip>.<0-7>.jpg` and `ucf101_{train,val,test}.jsonl`, nothing else. Archives
are read in place and not extracted.

An interrupted conversion can be resumed with the same command. The JPEG comment of each image identifies its clip, its
frame and the settings: images from other settings or another clip are replaced, and images that do not belong to the
dataset are removed. The JSONL files are written last, when all images exist.
"""

import argparse
import json
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from common.runtime.parser import Parser
from common.runtime.process import InputError
from tools.clips import LARGEST_CLIP, convert_clips, positive_int, remove_strays, write_whole

HUB_REPO, HUB_FILE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
# UCF-101 itself has 13,320 clips in 7 GB.
MOST_MEMBERS, LARGEST_ARCHIVE = 1_000_000, 1 << 40


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)

    group = parser.add_argument_group("data")
    group.add_argument("--out_dir", type=Path, required=True, help="output folder for images/ and ucf101_*.jsonl")
    group.add_argument(
        "--source",
        type=Path,
        help="tar archive or folder with {train,val,test}/<class>/*.avi, at the top level or one level below "
        f"(default: {HUB_FILE} from {HUB_REPO} on the Hub)",
    )
    group.add_argument("--num_frames", type=positive_int, default=8, help="images per clip (default: 8)")
    group.add_argument("--skip_broken", action="store_true", help="skip and report clips that cannot be decoded")

    group = parser.add_argument_group("running")
    group.add_argument(
        "--num_workers", type=positive_int, default=os.cpu_count(), help="decoding processes (default: one per CPU)"
    )
    group.add_argument("--no-tqdm", action="store_true", help="print plain lines instead of progress bars")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------------------
# Sources of clips
# --------------------------------------------------------------------------------------------------------------------


def download(show_progress: bool) -> Path:
    """Download the ten-class subset from the Hub, or find it in the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HfHubHTTPError, disable_progress_bars

    if not show_progress:
        disable_progress_bars()
    print(f"Downloading {HUB_FILE} of {HUB_REPO} from the Hub", flush=True)
    try:
        return Path(hf_hub_download(repo_id=HUB_REPO, repo_type="dataset", filename=HUB_FILE))
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"{HUB_FILE} of {HUB_REPO} cannot be downloaded from the Hub: {str(error).splitlines()[0]}\n"
            f"Without access to the Hub, download the file on another machine and pass --source {HUB_FILE}"
        ) from error


@contextmanager
def open_source(source: Path, out_dir: Path) -> Iterator[dict[PurePosixPath, Callable[[], bytes]]]:
    """Open a folder or tar archive; map the path of each file that may be a clip to a function that reads it.

    Raises
    ------
    InputError
        If the source is missing, is not a valid tar archive or too large, or has a member that would be extracted outside
        `out_dir`.
    """
    if source.is_dir():
        found = (path for pattern in ("*/*/*", "*/*/*/*") for path in source.glob(pattern) if path.is_file())
        yield {PurePosixPath(path.relative_to(source).as_posix()): path.read_bytes for path in found}
        return
    if not source.is_file():  # opening a FIFO would wait
        raise InputError(f"--source {source}: no such file or folder")
    with open_archive(source) as archive:
        members: list[tarfile.TarInfo] = []
        total = 0
        with blame_archive(source):
            for member in archive:
                refuse_unsafe(member, source, out_dir)
                members.append(member)
                total += member.size
                if len(members) > MOST_MEMBERS or total > LARGEST_ARCHIVE:  # before what follows is decompressed
                    limits = f"{MOST_MEMBERS:,} members or {LARGEST_ARCHIVE:,} bytes"
                    raise InputError(f"--source {source}: more than {limits}; pass a smaller archive, or a folder")

        def read(member: tarfile.TarInfo) -> bytes:
            with blame_archive(source):
                content = archive.extractfile(member)
                return content.read() if content else b""

        yield {PurePosixPath(member.name): partial(read, member) for member in members if not member.isdir()}


def open_archive(source: Path) -> tarfile.TarFile:
    with blame_archive(source):
        return tarfile.open(source)


@contextmanager
def blame_archive(source: Path) -> Iterator[None]:
    """Convert errors of `tarfile` and the decompressors to an InputError with the path of the archive."""
    try:
        yield
    except InputError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, LookupError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the file system, not of the archive
        raise InputError(f"--source {source}: not a tar archive, or damaged ({error}); download it again") from error


def refuse_unsafe(member: tarfile.TarInfo, source: Path, out_dir: Path) -> None:
    """Raise InputError for a member that would be extracted outside the output folder.

    Nothing is extracted, but the path of a clip determines where its images are written, and an archive with a malicious
    member cannot be trusted.
    """
    path = PurePosixPath(member.name)
    try:
        if path.is_absolute():
            raise ValueError("its path is absolute")
        if ".." in path.parts:
            raise ValueError("its path contains '..'")
        tarfile.data_filter(member, str(out_dir))
    except (ValueError, tarfile.FilterError) as error:
        raise InputError(
            f"--source {source}: unsafe archive, member {member.name[:80]!r} would be extracted outside {out_dir} ({error}); "
            "download the archive from a trusted source"
        ) from error
    if member.size > LARGEST_CLIP:
        raise InputError(f"--source {source}: {member.name[:80]!r} has {member.size:,} bytes, which is too large for a clip")


def clips_by_split(paths: Iterable[PurePosixPath], source: Path) -> dict[str, list[PurePosixPath]]:
    """Find the clips among the files of a source.

    Returns
    -------
    dict[str, list[PurePosixPath]]
        Clips of train, val and test, sorted by class and file name.

    Raises
    ------
    InputError
        If there are no clips, a split is empty, the source has two datasets, or two clips map to the same images.
    """
    splits: dict[str, list[PurePosixPath]] = {split: [] for split in SPLITS}
    roots: set[tuple[str, ...]] = set()
    taken: dict[PurePosixPath, PurePosixPath] = {}
    for path in sorted(paths, key=lambda path: path.parts):
        if len(path.parts) not in (3, 4) or path.parts[-3] not in SPLITS or path.suffix.lower() != ".avi":
            continue
        if any(part.startswith(".") for part in path.parts[-2:]):
            continue  # metadata of macOS and editors
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"--source {source}: the name of {str(path)[-80:]!r} is not valid UTF-8; rename it") from error
        other = taken.setdefault(path.with_suffix(""), path)
        if other != path:
            raise InputError(f"--source {source}: {other} and {path} would have the same image names; rename one of them")
        roots.add(path.parts[:-3])
        splits[path.parts[-3]].append(path)
    if not roots:
        raise InputError(f"--source {source}: no clips; expected {{train,val,test}}/<class>/*.avi")
    if len(roots) > 1:
        places = " and ".join(str(PurePosixPath(*root)) for root in sorted(roots))
        raise InputError(f"--source {source}: more than one dataset ({places}); pass one of them")
    for split, clips in splits.items():
        if not clips:
            raise InputError(f"--source {source}: split {split!r} is missing; expected {split}/<class>/*.avi")
    return splits


# --------------------------------------------------------------------------------------------------------------------
# The whole dataset
# --------------------------------------------------------------------------------------------------------------------


def picture_names(clip: PurePosixPath, num_frames: int) -> list[str]:
    """Return the paths of a clip's images relative to `images/`; `clip` is its path in the source."""
    split, label = clip.parts[-3:-1]
    return [f"{split}/{label}/{clip.stem}.{i}.jpg" for i in range(num_frames)]


def make_rows(splits: dict[str, list[PurePosixPath]], classes: list[str], num_frames: int) -> dict[str, list[dict]]:
    """Return the JSONL rows of each split; ids are numbered consecutively across the splits."""
    question = f"Classify the video into one of the following classes: {', '.join(classes)}."
    rows: dict[str, list[dict]] = {}
    number = 0
    for split, clips in splits.items():
        rows[split] = []
        for clip in clips:
            turn = {"images": picture_names(clip, num_frames), "user": question, "assistant": clip.parent.name}
            rows[split].append({"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]})
            number += 1
    return rows


def convert(args: argparse.Namespace) -> None:
    """Convert all splits.

    Raises
    ------
    InputError
        If the source is invalid, or has broken clips and `--skip_broken` is not set.
    """
    show_progress = not args.no_tqdm and sys.stderr.isatty()
    source = args.source or download(show_progress)
    images_dir = args.out_dir / "images"
    with open_source(source, args.out_dir) as files:
        splits = clips_by_split(files, source)
        clips = set().union(*splits.values())
        classes = sorted({clip.parent.name for clip in clips})
        sizes = ", ".join(f"{split} {len(found)}" for split, found in splits.items())
        print(f"{source}: {len(clips)} clips of {len(classes)} classes ({sizes})", flush=True)

        # Images may change from here on, so the JSONL files are removed until all images are complete.
        images_dir.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            (args.out_dir / f"ucf101_{split}.jsonl").unlink(missing_ok=True)

        # In the order of the archive, to read it sequentially.
        readers = {path: read for path, read in files.items() if path in clips}
        paths = {clip: [images_dir / name for name in picture_names(clip, args.num_frames)] for clip in clips}
        written, broken = convert_clips(readers, paths, args.num_workers, show_progress)

    if broken and not args.skip_broken:
        raise InputError(
            f"--source {source}: {len(broken)} of {len(clips)} clips cannot be decoded (listed above); replace them, "
            "or skip them with --skip_broken"
        )
    splits = {split: [clip for clip in found if clip not in broken] for split, found in splits.items()}
    classes = sorted({clip.parent.name for clip in clips - broken})
    for split, found in splits.items():
        if not found:
            raise InputError(f"--source {source}: no clip of split {split!r} can be decoded")
    rows = make_rows(splits, classes, args.num_frames)
    pictures = {images_dir / name for split in SPLITS for row in rows[split] for name in row["conversations"][0]["images"]}
    remove_strays(args.out_dir, pictures)
    for split in SPLITS:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        write_whole(args.out_dir / f"ucf101_{split}.jsonl", lines.encode("utf-8"))
    if broken:
        print(f"Skipped {len(broken)} broken clips (listed above).")
    print(
        f"{args.out_dir}: {len(pictures)} images of {len(clips - broken)} clips ({written} converted, "
        f"{len(clips - broken) - written} up to date), ucf101_train.jsonl, ucf101_val.jsonl, ucf101_test.jsonl"
    )


def main() -> None:
    try:
        convert(parse_args())
    except (InputError, OSError) as error:
        sys.exit(f"convert_ucf101.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to resume.")


if __name__ == "__main__":
    main()
