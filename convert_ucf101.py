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
import lzma
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from common.runtime.parser import Parser
from common.runtime.process import InputError
from tools.clips import LARGEST_CLIP, Readers, add_flags, check_names, convert_clips, remove_strays, run, write_json_lines

HUB_REPO, HUB_FILE = "sayakpaul/ucf101-subset", "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")
# UCF-101 itself has 13,320 clips in 7 GB.
MOST_MEMBERS, LARGEST_ARCHIVE = 1_000_000, 1 << 40
LARGEST_HEADER, LARGEST_HEADERS = 1 << 18, 1 << 29  # bytes of one, and of all, which have long names, for example
HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


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
    add_flags(parser)
    return parser.parse_args()


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


class Member(tarfile.TarInfo):
    """A member of an archive, which is refused if `tarfile` would read headers or a sparse map of any size into memory.

    CPython's source says that `_proc_member` can be overridden.
    """

    def _proc_member(self, archive):
        if self.type in HEADERS:
            archive.header_bytes = getattr(archive, "header_bytes", 0) + self.size
            if self.size > LARGEST_HEADER or archive.header_bytes > LARGEST_HEADERS:
                raise InputError(f"--source {archive.name}: unsafe archive, with headers of {archive.header_bytes:,} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse(archive)
        member = super()._proc_member(archive)
        if member.issparse():
            member._refuse_sparse(archive)
        member.pax_headers = {}  # applied, and otherwise kept, those of the whole archive with every member
        archive.pax_headers.clear()
        return member

    def _proc_gnusparse_10(self, member, headers, archive):
        member._refuse_sparse(archive)

    def _refuse_sparse(self, archive):
        remedy = "write the archive without holes (bsdtar: --no-read-sparse)"
        raise InputError(f"--source {archive.name}: {self.name[:80]!r} is a sparse file: {remedy}")


@contextmanager
def open_source(source: Path, out_dir: Path) -> Iterator[Readers]:
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
        with blame_archive(source):
            members = list(safe_members(archive, source, out_dir))

        def read(member: tarfile.TarInfo) -> bytes:
            with blame_archive(source):
                content = archive.extractfile(member)
                return content.read() if content else b""

        yield {PurePosixPath(member.name): partial(read, member) for member in members if not member.isdir()}


def open_archive(source: Path) -> tarfile.TarFile:
    with blame_archive(source):
        return tarfile.open(source, tarinfo=Member)


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


def safe_members(archive: tarfile.TarFile, source: Path, out_dir: Path) -> Iterator[tarfile.TarInfo]:
    """Yield all members, and raise InputError for too many, or for one that would be extracted outside the output folder.

    Nothing is extracted, but the path of a clip determines where its images are written, and an archive with a malicious
    member cannot be trusted.
    """
    total = 0
    for number, member in enumerate(archive, start=1):
        path = PurePosixPath(member.name)
        try:
            if path.is_absolute() or ".." in path.parts:
                raise ValueError("its path is absolute, or contains '..'")
            tarfile.data_filter(member, str(out_dir))
        except (ValueError, tarfile.FilterError) as error:
            raise InputError(
                f"--source {source}: unsafe archive, member {member.name[:80]!r} would be extracted outside {out_dir} "
                f"({error}); download the archive from a trusted source"
            ) from error
        if member.size > LARGEST_CLIP:
            size = f"{member.size:,} bytes"
            raise InputError(f"--source {source}: {member.name[:80]!r} has {size}, which is too large for a clip")
        total += member.size
        if number > MOST_MEMBERS or total > LARGEST_ARCHIVE:  # before what follows is decompressed
            limits = f"{MOST_MEMBERS:,} members or {LARGEST_ARCHIVE:,} bytes"
            raise InputError(f"--source {source}: more than {limits}; pass a smaller archive, or a folder")
        yield member


def find_clips(files: Readers, source: Path) -> Readers:
    """Find the clips among the files of a source, and map `<split>/<class>/<clip>` to a function that reads it.

    Raises
    ------
    InputError
        If there are no clips, a split is empty, the source has two datasets, or two clips would have the same images.
    """
    found = {}
    for path in files:
        # Names with a leading period are metadata of macOS and editors.
        hidden = any(part.startswith(".") for part in path.parts[-2:])
        if len(path.parts) in (3, 4) and path.parts[-3] in SPLITS and path.suffix.lower() == ".avi" and not hidden:
            found[path] = PurePosixPath(*path.parts[-3:])
    if not found:
        raise InputError(f"--source {source}: no clips; expected {{train,val,test}}/<class>/*.avi")
    roots = {PurePosixPath(*path.parts[:-3]) for path in found}
    if len(roots) > 1:
        places = " and ".join(map(str, sorted(roots)))
        raise InputError(f"--source {source}: more than one dataset ({places}); pass one of them")
    check_names((clip, path) for path, clip in sorted(found.items()))
    for split in SPLITS:
        if all(clip.parts[0] != split for clip in found.values()):
            raise InputError(f"--source {source}: split {split!r} is missing; expected {split}/<class>/*.avi")
    return {clip: files[path] for path, clip in found.items()}


def make_rows(images: dict[PurePosixPath, list[str]]) -> dict[str, list[dict]]:
    """Return the JSONL rows of each split, sorted by class and clip; ids are numbered consecutively across the splits."""
    classes = sorted({clip.parts[1] for clip in images})
    question = f"Classify the video into one of the following classes: {', '.join(classes)}."
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    in_order = sorted(images, key=lambda clip: (SPLITS.index(clip.parts[0]), clip.parts))
    for number, clip in enumerate(in_order):
        split, label, _ = clip.parts
        turn = {"images": images[clip], "user": question, "assistant": label}
        rows[split].append({"id": f"{split}-{number:010d}", "source": "ucf101", "conversations": [turn]})
    return rows


def convert(args: argparse.Namespace) -> None:
    """Convert all splits.

    Raises
    ------
    InputError
        If the source is invalid, or has broken clips and `--skip_broken` is not set.
    """
    source = args.source or download(args.tqdm and sys.stderr.isatty())
    with open_source(source, args.out_dir) as files:
        clips = find_clips(files, source)
        sizes = ", ".join(f"{split} {sum(clip.parts[0] == split for clip in clips)}" for split in SPLITS)
        classes = {clip.parts[1] for clip in clips}
        print(f"{source}: {len(clips)} clips of {len(classes)} classes ({sizes})", flush=True)
        # Images may change from here on, so the JSONL files are removed until all images are complete.
        for split in SPLITS:
            (args.out_dir / f"ucf101_{split}.jsonl").unlink(missing_ok=True)
        images = convert_clips(clips, args)
    rows = make_rows(images)
    if empty := [split for split in SPLITS if not rows[split]]:
        raise InputError(f"--source {source}: no clip of split {empty[0]!r} can be decoded")
    remove_strays(args.out_dir, images)
    for split in SPLITS:
        write_json_lines(args.out_dir / f"ucf101_{split}.jsonl", rows[split])


def main(args: argparse.Namespace) -> None:
    run(convert, args)


if __name__ == "__main__":
    main(parse_args())
