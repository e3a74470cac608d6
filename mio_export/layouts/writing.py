"""``write_layout``: a store as Parquet with plain or fixed-size lists, or in clip-retrieval's layout.

Batch by batch: beside the keys, hardly more than a shard is in memory, and no vector becomes Python floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mio_export.errors import MioError, UsageError
from mio_export.files import behind_links, staged_folder
from mio_export.layouts.dtype import Cast, DType
from mio_export.layouts.rows import Batch, Shard, find_shards, read_batches
from mio_export.schema import write_json
from mio_export.store import Snapshot, StoreInfo

Layout: TypeAlias = Literal["fixed-size-list", "list", "clip-retrieval"]
IDENTITY = "identity.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """What was written."""

    info: StoreInfo
    layout: Layout
    dtype: DType
    num_vectors: int
    num_failed: int
    """Keys without a vector: null in Parquet, left out of clip-retrieval's layout."""
    min_cosine: float | None
    """Between a vector and its float16, the least of all; None for float32, which is bit for bit the store's."""

    def summary(self, out: Path) -> list[str]:
        """Return what was written, in words."""
        lines = [f"{out}: {self.num_vectors:,} vectors, {self.layout}, {self.dtype}"]
        if self.num_failed:
            what = "left out" if self.layout == "clip-retrieval" else "kept, with a null embedding"
            lines.append(f"{self.num_failed:,} failed files are {what}")
        if self.min_cosine is not None:
            lines.append(f"cosine of each vector and its float16: at least {self.min_cosine:.8f}")
        return lines


def write_layout(
    store: str | Path, out: str | Path, *, layout: Layout = "fixed-size-list", dtype: DType = "float32"
) -> LayoutResult:
    """Write a store's embeddings in another layout: of each key the row that counts, in the order of the shards.

    ``fixed-size-list`` and ``list`` are a folder of Parquet files with the columns of the store, and the identity of
    the vectors in their metadata. ``clip-retrieval`` is ``img_emb/img_emb_0.npy``, shape (N, D), beside
    ``metadata/metadata_0.parquet``, whose row i (``image_path``, ``sha256``) is that of vector i, one pair for each
    shard; the identity is in ``identity.json`` too.

    Args:
        store: the store's folder; it is only read.
        out: a folder that does not exist; it appears whole or not at all.
        layout: one of the three.
        dtype: of the embeddings.

    Raises:
        UsageError: an argument is not allowed, ``out`` exists, or there is no store.
        GateError: a shard cannot be read, or a value is too large for float16.
        SpaceError: a shard holds vectors of another identity than the store.
        MioError: there is nothing to write, or the store changed meanwhile.
    """
    store, out = Path(store), behind_links(Path(out))
    for name, value, allowed in (("layout", layout, get_args(Layout)), ("dtype", dtype, get_args(DType))):
        if value not in allowed:
            raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if out.exists():
        raise UsageError(f"{out} exists; choose another -o")
    snapshot = Snapshot(store)
    shards = find_shards(snapshot)
    num_rows = sum(shard.num_rows for shard in shards)
    num_vectors = sum(shard.num_vectors for shard in shards)
    if num_vectors == 0:
        raise MioError(f"{store} holds no embeddings; why its files failed: mio inspect {store}")
    cast = Cast(dtype)
    with staged_folder(out, replace=False) as folder:
        if layout == "clip-retrieval":
            _write_clip_retrieval(folder, snapshot, shards, cast)
        else:
            _write_parquet(folder, snapshot, shards, cast, fixed=layout == "fixed-size-list")
    return LayoutResult(
        info=snapshot.info,
        layout=layout,
        dtype=dtype,
        num_vectors=num_vectors,
        num_failed=num_rows - num_vectors,
        min_cosine=cast.min_cosine,
    )


def _write_parquet(folder: Path, snapshot: Snapshot, shards: Sequence[Shard], cast: Cast, *, fixed: bool) -> None:
    info = snapshot.info
    values = pa.from_numpy_dtype(cast.dtype)
    embedding = pa.list_(values, info.embedding_dim) if fixed else pa.list_(values)
    shards = [shard for shard in shards if shard.num_rows]
    width = max(6, len(str(len(shards) - 1)))  # readers take them in the order of their names
    for number, shard in enumerate(shards):
        with snapshot.opened(shard.stored) as file:
            schema = file.schema_arrow
        place = schema.get_field_index("embedding")
        schema = schema.set(place, pa.field("embedding", embedding))
        with _parquet_writer(folder / f"part-{number:0{width}d}.parquet", schema, info) as writer:
            for batch in read_batches(snapshot, shard, cast):
                column = _embeddings(batch, embedding, info.embedding_dim)
                writer.write_batch(batch.rows.set_column(place, "embedding", column))


def _embeddings(batch: Batch, embedding: pa.DataType, dim: int) -> pa.Array:
    """Return the vectors as a column, null where there is none."""
    mask = pa.array(~batch.has_vector)
    if pa.types.is_fixed_size_list(embedding):
        values = np.zeros((len(batch.has_vector), dim), batch.vectors.dtype)
        values[batch.has_vector] = batch.vectors
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=embedding, mask=mask)
    offsets = np.concatenate([[0], np.cumsum(batch.has_vector) * dim])
    values = pa.array(batch.vectors.reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=embedding, mask=mask)


def _write_clip_retrieval(folder: Path, snapshot: Snapshot, shards: Sequence[Shard], cast: Cast) -> None:
    # embedding-reader skips empty .npy files and pairs the others with the metadata in the order of their names: so no
    # pair is empty, and the numbers have leading zeros
    info = snapshot.info
    shards = [shard for shard in shards if shard.num_vectors]
    width = len(str(len(shards) - 1))
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    schema = pa.schema([("image_path", pa.string()), ("sha256", pa.string())])
    for number, shard in enumerate(shards):
        vectors = folder / "img_emb" / f"img_emb_{number:0{width}d}.npy"
        metadata = folder / "metadata" / f"metadata_{number:0{width}d}.parquet"
        header = {
            "descr": np.lib.format.dtype_to_descr(cast.dtype),
            "fortran_order": False,
            "shape": (shard.num_vectors, info.embedding_dim),
        }
        with vectors.open("wb") as file, _parquet_writer(metadata, schema, info) as writer:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in read_batches(snapshot, shard, cast):
                file.write(np.ascontiguousarray(batch.vectors).data)
                rows = batch.rows.filter(pa.array(batch.has_vector))
                writer.write_batch(pa.record_batch([rows["key"], rows["sha256"]], schema))
    described = {"bundle": info.bundle, **info.identity, "normalized": info.normalized, "dtype": cast.dtype.name}
    write_json(folder / IDENTITY, {"schema_version": _SCHEMA_VERSION, **described})


def _parquet_writer(path: Path, schema: pa.Schema, info: StoreInfo) -> pq.ParquetWriter:
    metadata = {f"mio.{name}": value for name, value in info.identity.items()}
    compression = {name: "ZSTD" for name in schema.names if name != "embedding"}  # floats hardly shrink
    return pq.ParquetWriter(
        path, schema.with_metadata(metadata), compression=compression, use_dictionary=["status", "stage", "reason"]
    )
