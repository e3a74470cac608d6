"""Images that lie as bytes in the rows of a Parquet file, as Hugging Face and webdataset's converters write them."""

import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any

from mio_export.errors import one_line
from mio_export.sources.blob import Blob, CheckedOnce, Readable, unbuffered
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, check_size, in_order, unreadable

IMAGE_COLUMNS = ("image", "bytes", "jpg", "png")
KEY_COLUMNS = ("key", "__key__", "path", "file_name")
_BATCH_BYTES = 8 << 20
_MOST_BATCH_ROWS = 64
_KEPT_BATCHES = 8
_KEPT_BYTES = 64 << 20
_OPEN_FILES = 4
_STREAM_BYTES = 1 << 20
_WHOLE_BYTES = 16 << 20
"""Of a file up to this, a column of a row group is read at once; of larger ones, a piece at a time."""
_END_BYTES = 8
_MOST_FOOTER_BYTES = 256 << 20
_MOST_PAGE_BYTES = 1 << 30
"""Arrow is asked for no more by any honest page; a damaged one may claim 2 GiB."""


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

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return its bytes and the time of the file's last change.

        Raises:
            OSError: they cannot be read, are more than ``max_bytes``, or the file changed meanwhile.
        """
        with _errors_of_arrow("damaged in the Parquet file"):
            return _opened(self.table).read(self.row_group, self.row, max_bytes), self.table.blob.mtime_ns


def list_parquet(blob: Blob) -> Listing:
    """List the rows of a Parquet file; every row is an image, whatever its key ends in.

    The images are in the first column of bytes called ``image``, ``bytes``, ``jpg`` or ``png``, or in the field
    ``bytes`` of such a struct; the keys in ``key``, ``__key__``, ``path`` or ``file_name``, else in the struct's field
    ``path``, else they are the rows' numbers. All images are read once, a batch at a time, as only that gives their
    sizes.

    Raises:
        OSError: it cannot be read, is damaged, or has no such column.
    """
    with _errors_of_arrow("not a whole Parquet file"):
        return _listed(blob)


@contextmanager
def _errors_of_arrow(what: str) -> Iterator[None]:
    """Turn what Arrow raises on a damaged file into an OSError; what the file itself raises passes.

    Arrow has exceptions of its own, and Python's for names that are not UTF-8, numbers out of range and the like.
    """
    import pyarrow as pa

    try:
        yield
    except MemoryError as error:  # ArrowMemoryError is one
        if _claimed_bytes(error) <= _MOST_PAGE_BYTES:
            raise
        reason = one_line(error, 200)
    except OSError:
        raise
    except (
        pa.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        AttributeError,
        RecursionError,
        SystemError,
    ) as error:
        reason = one_line(error, 200)
    else:
        return
    raise OSError(f"{what} ({reason})")


def _claimed_bytes(error: MemoryError) -> int:
    """Return how much memory was asked for, if the message says so: "malloc of size 2147483648 failed"."""
    return max((int(number) for number in re.findall(r"\d{1,18}", str(error))), default=0)


def _listed(blob: Blob) -> Listing:
    file = _open(blob, blob)
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
        keys = [None] * len(sizes) if columns.key is None else _names(_column(batch, columns.key))
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


def _names(column: Any) -> list[object]:
    """Return keys; those of text as bytes, as nobody has checked that they are UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type):
        column = column.cast(pa.binary())
    elif pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


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
        self._checked = CheckedOnce(table.blob)
        self._file = _open(table.blob, self._checked)
        self._lock = Lock()
        self._row_group = -1
        self._next_row = 0
        self._batches: Iterator[Any] = iter(())
        self._kept: deque[tuple[int, int, Any]] = deque(maxlen=_KEPT_BATCHES)

    def read(self, row_group: int, row: int, max_bytes: int | None) -> bytes:
        """Return the bytes of a row."""
        with self._lock:
            for group, first, column in self._kept:
                if group == row_group and first <= row < first + len(column):
                    return _bytes(column[row - first], max_bytes)
            if row_group != self._row_group or row < self._next_row:
                self._begin(row_group)
            return _bytes(self._forward(row), max_bytes)

    def _begin(self, row_group: int) -> None:
        table = self._table
        self._batches = self._file.iter_batches(table.batch_rows, [row_group], [table.column], use_threads=False)
        self._row_group, self._next_row = row_group, 0

    def _forward(self, row: int) -> Any:
        first, column = self._next_row, ()  # type: tuple[int, Any]
        try:
            while row >= self._next_row:
                column, first = _column(next(self._batches), self._table.column), self._next_row
                self._keep(first, column)
                self._next_row += len(column)
            self._checked.check()
        except StopIteration:
            raise OSError(f"row group {self._row_group} ends before its row {row:,}") from None
        except BaseException:
            self._row_group = -1  # what has failed cannot go on; the next row begins again
            self._kept.clear()
            raise
        return column[row - first]

    def _keep(self, first: int, column: Any) -> None:
        """Keep a batch for the rows beside it, with as few others as their bytes allow."""
        self._kept.append((self._row_group, first, column))
        while len(self._kept) > 1 and sum(column.nbytes for _, _, column in self._kept) > _KEPT_BYTES:
            self._kept.popleft()


def _bytes(cell: Any, max_bytes: int | None) -> bytes:
    data = cell.as_buffer()
    if data is None:
        raise OSError("the row holds no image bytes (null)")
    check_size(data.size, max_bytes)
    return bytes(data.to_pybytes())


@lru_cache(maxsize=_OPEN_FILES)
def _opened(table: _Table) -> _Rows:
    return _Rows(table)


def _open(blob: Blob, content: Readable) -> Any:
    """Open a file whose bytes are those of ``content``."""
    import pyarrow.parquet as pq

    end = blob.read_at(blob.size - _END_BYTES, _END_BYTES) if blob.size >= _END_BYTES else b""
    if end.endswith(b"PAR1") and (claimed := int.from_bytes(end[:4], "little")) > _MOST_FOOTER_BYTES:
        raise OSError(f"not a whole Parquet file (its footer claims {claimed:,} bytes)")
    # in a stream, Arrow takes what the header of a damaged page claims, up to 2 GiB; of a whole column, what is there
    piece_bytes = _STREAM_BYTES if blob.size > _WHOLE_BYTES else 0
    # with pre_buffer, a whole row group is read before its first row
    return pq.ParquetFile(unbuffered(content, size=blob.size), buffer_size=piece_bytes, pre_buffer=False)


__all__ = ["list_parquet"]
