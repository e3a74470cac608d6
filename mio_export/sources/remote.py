"""Files behind URLs, through fsspec: a folder's files, and archives read by positions."""

import importlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from mio_export.errors import MissingBackendError, UsageError
from mio_export.formats import image_suffixes
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, unreadable
from mio_export.sources.suffixes import suffix_of

_BUFFER_BYTES = 1 << 18
_NS = 1_000_000_000
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call the time of the last change; one that they all have is not agreed on."""


@dataclass(frozen=True, slots=True, eq=False)
class RemoteBlob:
    """A file behind a URL, read by ranges."""

    filesystem: Any
    path: str
    name: str
    size: int
    mtime_ns: int
    buffer_bytes: int = _BUFFER_BYTES

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends.

        Raises:
            OSError: they cannot be read, or the server gives others than were asked for.
        """
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        data = _cat(self.filesystem, self.path, start=offset, end=end)
        if len(data) != end - offset:
            raise OSError(f"{self.name}: asked for {end - offset:,} bytes, got {len(data):,}; it must serve ranges")
        return data


@dataclass(frozen=True, slots=True, eq=False)
class InRemote:
    """A whole file behind a URL."""

    filesystem: Any
    path: str
    mtime_ns: int

    def read(self) -> tuple[bytes, int]:
        """Return its bytes and the time of its last change, as it was when it was listed.

        Raises:
            OSError: it cannot be read.
        """
        return _cat(self.filesystem, self.path), self.mtime_ns


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What a URL leads to."""

    filesystem: Any
    """An fsspec file system."""
    path: str
    """What it calls the place."""
    name: str
    """Base name, without a query."""
    info: Mapping[str, Any]

    @property
    def is_folder(self) -> bool:
        """Whether files are below it."""
        return bool(self.info["type"] == "directory")

    def blob(self) -> RemoteBlob:
        """Return it as a file to be read by ranges.

        Raises:
            OSError: its length is not known.
        """
        if self.info.get("size") is None:
            raise OSError("the server does not say its length")
        return RemoteBlob(self.filesystem, self.path, self.name, int(self.info["size"]), _mtime_ns(self.info))

    def find(self, relative: bytes) -> SourceFile:
        """Return the row of a file whose path is relative to the folder that this one lies in."""
        key = key_of(relative)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.path), relative.decode(errors="replace")))
        try:
            info = self.filesystem.info(path)
        except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
            return unreadable(key, f"cannot be examined ({_reason(error)})")
        return _file(self.filesystem, key, path, info)


def open_url(url: str) -> Remote:
    """Find what a URL leads to.

    Raises:
        MissingBackendError: the protocol's package is not installed.
        UsageError: the protocol is not known, there is nothing, or it cannot be reached.
    """
    filesystem, path = _filesystem(url)
    try:
        info = filesystem.info(path)
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        raise UsageError(f"{without_query(url)} cannot be read: {_reason(error)}") from None
    return Remote(filesystem=filesystem, path=path, name=url_name(url), info=info)


def list_remote_folder(remote: Remote) -> Listing:
    """List all files below a folder.

    Raises:
        UsageError: it cannot be listed.
    """
    try:
        found = remote.filesystem.find(remote.path, detail=True)
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        raise UsageError(f"{remote.name} cannot be listed: {_reason(error)}") from None
    listing, suffixes, root = Listing(), image_suffixes(), remote.path.rstrip("/") + "/"
    for path, info in found.items():
        key = key_of(path.removeprefix(root))
        suffix = suffix_of(key)
        if suffix in suffixes:
            listing.files.append(_file(remote.filesystem, key, path, info))
        else:
            listing.ignored[suffix] += 1
    listing.files.sort(key=lambda file: file.key.encode())
    return listing


def is_url(spec: object) -> bool:
    """Whether it is text with a protocol, such as ``s3://bucket/folder``."""
    protocol, mark, _ = spec.partition("://") if isinstance(spec, str) else ("", "", "")
    return bool(mark) and protocol.replace("+", "").replace("-", "").isalnum()


def url_name(url: str) -> str:
    """Return the last part of a URL's path, or its host where there is none."""
    parts = urlsplit(url)
    return unquote(posixpath.basename(parts.path.rstrip("/"))) or parts.hostname or parts.scheme


def without_query(url: str) -> str:
    """Return a URL without what may be secret in it: user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _filesystem(url: str) -> tuple[Any, str]:
    fsspec = importlib.import_module("fsspec")
    protocol = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError:
        known = importlib.import_module("fsspec.registry").known_implementations
        package = known[protocol]["class"].partition(".")[0]
        extra = "http" if protocol == "https" else protocol
        package = f"'fsspec[{extra}]'" if package == "fsspec" else package
        raise MissingBackendError(f"{protocol}:// needs a package: pip install {package}") from None
    except ValueError:
        raise UsageError(
            f"{protocol}:// is not a protocol that fsspec knows; s3, gs, https, memory and file are some of those"
        ) from None
    return filesystem, str(path)


def _file(filesystem: Any, key: str, path: str, info: Mapping[str, Any]) -> SourceFile:
    mtime_ns = _mtime_ns(info)
    if info["type"] != "file":
        return unreadable(key, f"not a regular file ({'folder' if info['type'] == 'directory' else info['type']})")
    place = InRemote(filesystem, path, mtime_ns)
    return SourceFile(key=key, place=place, size=int(info.get("size") or 0), mtime_ns=mtime_ns)


def _mtime_ns(info: Mapping[str, Any]) -> int:
    """Return a time as an integer, however the file system writes it; 0 if it does not say."""
    value = next((info[name] for name in _TIMES if info.get(name) is not None), None)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        return 0
    if isinstance(value, datetime):
        value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return int(value * 1_000_000) * 1000 if isinstance(value, int | float) else 0


def _cat(filesystem: Any, path: str, **bounds: int) -> bytes:
    try:
        return bytes(filesystem.cat_file(path, **bounds))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        raise OSError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]


__all__ = ["InRemote", "Remote", "RemoteBlob", "is_url", "list_remote_folder", "open_url", "url_name", "without_query"]
