"""Setting rows apart for evaluation: ``--eval_fraction``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.runtime.collectives import gather
from common.runtime.process import InputError, rank, world_size
from common.runtime.progress import Progress

from .conversations import pictures
from .pictures import picture_content
from .rows import Contents, Rows, join_rows

ROWS_PER_READ = 1000


def split_by_picture(
    files: Sequence[Rows], fraction: float, seed: int, limit: int | None = None, bar: bool = True
) -> tuple[list[Rows], Rows]:
    """Set a part of the rows apart that has no image in common with the rest. Must be called on all processes.

    Rows that share an image, or a copy of it, stay together, as do equal rows. Such groups are drawn at random until the part
    has the requested size; a group that would exceed it is not drawn.

    Parameters
    ----------
    files : sequence of Rows
        Checked conversations of each file, with file names as images.
    fraction : float
        Share of the rows to set apart, between 0 and 1.
    seed : int
        Determines the split, together with the rows and their order.
    limit : int, optional
        Maximum number of rows to set apart.
    bar : bool
        False with ``--no-tqdm``.

    Returns
    -------
    tuple of (list of Rows, Rows)
        The rest of each file, and the rows set apart.

    Raises
    ------
    InputError
        If no group is small enough, or nothing is left.
    """
    rows = join_rows(files)
    contents = rows.contents
    assert contents is not None
    chunks = (range(start, min(start + ROWS_PER_READ, len(rows))) for start in range(0, len(rows), ROWS_PER_READ))
    names = [[str(name) for name in pictures(row)] for chunk in chunks for row in rows.__getitems__(list(chunk))]
    content = _identify(set(chain.from_iterable(names)), bar)
    hashes: dict[int, int] = dict(chain.from_iterable(gather(contents.rows[:, :2].tolist())))
    groups = _connected([[hashes[row], *(content[name] for name in names[row])] for row in range(len(rows))])
    share = max(1, round(fraction * len(rows)))
    wanted, chosen = min(share, limit or share), set[int]()
    for index in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[index]) <= wanted:
            chosen.update(groups[index])
    if not chosen or len(chosen) == len(rows):
        larger = "a larger --max_eval_samples, " if wanted < share else ""
        raise InputError(
            f"rows that share an image stay together, and the smallest such group has {min(map(len, groups)):,} of "
            f"{len(rows):,} rows: use {larger}another fraction, more data, or --eval_file",
            f"--eval_fraction {fraction:g}",
        )

    def part(indices: list[int], doubts: Sequence[str] = ()) -> Rows:
        known = contents.rows[np.isin(contents.rows[:, 0], indices)].copy()
        known[:, 0] = np.searchsorted(indices, known[:, 0])
        used = {name for row in indices for name in names[row]}
        return rows.take(indices, Contents(known, [file for file in contents.pictures if file in used], doubts))

    ends = np.cumsum([len(file) for file in files]).tolist()
    rest = [[row for row in range(end - len(file), end) if row not in chosen] for file, end in zip(files, ends, strict=True)]
    # What is suspicious about images is reported once.
    return [part(indices, contents.doubts if file == 0 else ()) for file, indices in enumerate(rest)], part(sorted(chosen))


def _identify(names: set[str], bar: bool) -> dict[str, str | bytes]:
    """Identify each file by its content. A file whose size no other file has is not read. Each process reads its share."""
    files = sorted(names)
    sizes = list(map(os.path.getsize, files))
    count = Counter(sizes)
    same_size = [file for file, size in zip(files, sizes, strict=True) if count[size] > 1]
    found: dict[str, str | bytes] = {}
    share = same_size[rank() :: world_size()]
    with Progress("Comparing images", "images", len(share), bar) as progress:
        for file in share:
            found[file] = picture_content(file)
            progress.update()
    contents: dict[str, str | bytes] = {file: file for file in files}
    for part in gather(found):
        contents |= part
    return contents


def _connected(keys: list[list[int | str | bytes]]) -> list[list[int]]:
    """Group rows that have a key in common, directly or through other rows; groups in the order of their first rows."""
    nodes = {key: len(keys) + number for number, key in enumerate(set(chain.from_iterable(keys)))}
    edges = np.array([(row, nodes[key]) for row, own in enumerate(keys) for key in own]).T
    graph = coo_array((np.ones(edges.shape[1]), edges), shape=(len(keys) + len(nodes),) * 2)
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels[: len(keys)].tolist()):
        groups.setdefault(label, []).append(row)
    return list(groups.values())
