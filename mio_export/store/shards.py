"""The shards of a store: their names, their rows, and the check that they belong to it."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mio_export.errors import GateError, MioError, SpaceError, one_line
from mio_export.files import staged_file
from mio_export.store.info import STORE, Part, StoreInfo

OK, FAILED, DUPLICATE = "ok", "failed", "duplicate"
Vector: TypeAlias = npt.NDArray[np.float32]
Stamp: TypeAlias = tuple[int, int, int]
"""Inode, size and time of change: another file, or another content, has another one."""
_NEVER_NULL = frozenset({"key", "size", "mtime_ns", "status"})


class ShardChangedError(MioError):
    """A shard was rewritten or removed by another process while it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} changed while it was read; once its writer is done, try again")


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
    """Where it failed: ``read``, ``decode`` or ``embed``."""
    reason: str | None
    """Why it failed, or whose bytes it has."""

    @property
    def has_vector(self) -> bool:
        """Whether there is an embedding."""
        return self.status != FAILED


ROW_COLUMNS = tuple(field.name for field in fields(Row))
COLUMNS = (*ROW_COLUMNS, "embedding")
"""Of a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A committed shard, as it was when its folder was listed."""

    path: Path
    stamp: Stamp

    @property
    def number(self) -> int:
        """The number in its name."""
        return shard_number(self.path)


def shard_paths(folder: Path) -> list[Path]:
    """Return the committed shards in the order of their numbers, the oldest first.

    Raises:
        GateError: a Parquet file is named like a shard, but is none.
    """
    if not folder.is_dir():
        return []
    paths = list(folder.glob("shard-*.parquet"))
    for path in sorted(paths):
        if not re.fullmatch(r"shard-[0-9]+\.parquet", path.name) or path != shard_path(folder, shard_number(path)):
            raise GateError(
                f"{path} is not named as a shard is (shard-000000.parquet and so on); move it out of the store"
            )
    return sorted(paths, key=shard_number)


def list_shards(folder: Path) -> list[Shard]:
    """Return the committed shards, the oldest first, so that it can be noticed if one changes.

    Raises:
        GateError: a Parquet file is named like a shard, but is none, or is a link that leads nowhere.
        ShardChangedError: one was removed meanwhile.
    """
    shards = []
    for path in shard_paths(folder):
        try:
            shards.append(Shard(path=path, stamp=_stamp(path.stat())))
        except FileNotFoundError:
            if path.is_symlink():
                raise GateError(
                    f"{path} is a link to something that is not there; make it again, or remove it"
                ) from None
            raise ShardChangedError(path) from None
    return shards


def shard_number(path: Path) -> int:
    """Return the number in a shard's name."""
    return int(path.stem.removeprefix("shard-"))


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard; beyond 999,999 its name grows longer."""
    return folder / f"shard-{number:06d}.parquet"


def next_number(folder: Path, part: Part | None) -> int:
    """Return the number of the next shard; a part numbers its shards as the whole would."""
    first, step = (part.index - 1, part.count) if part else (0, 1)
    shards = shard_paths(folder)
    return shard_number(shards[-1]) + step if shards else first


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
        "reason": pa.array([_encodable(row.reason) for row in rows], pa.string()),
        "embedding": embedding,
    }
    table = pa.table(columns).replace_schema_metadata({f"mio.{name}": value for name, value in info.identity.items()})
    write_table(path, table)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a shard's table, synced, and commit it by renaming."""
    compression = {name: "NONE" if name == "embedding" else "ZSTD" for name in table.column_names}
    compression["embedding.list.element"] = compression.pop("embedding")
    with staged_file(path) as temporary:
        pq.write_table(table, temporary, compression=compression, use_dictionary=["status", "stage", "reason"])


def read_vectors(path: Path, info: StoreInfo) -> npt.NDArray[np.float32]:
    """Return the vectors of a shard, shape (rows, D); rows without one are undefined.

    Raises:
        GateError: it cannot be read.
        SpaceError: it holds vectors of another identity than the store.
    """
    return vectors_of(path, read_table(path, info, ["embedding"]), info)


def rows_of(path: Path, table: pa.Table) -> list[Row]:
    """Return the rows of a table that has their columns; ``path`` is named if one is no text."""
    with damage_named(path):
        columns = [table.column(name).to_pylist() for name in ROW_COLUMNS]
    return [Row(**dict(zip(ROW_COLUMNS, values, strict=True))) for values in zip(*columns, strict=True)]


def vectors_of(path: Path, table: pa.Table, info: StoreInfo) -> npt.NDArray[np.float32]:
    """Return the ``embedding`` column of a table, shape (rows, D).

    Raises:
        GateError: its vectors do not have the store's width.
    """
    column = table.column("embedding").combine_chunks()
    check_width(path, column.type, info)
    vectors: npt.NDArray[np.float32] = column.values.to_numpy(zero_copy_only=False).reshape(-1, info.embedding_dim)
    return vectors[column.offset : column.offset + len(column)]


def check_width(path: Path, kind: pa.DataType, info: StoreInfo) -> None:
    """Refuse a type of the ``embedding`` column that is not the store's.

    Raises:
        GateError: it is not.
    """
    if not pa.types.is_fixed_size_list(kind) or (kind.value_type, kind.list_size) != (pa.float32(), info.embedding_dim):
        raise GateError(
            f"{path} is damaged: its embeddings are {kind}, must be lists of {info.embedding_dim:,} 32-bit floats"
        )


def read_table(path: Path, info: StoreInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a shard; None: all.

    Raises:
        GateError: it cannot be read, or lacks a column or a value.
        SpaceError: it holds vectors of another identity than the store.
    """
    with opened(path, info) as file:
        return columns_of(path, file, columns)


def columns_of(path: Path, file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of an opened shard; None: all.

    Raises:
        GateError: it lacks one, or a value.
    """
    wanted = COLUMNS if columns is None else columns
    for name in wanted:
        if name not in file.schema_arrow.names:
            raise GateError(f"{path} is damaged: it has no column {name}")
    table = file.read(list(columns) if columns is not None else None)
    for name in _NEVER_NULL.intersection(wanted):
        if table.column(name).null_count:
            raise GateError(f"{path} is damaged: a row has no {name}")
    return table


@contextmanager
def opened(path: Path, info: StoreInfo, *, stamp: Stamp | None = None) -> Iterator[pq.ParquetFile]:
    """Open a shard of a store.

    Args:
        path: of the shard.
        info: what the store holds.
        stamp: what the file had when it was listed; None: it may be any.

    Raises:
        GateError: it cannot be read.
        SpaceError: it holds vectors of another identity than the store.
        ShardChangedError: its stamp is another one by now.
    """
    # no file of Python's: an Arrow thread that lets go of one while the interpreter ends aborts the process
    with damage_named(path, may_vanish=stamp is not None), pa.OSFile(os.fsencode(path)) as source:
        if stamp is not None and _stamp(path.stat()) != stamp:
            raise ShardChangedError(path)
        with pq.ParquetFile(source) as file:
            _check_identity(path, file.schema_arrow.metadata or {}, info)
            yield file


@contextmanager
def damage_named(path: Path, *, may_vanish: bool = False) -> Iterator[None]:
    """Turn what Parquet's reader raises into one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if may_vanish and isinstance(error, FileNotFoundError):
            raise ShardChangedError(path) from None
        raise GateError(f"{path} cannot be read: {one_line(error, 200)}") from None


def _check_identity(path: Path, metadata: Mapping[bytes, bytes], info: StoreInfo) -> None:
    """Refuse a shard whose vectors are not comparable with the store's."""
    implied = {}
    if not info.versions_of(shard_number(path)):
        implied = {"decode": "full", "runtime": info.runtime}  # what earlier versions did not write down
    held = {
        name: metadata.get(f"mio.{name}".encode(), implied.get(name, "").encode()).decode(errors="replace")
        for name in info.identity
    }
    other = [name for name, value in info.identity.items() if held[name] != value]
    if other:
        found, wanted = (
            " and ".join(values[name][:12] or "none" for name in other) for values in (held, info.identity)
        )
        raise SpaceError(
            f"{path} holds vectors of another {' and '.join(other).replace('_', ' ')} than {STORE} says:"
            f" {found}, not {wanted}; move it out of the store"
        )


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _encodable(text: str | None) -> str | None:
    """Return text that UTF-8 has bytes for."""
    return text if text is None or text.isascii() else text.encode("utf-8", "backslashreplace").decode()
