"""Images that lie as bytes in the rows of a Parquet file, as Hugging Face and webdataset's converters write them."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from mio_export.sources.blob import Blob, file_of
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, in_order, unreadable

IMAGE_COLUMNS = ("image", "bytes", "jpg", "png")
KEY_COLUMNS = ("key", "__key__", "path", "file_name")
_BATCH_BYTES = 8 << 20
_MOST_BATCH_ROWS = 64
_KEPT_BATCHES = 8
_OPEN_FILES = 4
_STREAM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where images and keys are; nested names have a dot."""

    image: str
    key: str | None
    """None: the rows have numbers only."""


@dataclass(frozen=True, slots=True)
class _Table:
    """What every row of a file has in common."""

    blob: Blob
    column: str
    """That of the bytes."""
    batch_rows: int


@dataclass(frozen=True, slots=True)
class _InParquet:
    table: _Table
    row_group: int
    row: int
    """In its row group."""

    def read(self) -> tuple[bytes, int]:
        """Return its bytes and the time of the file's last change.

        Raises:
            OSError: they cannot be read.
        """
        import pyarrow as pa

        try:
            return _opened(self.table).read(self.row_group, self.row), self.table.blob.mtime_ns
        except pa.ArrowException as error:
            raise OSError(f"damaged in the Parquet file ({_line(error)})") from None


def list_parquet(blob: Blob) -> Listing:
    """List the rows of a Parquet file; every row is an image, whatever its key ends in.

    The images are in the first column of bytes called ``image``, ``bytes``, ``jpg`` or ``png``, or in the field
    ``bytes`` of such a struct; the keys in ``key``, ``__key__``, ``path`` or ``file_name``, else in the struct's field
    ``path``, else they are the rows' numbers. All images are read once, a batch at a time, as only that gives their
    sizes.

    Raises:
        OSError: it cannot be read, is damaged, or has no such column.
    """
    import pyarrow as pa

    try:
        return _listed(blob)
    except pa.ArrowException as error:
        raise OSError(f"not a whole Parquet file ({_line(error)})") from None


def _listed(blob: Blob) -> Listing:
    file = _open(blob)
    columns = _columns(file.schema_arrow, blob.name)
    table = _Table(blob, columns.image, _batch_rows(file.metadata))
    listing, width = Listing(), len(str(max(0, file.metadata.num_rows - 1)))
    files: dict[str, SourceFile] = {}
    number = 0
    for row_group in range(file.metadata.num_row_groups):
        for row, (name, size) in enumerate(_keys_and_sizes(file, row_group, table, columns)):
            key = f"{number:0{width}d}" if name is None else _text(name)
            if key in files:
                listing.replaced[key_of(blob.name)] += 1
            files[key] = _file(key, size, _InParquet(table, row_group, row))
            number += 1
    listing.files = in_order(files)
    return listing


def _file(key: str, size: int | None, place: _InParquet) -> SourceFile:
    mtime_ns = place.table.blob.mtime_ns
    if size is None:
        return unreadable(key, "the row holds no image bytes (null)", mtime_ns=mtime_ns)
    return SourceFile(key=key, place=place, size=size, mtime_ns=mtime_ns)


def _keys_and_sizes(file: Any, row_group: int, table: _Table, columns: _Columns) -> Iterator[tuple[object, int | None]]:
    """Yield key and size of each row; None for what is null."""
    import pyarrow.compute as pc

    names = [table.column] if columns.key is None else [table.column, columns.key]
    for batch in file.iter_batches(table.batch_rows, [row_group], names, use_threads=False):
        sizes = pc.binary_length(_column(batch, table.column)).to_pylist()
        keys = [None] * len(sizes) if columns.key is None else _column(batch, columns.key).to_pylist()
        yield from zip(keys, sizes, strict=True)


def _columns(schema: Any, name: str) -> _Columns:
    import pyarrow as pa

    for column in (column for column in IMAGE_COLUMNS if column in schema.names):
        kind = schema.field(column).type
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        key = next((key for key in KEY_COLUMNS if key in schema.names and key != column), None)
        if _is_bytes(kind):
            return _Columns(column, key)
        if _is_bytes(fields.get("bytes")):
            return _Columns(f"{column}.bytes", key or (f"{column}.path" if "path" in fields else None))
    raise OSError(
        f"{key_of(name)} has no column of image bytes; its columns are {', '.join(schema.names)},"
        f" one of binary type must be called {', '.join(IMAGE_COLUMNS)}"
    )


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _column(batch: Any, name: str) -> Any:
    """Return a column, or the field of one; it is null where its struct is."""
    import pyarrow.compute as pc

    column, _, field = name.partition(".")
    return pc.struct_field(batch.column(column), field) if field else batch.column(column)


def _text(key: object) -> str:
    return key_of(key if isinstance(key, bytes) else str(key))


def _batch_rows(metadata: Any) -> int:
    """Return how many rows to read at once: few of large images."""
    num_bytes = sum(int(metadata.row_group(index).total_byte_size) for index in range(metadata.num_row_groups))
    return max(1, min(_MOST_BATCH_ROWS, _BATCH_BYTES * int(metadata.num_rows) // max(1, num_bytes)))


class _Rows:
    """An open Parquet file: goes forward through a row group, and keeps the last few batches."""

    def __init__(self, table: _Table) -> None:
        self._table = table
        self._file = _open(table.blob)
        self._lock = Lock()
        self._row_group = -1
        self._next_row = 0
        self._batches: Iterator[Any] = iter(())
        self._kept: deque[tuple[int, int, Any]] = deque(maxlen=_KEPT_BATCHES)

    def read(self, row_group: int, row: int) -> bytes:
        """Return the bytes of a row."""
        with self._lock:
            for group, first, column in self._kept:
                if group == row_group and first <= row < first + len(column):
                    return bytes(column[row - first].as_py())
            if row_group != self._row_group or row < self._next_row:
                self._begin(row_group)
            return self._forward(row)

    def _begin(self, row_group: int) -> None:
        table = self._table
        self._batches = self._file.iter_batches(table.batch_rows, [row_group], [table.column], use_threads=False)
        self._row_group, self._next_row = row_group, 0

    def _forward(self, row: int) -> bytes:
        for batch in self._batches:
            column, first = _column(batch, self._table.column), self._next_row
            self._kept.append((self._row_group, first, column))
            self._next_row += len(column)
            if row < self._next_row:
                return bytes(column[row - first].as_py())
        raise OSError(f"row group {self._row_group} ends before its row {row:,}")


@lru_cache(maxsize=_OPEN_FILES)
def _opened(table: _Table) -> _Rows:
    return _Rows(table)


def _open(blob: Blob) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file_of(blob, size=blob.size, buffer_bytes=blob.buffer_bytes), buffer_size=_STREAM_BYTES)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


__all__ = ["list_parquet"]
