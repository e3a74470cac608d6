"""What a collection holds, by its vectors alone: near-duplicates, outliers, and a sample spread over all of it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.metrics import l2_normalized
from mio_export.searching.neighbors import other_neighbors
from mio_export.sources import evenly_spaced

Matrix = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.int64]
NUM_NEIGHBORS = 10
_MOST_COSINES = 400_000_000
_LEAST_EXAMINED = 200
_NEAR = 0.05
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Rows of a collection and the neighbours that each has in the whole of it."""

    rows: Indices
    """The rows examined, ascending, shape (M,); all of them in collections of up to 20,000."""
    neighbors: Indices
    """Their nearest other rows, the nearest first, shape (M, K), K at most 10."""
    cosines: Matrix
    """Of those, shape (M, K)."""

    @property
    def near_cosine(self) -> float:
        """Cosine from which two images count as near-duplicates here.

        1 - cosine is then at most a twentieth of its median for the tenth neighbour (less than a quarter of that
        angle), and 1e-6 at least, for rounding: what counts as near differs from encoder to encoder.
        """
        usual = float(np.median(1 - self.cosines[:, -1])) if self.cosines.size else 0.0
        return 1 - max(_NEAR * usual, _ROUNDING)


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Images that are the same file, or nearly the same image."""

    rows: tuple[int, ...]
    """Two or more, ascending."""
    identical: bool
    """Whether all have the same sha256."""
    cosine: float
    """The lowest that joins them; 1 for identical files."""


def examine(vectors: Matrix) -> Structure:
    """Find the ten nearest others of every row, or of rows at even distances if all would cost too much.

    Args:
        vectors: shape (N, D), N at least 1.
    """
    count = max(_LEAST_EXAMINED, _MOST_COSINES // len(vectors))
    rows = np.array(evenly_spaced(range(len(vectors)), count), dtype=np.int64)
    neighbors, cosines = other_neighbors(vectors, rows, NUM_NEIGHBORS)
    return Structure(rows=rows, neighbors=neighbors, cosines=cosines)


def duplicate_groups(structure: Structure, hashes: Sequence[str | None]) -> list[DuplicateGroup]:
    """Join identical files and near-duplicates into groups, identical ones first, then by cosine.

    Args:
        structure: of the collection; pairs of rows that were not examined are found only if identical.
        hashes: sha256 of every row's file, length N.
    """
    joined: dict[int, int] = {}
    first: dict[str, int] = {}
    for row, sha256 in enumerate(hashes):
        if sha256 is not None and first.setdefault(sha256, row) != row:
            _join(joined, first[sha256], row)
    links = [
        (int(structure.rows[position]), int(structure.neighbors[position, rank]), structure.cosines[position, rank])
        for position, rank in np.argwhere(structure.cosines >= structure.near_cosine)
    ]
    for row, other, _ in links:
        _join(joined, row, other)
    members: dict[int, set[int]] = defaultdict(set)
    for row in joined:
        members[_root(joined, row)].add(row)
    lowest: dict[int, float] = defaultdict(lambda: 1.0)
    for row, other, cosine in links:
        if hashes[row] is None or hashes[row] != hashes[other]:
            root = _root(joined, row)
            lowest[root] = min(lowest[root], float(cosine))
    groups = [
        DuplicateGroup(rows=tuple(sorted(rows)), identical=len({hashes[row] for row in rows}) == 1, cosine=lowest[root])
        for root, rows in members.items()
    ]
    return sorted(groups, key=lambda group: (not group.identical, -group.cosine, group.rows))


def _root(joined: dict[int, int], row: int) -> int:
    joined.setdefault(row, row)
    while joined[row] != row:
        joined[row] = row = joined[joined[row]]
    return row


def _join(joined: dict[int, int], row: int, other: int) -> None:
    joined[_root(joined, other)] = _root(joined, row)


def outliers(structure: Structure, count: int) -> list[tuple[int, float]]:
    """Return the positions in ``structure.rows`` with the lowest mean cosine to their neighbours, lowest first.

    Source: the mean distance to the k nearest neighbours, Angiulli and Pizzuti 2002, "Fast outlier detection in high
    dimensional spaces".
    """
    if not structure.cosines.size:
        return []
    means = structure.cosines.mean(axis=1)
    return [(int(position), float(means[position])) for position in np.argsort(means, kind="stable")[:count]]


def spread_sample(vectors: Matrix, count: int, *, seed: int = 0) -> list[int]:
    """Choose up to ``count`` rows that are spread over all directions, so that any first few are too.

    Each is drawn with a probability proportional to its squared distance, on the unit sphere, to the nearest one drawn
    before; equal rows are drawn once.

    Source: k-means++, Arthur and Vassilvitskii 2007.

    Args:
        vectors: shape (M, D), M at least 1.
        count: the most to choose.
        seed: seed of the draws.
    """
    rows, rng = l2_normalized(vectors), np.random.default_rng(seed)
    chosen = [int(rng.integers(len(rows)))]
    distances = np.full(len(rows), np.inf)
    while len(chosen) < min(count, len(rows)):
        distances = np.minimum(distances, 2 - 2 * (rows @ rows[chosen[-1]]).astype(np.float64))
        distances[chosen] = 0
        distances[distances < _ROUNDING] = 0
        if not distances.sum() > 0:
            break
        chosen.append(int(rng.choice(len(rows), p=distances / distances.sum())))
    return chosen


def walk(vectors: Matrix) -> list[int]:
    """Order rows so that similar ones stand together: from each to the nearest one that is left.

    Args:
        vectors: shape (M, D), M at least 1.
    """
    rows = l2_normalized(vectors)
    cosines = rows @ rows.T
    order = [int(cosines.sum(axis=1).argmin())]
    left = np.ones(len(rows), dtype=np.bool_)
    while len(order) < len(rows):
        left[order[-1]] = False
        order.append(int(np.where(left, cosines[order[-1]], -np.inf).argmax()))
    return order


__all__ = ["DuplicateGroup", "Structure", "duplicate_groups", "examine", "outliers", "spread_sample", "walk"]
