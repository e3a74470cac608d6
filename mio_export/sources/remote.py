"""Files behind URLs, through fsspec: a folder's files, and archives read by positions."""

import importlib
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from mio_export.errors import MissingBackendError, UsageError
from mio_export.formats import image_suffixes
from mio_export.secrets import without_secrets
from mio_export.sources.keys import key_of
from mio_export.sources.limited import read_limited
from mio_export.sources.listing import Listing, SourceFile, check_size, known_ns, unreadable
from mio_export.sources.suffixes import suffix_of

_BUFFER_BYTES = 1 << 18
_LONGEST_REASON = 200
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call the time of the last change; one that they all have is not agreed on."""
_TAGS = ("Last-Modified", "ETag", "etag", "Content-MD5", "md5Hash", "crc32c", "generation", "VersionId", "ino")
"""What else differs where a file was replaced, as far as a file system says it."""
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"})
"""Listed flat in a few requests, each of which fails as a whole; and a read gives one version of a file, never two."""
_WEB = frozenset({"http", "https"})
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class RemoteBlob:
    """A file behind a URL, read by ranges; it is an error to read it after it changed, as positions may be wrong."""

    filesystem: Any
    path: str
    name: str
    size: int
    mtime_ns: int
    version: tuple[str, ...]
    """As ``_version`` had it when it was listed."""
    buffer_bytes: int = _BUFFER_BYTES

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the file ends.

        Raises:
            OSError: they cannot be read, or the server gives others than were asked for.
        """
        end = min(offset + size, self.size)
        if offset >= end:
            return b""
        data = _asked(lambda: bytes(self.filesystem.cat_file(self.path, start=offset, end=end)))
        if len(data) != end - offset:
            raise OSError(
                f"{key_of(self.name)}: asked for {end - offset:,} bytes, got {len(data):,}; it must serve ranges"
            )
        return data

    def check(self) -> None:
        """Look again, after reading: then what was read is of the version that was listed.

        Raises:
            OSError: the file changed, or the server no longer tells.
        """
        if _version(_looked_up(self.filesystem, self.path)) != self.version:
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
    """As ``_version`` had it when it was listed."""

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return its bytes and the time of its last change.

        Raises:
            OSError: it cannot be read, has more than ``max_bytes``, or changes while it is read.
        """
        check_size(self.size or 0, max_bytes)
        data = self._content(max_bytes)
        if self._is_atomic and self.size in (None, len(data)):
            return data, self.mtime_ns
        info = _looked_up(self.filesystem, self.path)
        if _version(info) == self.version and _size(info) in (None, len(data)):
            return data, self.mtime_ns
        if self._content(max_bytes) != data:
            raise OSError("changes while it is read; run it again")
        return data, _mtime_ns(info)

    @property
    def _is_atomic(self) -> bool:
        """Whether a file comes in one answer, which is of one version."""
        return bool(_protocols(self.filesystem) & (_OBJECT_STORES | _WEB))

    def _content(self, max_bytes: int | None) -> bytes:
        if max_bytes is None:
            return _asked(lambda: bytes(self.filesystem.cat_file(self.path)))
        if _protocols(self.filesystem) & _WEB or not self.size:
            return _asked(lambda: self._streamed(max_bytes))
        # one byte more than there should be shows whether there are more
        ends = [self.size + 1, max_bytes + 1]
        data = b""
        for end in ends:
            data = bytes(_asked(partial(self.filesystem.cat_file, self.path, start=0, end=end)))
            if len(data) < end:
                break
        check_size(len(data), max_bytes)
        return data

    def _streamed(self, max_bytes: int) -> bytes:
        """Read on to the end: a server may send more than it says."""
        expected = self.size or 0
        is_web = _protocols(self.filesystem) & _WEB
        options = {"block_size": 0, "size": expected + 1} if is_web else {}
        with self.filesystem.open(self.path, "rb", **options) as file:
            return read_limited(file, expected, max_bytes)


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
        return _kind(self.info) == "directory"

    def blob(self) -> RemoteBlob:
        """Return it as a file to be read by ranges.

        Raises:
            OSError: its length is not known, or its server does not serve ranges.
        """
        size = _size(self.info)
        if size is None:
            raise OSError("the server does not say its length")
        if self.info.get("partial") is False:
            raise OSError("the server does not serve ranges of it; copy it here first")
        return RemoteBlob(self.filesystem, self.path, self.name, size, _mtime_ns(self.info), _version(self.info))

    def find(self, relative: bytes) -> SourceFile:
        """Return the row of a file whose path is relative to the folder that this one lies in."""
        key = key_of(relative)
        path = self._beside(relative)
        try:
            info = _asked(lambda: self.filesystem.info(path))
        except OSError as error:
            return unreadable(key, f"cannot be examined ({error.strerror or error})")
        return _file(self.filesystem, key, path, info)

    def _beside(self, relative: bytes) -> str:
        """Return the path of what a list names; all bytes stand for themselves, and ``..`` for the folder above."""
        root, path, name = "", self.path, relative.decode(errors="surrogateescape")
        if _protocols(self.filesystem) & _WEB:
            parts = urlsplit(path)
            root, path, name = f"{parts.scheme}://{parts.netloc}", parts.path, quote(relative)
        elif _protocols(self.filesystem) & _OBJECT_STORES:
            bucket, _, path = path.partition("/")
            root, name = f"{bucket}/", name.removeprefix("/")
            path = "" if relative.startswith(b"/") else path
        return root + _without_dots(posixpath.join(posixpath.dirname(path), name))


def open_url(url: str) -> Remote:
    """Find what a URL leads to, as it is now.

    Raises:
        MissingBackendError: the protocol's package is not installed.
        UsageError: the protocol is not known, there is nothing, or it cannot be reached.
    """
    filesystem, path = _filesystem(url)
    try:
        info = _looked_up(filesystem, path)
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        return Remote(filesystem=filesystem, path=path, name=url_name(url), info=info)
    raise UsageError(f"{without_secrets(url)} cannot be read: {reason}")


def list_remote_folder(remote: Remote) -> Listing:
    """List all files below a folder; a folder in it that cannot be listed is among ``unlisted``.

    Raises:
        UsageError: it cannot be listed.
    """
    listing, suffixes = Listing(), image_suffixes()
    is_flat = bool(_protocols(remote.filesystem) & _OBJECT_STORES)
    try:
        _asked(remote.filesystem.invalidate_cache)
        for key, path, info in _flat(remote) if is_flat else _walk(remote, listing):
            suffix = suffix_of(key)
            if suffix in suffixes:
                listing.files.append(_file(remote.filesystem, key, path, info))
            else:
                listing.ignored[suffix] += 1
    except OSError as error:
        reason = error.strerror or str(error)
    else:
        listing.files.sort(key=lambda file: file.key.encode())
        listing.unlisted.sort()
        return listing
    raise UsageError(f"{without_secrets(remote.name)} cannot be listed: {reason}")


def is_url(spec: object) -> bool:
    """Whether it is text with a protocol, such as ``s3://bucket/folder``."""
    protocol, mark, _ = spec.partition("://") if isinstance(spec, str) else ("", "", "")
    return bool(mark) and protocol.replace("+", "").replace("-", "").isalnum()


def url_name(url: str) -> str:
    """Return the last part of a URL's path, or its host where there is none."""
    try:
        parts = urlsplit(url)
        return unquote(posixpath.basename(parts.path.rstrip("/"))) or parts.hostname or parts.scheme
    except ValueError:  # brackets that hold no address
        return posixpath.basename(without_secrets(url).rstrip("/"))


def _without_dots(path: str) -> str:
    """Resolve ``.`` and ``..`` as URLs do, never above the root; two slashes stay two, as keys of buckets have them."""
    kept: list[str] = []
    for part in path.split("/"):
        if part == "..":
            kept = kept[:-1] or kept[: path.startswith("/")]
        elif part != ".":
            kept.append(part)
    return "/".join(kept)


def _flat(remote: Remote) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield key, path and description of every file, as one listing gives them."""
    found = _asked(partial(remote.filesystem.find, remote.path, detail=True))
    root = remote.path.rstrip("/") + "/"
    for path, info in found.items():
        yield key_of(path.removeprefix(root)), path, info


def _walk(remote: Remote, listing: Listing) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield key, path and description of every file, folder by folder: fsspec's own walk passes over errors."""
    root = remote.path.rstrip("/") + "/"
    folders = [remote.path]
    while folders:
        folder = folders.pop()
        try:
            entries = _asked(partial(remote.filesystem.ls, folder, detail=True))
        except OSError as error:
            if folder == remote.path:
                raise
            listing.unlisted.append(
                f"{key_of(folder.removeprefix(root))}: cannot be listed ({error.strerror or error})"
            )
            continue
        for info in entries:
            path = str(info["name"])
            if path.rstrip("/") == folder.rstrip("/"):
                continue  # some list a folder in itself
            key = key_of(path.removeprefix(root))
            if _kind(info) == "directory":
                folders.append(path)
                continue
            info = _resolved(remote.filesystem, path, info)
            if _kind(info) == "directory":
                listing.circles.append(f"{key}: a link to a folder behind a URL, not followed")
            else:
                yield key, path, info


def _resolved(filesystem: Any, path: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a link leads to, where the file system says that it is one; itself where that is nothing."""
    if not info.get("islink"):
        return info
    try:
        return _looked_up(filesystem, path)
    except OSError:
        return info


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
    except ValueError as error:
        reason = f"{protocol}:// is not a protocol that fsspec knows; s3, gs, https, memory and file are some of those"
        if "Protocol not known" not in str(error):
            reason = f"{without_secrets(url)} is not a URL that can be read: {_reason(error)}"
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        reason = f"{without_secrets(url)} cannot be read: {_reason(error)}"
    else:
        return filesystem, str(path)
    raise UsageError(reason)


def _looked_up(filesystem: Any, path: str) -> Mapping[str, Any]:
    """Return a description as it is now, not as a listing had it that the file system still remembers.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """

    def look() -> Mapping[str, Any]:
        filesystem.invalidate_cache(path)
        return filesystem.info(path)  # type: ignore[no-any-return]

    return _asked(look)


def _file(filesystem: Any, key: str, path: str, info: Mapping[str, Any]) -> SourceFile:
    mtime_ns, size, kind = _mtime_ns(info), _size(info), _kind(info)
    if kind != "file":
        reason = f"not a regular file ({'folder' if kind == 'directory' else kind})"
        return unreadable(key, reason, size=size or 0, mtime_ns=mtime_ns)
    place = InRemote(filesystem, path, size, mtime_ns, _version(info))
    return SourceFile(key=key, place=place, size=size or 0, mtime_ns=mtime_ns)


def _kind(info: Mapping[str, Any]) -> str:
    return str(info.get("type", "file"))


def _size(info: Mapping[str, Any]) -> int | None:
    try:
        return max(0, int(info["size"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _version(info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells a version of a file from another; weak tags may differ from server to server."""
    tags = (f"{name} {info[name]}" for name in _TAGS if info.get(name) is not None)
    return f"{_size(info)} {_time(info)}", *(tag for tag in tags if " W/" not in tag)


def _time(info: Mapping[str, Any]) -> Any:
    return next((info[name] for name in _TIMES if info.get(name) is not None), None)


def _mtime_ns(info: Mapping[str, Any]) -> int:
    """Return a time as an integer, however the file system writes it; 0 if it does not say."""
    value = _time(info)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return known_ns(int(value * 1_000_000) * 1000) if isinstance(value, int | float) else 0
    except (ValueError, OverflowError):  # no date, or none that Python can count
        return 0


def _protocols(filesystem: Any) -> frozenset[str]:
    protocol = getattr(filesystem, "protocol", ())
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)


def _asked(call: Callable[[], T]) -> T:
    """Return what a file system gives.

    Raises:
        OSError: whatever it raised, without what may be secret; the exception itself, which says it, is let go.
    """
    try:
        return call()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        reason = _reason(error)
    raise OSError(reason)


def _reason(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)
    text = without_secrets(" ".join(text.split()))[:_LONGEST_REASON]
    return text.encode(errors="backslashreplace").decode()  # a file's name may hold what is no UTF-8


__all__ = ["InRemote", "Remote", "RemoteBlob", "is_url", "list_remote_folder", "open_url", "url_name"]
