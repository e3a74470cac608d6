"""The embedding store: Parquet shards plus ``store.json``; a renamed shard is the commit.

Shards are never changed by later runs: a file that changed gets a new row in a new shard, and for each key the row in
the last shard counts. Only pruning rewrites a shard, whole.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mio_export.errors import GateError, MioError, UsageError
from mio_export.files import staged_file, write_text
from mio_export.schema import parse_json

STORE = "store.json"
LOCK = ".lock"
SCHEMA_VERSION = 1
OK, FAILED, DUPLICATE = "ok", "failed", "duplicate"
Vector: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a collection a store holds: of its shards, every ``count``-th from the ``index``-th on."""

    index: int
    """From 1 to ``count``."""
    count: int
    num_files: int
    """Of the whole collection."""
    listing_sha256: str
    """Hash of the keys of the whole collection."""

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """The whole of ``store.json``: what every vector in the store has in common. Written once, then only read."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    schema_version: int = SCHEMA_VERSION
    bundle: str
    """Name of the bundle."""
    space: str
    """Fingerprint of the embedding space."""
    artifact_file: str
    artifact_sha256: str
    precision: str
    decode: str = "full"
    """How images are decoded: ``full``, or ``scaled``: large JPEGs at a fraction of their size."""
    runtime: str
    device: str
    embedding_dim: int
    normalized: bool
    batch_size: int
    shard_size: int
    part: Part | None = None
    """None if the store is whole."""

    @property
    def identity(self) -> dict[str, str]:
        """What makes vectors comparable; it travels in every file that holds some."""
        names = ("space", "artifact_sha256", "precision", "decode")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One discovered file."""

    key: str
    size: int
    mtime_ns: int
    sha256: str | None
    """sha256 of the file's bytes; None if it could not be read."""
    status: str
    """``ok``, ``failed``, or ``duplicate``: it has the bytes, and so the vector, of a file before it."""
    stage: str | None
    """Where it failed: ``read`` or ``decode``."""
    reason: str | None
    """Why it failed, or whose bytes it has."""

    @property
    def has_vector(self) -> bool:
        """Whether there is an embedding."""
        return self.status != FAILED


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The vectors of a store, in the order of their keys."""

    keys: list[str]
    vectors: npt.NDArray[np.float32]
    """Shape (N, D)."""
    info: StoreInfo


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the store's lock; the system releases it even if the process is killed.

    Raises:
        MioError: another process is writing to the store.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise MioError(f"{folder} is being written by another process; wait for it, or choose another -o") from None


def shard_paths(folder: Path) -> list[Path]:
    """Return the committed shards, the oldest first."""
    return sorted(folder.glob("shard-*.parquet"))


def shard_number(path: Path) -> int:
    """Return the number in a shard's name."""
    return int(path.stem.removeprefix("shard-"))


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:06d}.parquet"


def read_info(folder: Path) -> StoreInfo | None:
    """Read ``store.json``; None if the folder is no store yet.

    Raises:
        GateError: it is damaged.
        MioError: it was written by a newer mio-export.
    """
    path = folder / STORE
    if not path.is_file():
        return None
    return parse_json(path.read_bytes(), StoreInfo, where=path, newest=SCHEMA_VERSION)


def write_info(folder: Path, info: StoreInfo) -> None:
    """Write ``store.json``."""
    write_text(folder / STORE, json.dumps(asdict(info), indent=2) + "\n")


def write_shard(path: Path, info: StoreInfo, rows: Sequence[Row], vectors: npt.NDArray[np.float32]) -> None:
    """Write a shard, synced, and commit it by renaming.

    Args:
        path: where it goes.
        info: its identity travels in the shard's metadata.
        rows: one for each file.
        vectors: of the rows that have one, in their order, shape (number of them, D).
    """
    is_ok = np.array([row.has_vector for row in rows])
    values = np.zeros((len(rows), info.embedding_dim), dtype=np.float32)
    values[is_ok] = vectors
    embedding = pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), info.embedding_dim, mask=pa.array(~is_ok)
    )
    columns: dict[str, Any] = {
        "key": pa.array([row.key for row in rows], pa.string()),
        "size": pa.array([row.size for row in rows], pa.int64()),
        "mtime_ns": pa.array([row.mtime_ns for row in rows], pa.int64()),
        "sha256": pa.array([row.sha256 for row in rows], pa.string()),
        "status": pa.array([row.status for row in rows], pa.string()),
        "stage": pa.array([row.stage for row in rows], pa.string()),
        "reason": pa.array([row.reason for row in rows], pa.string()),
        "embedding": embedding,
    }
    table = pa.table(columns).replace_schema_metadata({f"mio.{name}": value for name, value in info.identity.items()})
    _write_table(path, table)


def iter_columns(folder: Path, names: Sequence[str]) -> Iterator[Iterator[tuple[Any, ...]]]:
    """Yield, shard by shard, the values of some columns of its rows.

    Raises:
        GateError: a shard cannot be read.
    """
    for path in shard_paths(folder):
        table = _read(path, list(names))
        yield zip(*(table.column(name).to_pylist() for name in names), strict=True)


def read_rows(folder: Path) -> list[Row]:
    """Return the row of every key that counts, without its vector, in the order of the keys.

    Raises:
        GateError: a shard cannot be read.
    """
    latest: dict[str, Row] = {}
    for path in shard_paths(folder):
        latest |= {row.key: row for row in _rows(path)}
    return sorted(latest.values(), key=lambda row: row.key.encode())


def locate(folder: Path) -> dict[str, tuple[str, Path, int]]:
    """Return, for the sha256 of every file with a vector, the first key that had it, its shard and its row there."""
    found: dict[str, tuple[str, Path, int]] = {}
    for path, rows in zip(shard_paths(folder), iter_columns(folder, ("key", "sha256", "status")), strict=True):
        for row, (key, sha256, status) in enumerate(rows):
            if status != FAILED:
                found.setdefault(sha256, (key, path, row))
    return found


def read_shard(path: Path) -> tuple[list[Row], npt.NDArray[np.float32]]:
    """Return a shard's rows, and their vectors as ``read_vectors`` does.

    Raises:
        GateError: it cannot be read.
    """
    return _rows(path), read_vectors(path)


def read_vectors(path: Path) -> npt.NDArray[np.float32]:
    """Return the vectors of a shard, shape (rows, D); rows without one are undefined."""
    column = _read(path, ["embedding"]).column("embedding").combine_chunks()
    vectors: npt.NDArray[np.float32] = column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return vectors


def prune(folder: Path, keep: frozenset[str]) -> int:
    """Drop the rows of all keys but ``keep``, and rows that a later shard replaces; return how many keys went.

    Each shard is rewritten whole or not at all, the oldest first, so that the row that counts is the last to go: it may
    be killed at any moment, and done again.
    """
    shards = shard_paths(folder)
    last = {key: path for path in shards for key in _read(path, ["key"]).column("key").to_pylist()}
    for path in shards:
        table = _read(path)
        stays = [key in keep and last[key] == path for key in table.column("key").to_pylist()]
        if not any(stays):
            path.unlink()
        elif not all(stays):
            _write_table(path, table.filter(pa.array(stays)))
    return sum(key not in keep for key in last)


def load_embeddings(folder: str | Path) -> Embeddings:
    """Read all vectors of a store, in the order of their keys; failed files have none.

        store = load_embeddings("embeddings")
        store.keys, store.vectors  # list of str, float32 (N, D)

    Raises:
        UsageError: there is no store.
        GateError: a shard cannot be read, or belongs to another embedding space.
    """
    folder = Path(folder)
    info = read_info(folder)
    if info is None:
        raise UsageError(f"{folder} is not an embedding store (it holds no {STORE}); make one with: mio embed")
    paths = shard_paths(folder)
    latest: dict[str, tuple[int, int] | None] = {}  # shard and row; None if it failed
    for number, path in enumerate(paths):
        table = _read(path, ["key", "status"])
        if (table.schema.metadata or {}).get(b"mio.space") != info.space.encode():
            raise GateError(f"{path} belongs to another embedding space than {folder / STORE}")
        rows = zip(table.column("key").to_pylist(), table.column("status").to_pylist(), strict=True)
        latest |= {key: None if status == FAILED else (number, row) for row, (key, status) in enumerate(rows)}
    keys = sorted((key for key, place in latest.items() if place is not None), key=str.encode)
    places = np.array([latest.pop(key) for key in keys], np.int64).reshape(-1, 2)
    vectors = np.empty((len(keys), info.embedding_dim), np.float32)
    order = np.argsort(places[:, 0], kind="stable")
    of_shard = np.split(order, np.searchsorted(places[order, 0], np.arange(1, len(paths))))
    for path, targets in zip(paths, of_shard, strict=False):  # without shards, split gives one
        if len(targets):
            vectors[targets] = read_vectors(path)[places[targets, 1]]
    return Embeddings(keys=keys, vectors=vectors, info=info)


def _rows(path: Path) -> list[Row]:
    names = [field.name for field in fields(Row)]
    columns = _read(path, names).to_pydict()
    return [Row(**dict(zip(names, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _write_table(path: Path, table: pa.Table) -> None:
    compression = {name: "NONE" if name == "embedding" else "ZSTD" for name in table.column_names}
    compression["embedding.list.element"] = compression.pop("embedding")
    with staged_file(path) as temporary:
        pq.write_table(table, temporary, compression=compression, use_dictionary=["status", "stage", "reason"])


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise GateError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
