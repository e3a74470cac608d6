"""Files behind URLs, through fsspec: a folder's files, and archives read by positions."""

import importlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mio_export.errors import MissingBackendError, UsageError
from mio_export.image_formats.supported import image_suffixes
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, unreadable
from mio_export.sources.remote_files import InRemote, RemoteBlob
from mio_export.sources.remote_info import (
    OBJECT_STORES,
    WEB,
    asked,
    kind_of,
    looked_up,
    mtime_of,
    protocols,
    reason_of,
    size_of,
    version_of,
)
from mio_export.sources.secrets import without_secrets
from mio_export.sources.suffixes import suffix_of


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
        return kind_of(self.info) == "directory"

    def blob(self) -> RemoteBlob:
        """Return it as a file to be read by ranges.

        Raises:
            OSError: its length is not known, or its server does not serve ranges.
        """
        size = size_of(self.info)
        if size is None:
            raise OSError("the server does not say its length")
        if self.info.get("partial") is False:
            raise OSError("the server does not serve ranges of it; copy it here first")
        return RemoteBlob(self.filesystem, self.path, self.name, size, mtime_of(self.info), version_of(self.info))

    def find(self, relative: bytes) -> SourceFile:
        """Return the row of a file whose path is relative to the folder that this one lies in."""
        key = key_of(relative)
        path = self._beside(relative)
        try:
            info = asked(lambda: self.filesystem.info(path))
        except OSError as error:
            return unreadable(key, f"cannot be examined ({error.strerror or error})")
        return _file(self.filesystem, key, path, info)

    def _beside(self, relative: bytes) -> str:
        """Return the path of what a list names; all bytes stand for themselves, and ``..`` for the folder above."""
        root, path, name = "", self.path, relative.decode(errors="surrogateescape")
        if protocols(self.filesystem) & WEB:
            parts = urlsplit(path)
            root, path, name = f"{parts.scheme}://{parts.netloc}", parts.path, quote(relative)
        elif protocols(self.filesystem) & OBJECT_STORES:
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
        info = looked_up(filesystem, path)
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
    is_flat = bool(protocols(remote.filesystem) & OBJECT_STORES)
    try:
        asked(remote.filesystem.invalidate_cache)
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
    """Whether it is text with a protocol, such as ``s3://bucket/folder``, or several as fsspec joins them."""
    protocols, mark, _ = spec.partition("://") if isinstance(spec, str) else ("", "", "")
    return bool(mark) and all(part.replace("+", "").replace("-", "").isalnum() for part in protocols.split("::"))


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
    found = asked(partial(remote.filesystem.find, remote.path, detail=True))
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
            entries = asked(partial(remote.filesystem.ls, folder, detail=True))
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
            if kind_of(info) == "directory":
                folders.append(path)
                continue
            info = _resolved(remote.filesystem, path, info)
            if kind_of(info) == "directory":
                listing.circles.append(f"{key}: a link to a folder behind a URL, not followed")
            else:
                yield key, path, info


def _resolved(filesystem: Any, path: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a link leads to, where the file system says that it is one; itself where that is nothing."""
    if not info.get("islink") and kind_of(info) != "link":
        return info
    try:
        return looked_up(filesystem, path)
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
            reason = f"{without_secrets(url)} is not a URL that can be read: {reason_of(error)}"
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        reason = f"{without_secrets(url)} cannot be read: {reason_of(error)}"
    else:
        return filesystem, str(path)
    raise UsageError(reason)


def _file(filesystem: Any, key: str, path: str, info: Mapping[str, Any]) -> SourceFile:
    mtime_ns, size, kind = mtime_of(info), size_of(info), kind_of(info)
    if kind != "file":
        reason = f"not a regular file ({'folder' if kind == 'directory' else kind})"
        return unreadable(key, reason, size=size or 0, mtime_ns=mtime_ns)
    place = InRemote(filesystem, path, size, mtime_ns, version_of(info))
    return SourceFile(key=key, place=place, size=size or 0, mtime_ns=mtime_ns)


__all__ = ["InRemote", "Remote", "RemoteBlob", "is_url", "list_remote_folder", "open_url", "url_name"]
