"""``search``: the stored vectors nearest to given ones, exactly, in bounded memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.errors import MioError, UsageError
from mio_export.metrics import nearest
from mio_export.store import Embeddings, load_embeddings

Matrix = npt.NDArray[np.floating[Any]]
_BLOCK = 16_384


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A stored image near a query."""

    rank: int
    """1 for the nearest."""
    key: str
    """Its key in the store."""
    cosine: float
    """Of the angle between it and the query, -1 to 1."""


def search(out: str | Path | Embeddings, queries: Matrix, *, k: int = 10) -> list[tuple[Neighbor, ...]]:
    """Find the k stored images with the highest cosine for each query, the most similar first.

        found = search("embeddings", queries, k=5)
        found[0][0].key  # the image nearest to the first query

    Every stored vector is compared. Equal cosines are ordered by key. ``k`` is clamped to the store's size.

    Args:
        out: a store's folder, or what ``load_embeddings`` gave.
        queries: float, shape (Q, D).
        k: number of neighbours, 1 or more.

    Raises:
        UsageError: there is no store, ``k`` is below 1, or the queries are not finite vectors of the store's width.
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
        MioError: the store holds no embeddings.
    """
    check_k(k)
    store = out if isinstance(out, Embeddings) else load_embeddings(out)
    width = store.info.embedding_dim
    if queries.ndim != 2 or queries.shape[1] != width or not np.isfinite(queries).all():
        raise UsageError(f"queries must be finite, of shape (Q, {width}), as the store's are; got {queries.shape}")
    if not store.keys:
        raise MioError("the store holds no embeddings: all its files failed; why: mio inspect OUT")
    indices, cosines = nearest_in_blocks(queries, store.vectors, k)
    return [neighbors_of(store.keys, *pair) for pair in zip(indices, cosines, strict=True)]


def check_k(k: int) -> None:
    """Refuse a number of neighbours below 1.

    Raises:
        UsageError: it is.
    """
    if k < 1:
        raise UsageError(f"k, the number of neighbours, must be 1 or more; got {k}")


def neighbors_of(keys: list[str], indices: npt.NDArray[np.int64], cosines: Matrix) -> tuple[Neighbor, ...]:
    """Name neighbours, the nearest first, by their rows (K,) and cosines (K,)."""
    pairs = zip(indices.tolist(), np.clip(cosines, -1, 1).tolist(), strict=True)
    return tuple(Neighbor(rank=rank, key=keys[row], cosine=cosine) for rank, (row, cosine) in enumerate(pairs, 1))


def nearest_in_blocks(queries: Matrix, bank: Matrix, k: int) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Do what ``metrics.nearest`` does, holding at most 1,024 x 16,384 cosines at once.

    Args:
        queries: shape (Q, D).
        bank: shape (N, D).
        k: number of neighbours, clamped to N.

    Returns:
        Indices (Q, k) and cosines (Q, k).
    """
    indices = np.empty((len(queries), 0), dtype=np.int64)
    cosines: Matrix = np.empty((len(queries), 0), dtype=queries.dtype)
    for start in range(0, len(bank), _BLOCK):
        found, values = nearest(queries, bank[start : start + _BLOCK], k)
        indices, cosines = np.hstack([indices, found + start]), np.hstack([cosines, values])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]  # stable: of equal ones, the earlier block's first
        indices, cosines = np.take_along_axis(indices, order, axis=1), np.take_along_axis(cosines, order, axis=1)
    return indices, cosines


def other_neighbors(vectors: Matrix, rows: npt.NDArray[np.int64], k: int) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Find the k nearest of each given row, itself left out, the nearest first.

    Args:
        vectors: shape (N, D).
        rows: indices of M of them, shape (M,).
        k: number of neighbours, clamped to N - 1.

    Returns:
        Indices (M, k) and cosines (M, k).
    """
    indices, cosines = nearest_in_blocks(vectors[rows], vectors, k + 1)
    width = indices.shape[1]
    own = indices == rows[:, None]
    # of many equal rows, the row itself may not be among the nearest; then the last one goes
    drop = np.where(own.any(axis=1, keepdims=True), own, np.arange(width) == width - 1)
    shape = (len(rows), width - 1)
    return indices[~drop].reshape(shape), cosines[~drop].reshape(shape)


__all__ = ["Neighbor", "check_k", "nearest_in_blocks", "neighbors_of", "other_neighbors", "search"]
