"""The rows of a store that count, the last of each key, batch by batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mio_export.layouts.dtype import Cast
from mio_export.store import FAILED, Snapshot, check_width
from mio_export.store import Shard as StoredShard

BATCH_ROWS = 8192
"""Rows in memory at a time, and the most in a row group."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A committed shard, and which of its rows count."""

    stored: StoredShard
    counts: npt.NDArray[np.bool_]
    """Of each row, whether it is the last of its key."""
    num_rows: int
    """Rows that count."""
    num_vectors: int
    """Among them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of a shard."""

    rows: pa.RecordBatch
    """Rows that count, as they are in the shard."""
    has_vector: npt.NDArray[np.bool_]
    vectors: npt.NDArray[Any]
    """Of the rows that have one, cast, shape (number of them, D)."""


def find_shards(snapshot: Snapshot) -> list[Shard]:
    """Find the rows that count, in little more memory than Arrow needs for the keys.

    Raises:
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
        MioError: a shard changed meanwhile.
    """
    keys: list[pa.ChunkedArray] = []
    has_vector: list[npt.NDArray[np.bool_]] = []
    for stored in snapshot.shards:
        table = snapshot.read(stored, ["key", "status"])
        keys.append(table.column("key"))
        has_vector.append(pc.not_equal(table.column("status"), FAILED).to_numpy())
    if not keys:
        return []
    counts = np.split(_last_of_each(keys), np.cumsum([len(column) for column in keys])[:-1])
    return [
        Shard(stored=stored, counts=mask, num_rows=int(mask.sum()), num_vectors=int((mask & has).sum()))
        for stored, mask, has in zip(snapshot.shards, counts, has_vector, strict=True)
    ]


def _last_of_each(keys: Sequence[pa.ChunkedArray]) -> npt.NDArray[np.bool_]:
    """Return, of every key in all columns, whether it does not come again."""
    # 64-bit offsets: the keys of tens of millions of files are more than 2 GiB
    chunks = [chunk.cast(pa.large_string()) for column in keys for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.large_string()).dictionary_encode()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    rows = np.arange(len(codes))
    last = np.zeros(len(encoded.chunk(0).dictionary), np.int64)
    last[codes] = rows  # of equal codes, numpy keeps the last
    is_last: npt.NDArray[np.bool_] = last[codes] == rows
    return is_last


def read_batches(snapshot: Snapshot, shard: Shard, cast: Cast) -> Iterator[Batch]:
    """Read the rows of a shard that count.

    Raises:
        GateError: it cannot be read, or a vector cannot be cast.
        MioError: it is not the shard that was found.
    """
    dim = snapshot.info.embedding_dim
    with snapshot.opened(shard.stored) as file:
        check_width(shard.stored.path, file.schema_arrow.field("embedding").type, snapshot.info)
        start = 0
        for every in file.iter_batches(BATCH_ROWS):
            rows = every.filter(pa.array(shard.counts[start : start + len(every)]))
            start += len(every)
            has_vector = pc.not_equal(rows["status"], FAILED)
            good = rows.filter(has_vector)
            vectors = good["embedding"].flatten().to_numpy().reshape(len(good), dim)
            yield Batch(
                rows=rows,
                has_vector=has_vector.to_numpy(zero_copy_only=False),
                vectors=cast(vectors, good["key"]),
            )
