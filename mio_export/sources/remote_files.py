"""The bytes of files behind URLs: whole, or by ranges."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from mio_export.sources.keys import key_of
from mio_export.sources.limited import read_limited, read_up_to
from mio_export.sources.listing import check_size
from mio_export.sources.remote_info import (
    OBJECT_STORES,
    WEB,
    asked,
    looked_up,
    mtime_of,
    protocols,
    size_of,
    version_of,
)

_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class RemoteBlob:
    """A file behind a URL, read by ranges; it is an error to read it after it changed, as positions may be wrong."""

    filesystem: Any
    path: str
    name: str
    size: int
    mtime_ns: int
    version: tuple[str, ...]
    """As ``version_of`` had it when it was listed."""
    buffer_bytes: int = _BUFFER_BYTES

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends.

        Raises:
            OSError: they cannot be read, or the server gives others than were asked for.
        """
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        data = asked(lambda: self._range(offset, end))
        if len(data) != end - offset:
            raise OSError(
                f"{key_of(self.name)}: asked for {end - offset:,} bytes, got {len(data):,}; it must serve ranges"
            )
        return data

    def _range(self, offset: int, end: int) -> bytes:
        if not protocols(self.filesystem) & WEB:
            return bytes(self.filesystem.cat_file(self.path, start=offset, end=end))
        # as a stream: a server that knows no ranges would send all of it
        headers = {**self.filesystem.kwargs.get("headers", {}), "Range": f"bytes={offset}-{end - 1}"}
        with self.filesystem.open(self.path, "rb", block_size=0, size=self.size, headers=headers) as file:
            return read_up_to(file, end - offset + 1)

    def check(self) -> None:
        """Look again, after reading: then what was read is of the version that was listed.

        Raises:
            OSError: the file changed, or the server no longer tells.
        """
        if version_of(looked_up(self.filesystem, self.path)) != self.version:
            raise OSError(f"{key_of(self.name)} changed since it was listed; run it again")


@dataclass(frozen=True, slots=True, eq=False)
class InRemote:
    """A whole file behind a URL."""

    filesystem: Any
    path: str
    size: int | None
    """When it was listed; None where the server does not say."""
    mtime_ns: int
    version: tuple[str, ...]
    """As ``version_of`` had it when it was listed."""

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return its bytes and the time of its last change.

        Raises:
            OSError: it cannot be read, has more than ``max_bytes``, or changes while it is read.
        """
        check_size(self.size or 0, max_bytes)
        data = self._content(max_bytes)
        if self._is_atomic and self.size in (None, len(data)):
            return data, self.mtime_ns
        info = looked_up(self.filesystem, self.path)
        if version_of(info) == self.version and size_of(info) in (None, len(data)):
            return data, self.mtime_ns
        if self._content(max_bytes) != data:
            raise OSError("changes while it is read; run it again")
        return data, mtime_of(info)

    @property
    def _is_atomic(self) -> bool:
        """Whether a file comes in one answer, which is of one version."""
        return bool(protocols(self.filesystem) & (OBJECT_STORES | WEB))

    def _content(self, max_bytes: int | None) -> bytes:
        if max_bytes is None:
            return asked(lambda: bytes(self.filesystem.cat_file(self.path)))
        if protocols(self.filesystem) & WEB or not self.size:
            return asked(lambda: self._streamed(max_bytes))
        # one byte more than there should be shows whether there are more
        ends = [self.size + 1, max_bytes + 1]
        data = b""
        for end in ends:
            data = bytes(asked(partial(self.filesystem.cat_file, self.path, start=0, end=end)))
            if len(data) < end:
                break
        check_size(len(data), max_bytes)
        return data

    def _streamed(self, max_bytes: int) -> bytes:
        """Read on to the end: a server may send more than it says."""
        expected = self.size or 0
        is_web = protocols(self.filesystem) & WEB
        options = {"block_size": 0, "size": expected + 1} if is_web else {}
        with self.filesystem.open(self.path, "rb", **options) as file:
            return read_limited(file, expected, max_bytes)


__all__ = ["InRemote", "RemoteBlob"]
