"""One file whose bytes are read by their positions: an archive on the disk, or a view of one."""

# descriptors, which pathlib lacks

import io
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from mio_export.sources.keys import key_of
from mio_export.sources.listing import check_size

_OPEN_FILES = 64
_LOCAL_BUFFER_BYTES = 8192


class Blob(Protocol):
    """A file that any number of threads read at once."""

    @property
    def name(self) -> str:
        """Its base name."""
        ...

    @property
    def size(self) -> int:
        """Its length in bytes."""
        ...

    @property
    def mtime_ns(self) -> int:
        """Time of its last change; 0 if that is not known."""
        ...

    @property
    def buffer_bytes(self) -> int:
        """How much it pays to read at once."""
        ...

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends.

        Raises:
            OSError: they cannot be read.
        """
        ...

    def check(self) -> None:
        """Make sure that what was read so far is all of one version.

        Raises:
            OSError: the file changed since it was listed, or that cannot be told.
        """
        ...


class Readable(Protocol):
    """What has bytes at positions."""

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer at the end."""
        ...

    def check(self) -> None:
        """Make sure that what was read so far is all of one version; an OSError says that it is not."""
        ...


@dataclass(frozen=True, slots=True)
class LocalBlob:
    """A regular file on the disk; it is an error to read it after it changed, as every position may be wrong by then.

    A few descriptors are kept open for all of them together.
    """

    path: str
    size: int
    mtime_ns: int
    buffer_bytes: int = _LOCAL_BUFFER_BYTES

    @property
    def name(self) -> str:
        """Its base name."""
        return os.path.basename(self.path)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        opened = _opened(self.path, self.size, self.mtime_ns)
        status = os.fstat(opened.descriptor)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise OSError(f"{key_of(self.name)} changed since it was listed; run it again")
        data = os.pread(opened.descriptor, size, offset)
        while 0 < len(data) < size and (more := os.pread(opened.descriptor, size - len(data), offset + len(data))):
            data += more  # one call gives at most 2 GiB
        return data

    def check(self) -> None:
        """Nothing is left to do: each read looks."""


def local_blob(path: str) -> LocalBlob:
    """Return a file to read by positions.

    Raises:
        OSError: it is missing, or not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return LocalBlob(path, status.st_size, status.st_mtime_ns)


class CheckedOnce:
    """A blob that is looked at again only if something was read since; for those who keep what they read."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._is_checked = blob, True

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends."""
        self._is_checked = False
        return self._blob.read_at(offset, size)

    def check(self) -> None:
        """Make sure that what was read so far is all of one version; an OSError says that it is not."""
        if not self._is_checked:
            self._blob.check()
            self._is_checked = True


@dataclass(frozen=True, slots=True)
class BlobRange:
    """An image that lies in one piece in a blob."""

    blob: Readable
    offset: int
    size: int
    mtime_ns: int

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return its bytes and the time of its last change.

        Raises:
            OSError: they cannot be read, end too early, are more than ``max_bytes``, or the blob changed meanwhile.
        """
        check_size(self.size, max_bytes)
        data = read_whole(self.blob, self.offset, self.size)
        self.blob.check()
        return data, self.mtime_ns


def read_whole(blob: Readable, offset: int, size: int) -> bytes:
    """Return exactly ``size`` bytes.

    Raises:
        OSError: there are fewer.
    """
    data = blob.read_at(offset, size)
    if len(data) != size:
        raise OSError(f"{len(data):,} of {size:,} bytes are there")
    return data


def file_of(blob: Readable, *, size: int | None = None, buffer_bytes: int = _LOCAL_BUFFER_BYTES) -> io.BufferedReader:
    """Return a blob as a file that can be sought, for those who read files; ``size`` is needed to seek from the end."""
    return io.BufferedReader(_Positions(blob, size), buffer_bytes)


def unbuffered(blob: Readable, *, size: int) -> io.RawIOBase:
    """Return a blob as a file for those who keep a buffer of their own; what they read is copied once less."""
    return _Positions(blob, size)


class _Positions(io.RawIOBase):
    def __init__(self, blob: Readable, size: int | None) -> None:
        self._blob, self._size, self._position = blob, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            raise io.UnsupportedOperation("its length is not known")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, (self._size or 0) - self._position)
        data = self._blob.read_at(self._position, size)
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # the buffered reader gives no other
        data = self._blob.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _Descriptor:
    """Closed when the last reader is done with it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str, size: int, mtime_ns: int) -> _Descriptor:
    """Open a file; size and time are there so that a file that took its place is opened again."""
    return _Descriptor(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


__all__ = [
    "Blob",
    "BlobRange",
    "CheckedOnce",
    "LocalBlob",
    "Readable",
    "file_of",
    "local_blob",
    "read_whole",
    "unbuffered",
]
