"""Rows and vectors of a store; for each key the row in the last shard counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.errors import GateError
from mio_export.store.info import StoreInfo
from mio_export.store.shards import (
    FAILED,
    ROW_COLUMNS,
    Row,
    check_width,
    columns_of,
    damage_named,
    read_table,
    rows_of,
    shard_paths,
    vectors_of,
)
from mio_export.store.snapshot import Snapshot, consistent


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vectors of a store, in the order of their keys."""

    keys: list[str]
    vectors: npt.NDArray[np.float32]
    """Shape (N, D)."""
    info: StoreInfo


def load_embeddings(folder: str | Path) -> Embeddings:
    """Read all vectors of a store, in the order of their keys; failed files have none.

        store = load_embeddings("embeddings")
        store.keys, store.vectors  # list of str, float32 (N, D)

    Another process may write to the store meanwhile: what is returned is the store as it was at one moment.

    Raises:
        UsageError: there is no store.
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another space, artifact, precision, decode mode or runtime than the store.
        MioError: the store was rewritten again and again while it was read.
    """
    return consistent(Path(folder), _embeddings)


def load_with_rows(folder: str | Path) -> tuple[Embeddings, dict[str, Row]]:
    """Read all vectors of a store as ``load_embeddings`` does, and the rows of all its keys, of the same moment.

    Raises:
        MioError: as for ``load_embeddings``.
    """
    return consistent(Path(folder), lambda snapshot: (_embeddings(snapshot), latest_rows(snapshot)))


def read_rows(folder: Path) -> list[Row]:
    """Return the row of every key that counts, without its vector, in the order of the keys.

    Raises:
        UsageError: there is no store.
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
        MioError: the store was rewritten again and again while it was read.
    """
    latest = consistent(folder, latest_rows)
    return sorted(latest.values(), key=lambda row: row.key.encode())


def iter_columns(folder: Path, info: StoreInfo, names: Sequence[str]) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Yield, shard by shard, the values of some columns of its rows; the caller holds the store's lock.

    Raises:
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
    """
    for path in shard_paths(folder):
        table = read_table(path, info, names)
        with damage_named(path):
            columns = [table.column(name).to_pylist() for name in names]
        yield zip(*columns, strict=True)


def locate(folder: Path, info: StoreInfo) -> dict[bytes, tuple[str, Path, int]]:
    """Return, for the sha256 of every file with a vector, the first key that had it, its shard and its row there.

    Raises:
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
    """
    found: dict[bytes, tuple[str, Path, int]] = {}
    for path, rows in zip(shard_paths(folder), iter_columns(folder, info, ("key", "sha256", "status")), strict=True):
        try:
            for row, (key, sha256, status) in enumerate(rows):
                if status != FAILED:
                    found.setdefault(bytes.fromhex(sha256), (key, path, row))
        except (TypeError, ValueError):
            raise GateError(f"{path} is damaged: a row with an embedding has no sha256") from None
    return found


def latest_rows(snapshot: Snapshot) -> dict[str, Row]:
    """Return the row of every key that counts, by key; errors as in ``Snapshot.read``."""
    latest: dict[str, Row] = {}
    for shard in snapshot.shards:
        latest |= {row.key: row for row in rows_of(shard.path, snapshot.read(shard, ROW_COLUMNS))}
    return latest


def _embeddings(snapshot: Snapshot) -> Embeddings:
    info, shards = snapshot.info, snapshot.shards
    latest: dict[str, tuple[int, int] | None] = {}  # shard and row; None if it failed
    for number, shard in enumerate(shards):
        with snapshot.opened(shard) as file, damage_named(shard.path):
            table = columns_of(shard.path, file, ["key", "status"])
            if "embedding" in file.schema_arrow.names:
                check_width(shard.path, file.schema_arrow.field("embedding").type, info)
            rows = zip(table.column("key").to_pylist(), table.column("status").to_pylist(), strict=True)
            latest |= {key: None if status == FAILED else (number, row) for row, (key, status) in enumerate(rows)}
    keys = sorted((key for key, place in latest.items() if place is not None), key=str.encode)
    places = np.array([latest.pop(key) for key in keys], np.int64).reshape(-1, 2)
    vectors = np.empty((len(keys), info.embedding_dim), np.float32)
    order = np.argsort(places[:, 0], kind="stable")
    of_shard = np.split(order, np.searchsorted(places[order, 0], np.arange(1, len(shards))))
    for shard, targets in zip(shards, of_shard, strict=False):  # without shards, split gives one
        if len(targets):
            table = snapshot.read(shard, ["embedding"])
            vectors[targets] = vectors_of(shard.path, table, info)[places[targets, 1]]
    return Embeddings(keys=keys, vectors=vectors, info=info)
