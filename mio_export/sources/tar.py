"""A tar file, indexed in one pass and read in place; nothing in it is ever unpacked to the disk."""

import math
import posixpath
import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from mio_export.image_formats.supported import image_suffixes
from mio_export.sources.blob import Blob, BlobRange, file_of
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, in_order, known_ns, unreadable
from mio_export.sources.seekable_gzip import Gunzipped
from mio_export.sources.suffixes import suffix_of
from mio_export.sources.tar_entries import DAMAGES, tar_entries

_GZIP_MAGIC = b"\x1f\x8b"
_MOST_LINKS = 40
"""Links followed in a row, as in Linux."""
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Link:
    target: str


@dataclass(frozen=True, slots=True)
class _Unreadable:
    reason: str
    mtime_ns: int
    size: int = 0


_Entry = BlobRange | _Link | _Unreadable


def list_tar(blob: Blob) -> Listing:
    """List the images of a tar file, compressed with gzip or not.

    Keys are the members' names without a leading ``./``. Links to members are read as what they lead to. Where the file
    is cut or damaged, one failed row says so: that of the member which is cut, else ``NAME#truncated``.

    Raises:
        OSError: its first bytes cannot be read.
    """
    content = Gunzipped(blob) if blob.read_at(0, len(_GZIP_MAGIC)) == _GZIP_MAGIC else blob
    index = _Index(content)
    name, listing = key_of(blob.name), Listing()
    with file_of(content, buffer_bytes=blob.buffer_bytes) as file:
        reason = index.fill(file) or _unended(file)
    if isinstance(content, Gunzipped):
        reason = content.problem or reason
    files = index.images(name, listing)
    if reason is not None:
        listing.unlisted.append(f"{name}: {reason}; what follows is unknown")
        if index.cut not in files:
            key = f"{name}#truncated"
            files[key] = unreadable(key, f"{name}: {reason}", size=blob.size, mtime_ns=blob.mtime_ns)
    listing.files = in_order(files)
    return listing


class _Index:
    """Every member by its name, the last one of each, so that links find what they lead to."""

    def __init__(self, content: Blob | Gunzipped) -> None:
        self.cut: str | None = None
        """Key of the member that the file ends within."""
        self._content = content
        self._entries: dict[str, _Entry] = {}
        self._replaced: list[str] = []

    def fill(self, file: BinaryIO) -> str | None:
        """Take in all members, up to the first damage; return what that was."""
        last: tarfile.TarInfo | None = None
        try:
            for last in tar_entries(file):
                self._add(last)
        except (*DAMAGES, OSError) as error:
            if last is not None:
                self._mark_cut(last)
            return f"cut off or damaged ({error})"
        return None

    def images(self, source: str, listing: Listing) -> dict[str, SourceFile]:
        """Return the rows of the images by key, and count in the listing what else there is."""
        suffixes = image_suffixes()
        files: dict[str, SourceFile] = {}
        for name in self._entries:
            if suffix_of(name) in suffixes:
                files[key_of(name)] = self._file(name)
            else:
                listing.ignored[key_of(suffix_of(name))] += 1
        replaced = sum(suffix_of(name) in suffixes for name in self._replaced)
        if replaced:
            listing.replaced[source] += replaced
        return files

    def _add(self, header: tarfile.TarInfo) -> None:
        name = _plain(header.name)
        if name in self._entries:
            self._replaced.append(name)
        self._entries[name] = self._entry(header)

    def _entry(self, header: tarfile.TarInfo) -> _Entry:
        mtime_ns = _mtime_ns(header)
        if header.issparse():
            return _Unreadable("stored as a sparse file, which is not read in place", mtime_ns)
        if header.isreg():
            return BlobRange(self._content, header.offset_data, header.size, mtime_ns)
        if header.islnk():  # leads to what had that name when it was written
            lost = _Unreadable(f"link to {key_of(header.linkname)}, which is not in the tar before it", mtime_ns)
            return self._entries.get(_plain(header.linkname), lost)
        if header.issym():
            folder = posixpath.dirname(_plain(header.name))
            return _Link(posixpath.normpath(posixpath.join(folder, header.linkname)))
        return _Unreadable("not a regular file in the tar (a device or a pipe)", mtime_ns)

    def _file(self, name: str) -> SourceFile:
        entry, num_links = self._entries[name], 0
        while isinstance(entry, _Link):
            target, num_links = entry.target, num_links + 1
            entry = self._entries.get(target, _Unreadable(f"link to {key_of(target)}, which is not in the tar", 0))
            if num_links > _MOST_LINKS:
                entry = _Unreadable("a link that leads to itself", 0)
        key = key_of(name)
        if isinstance(entry, _Unreadable):
            return unreadable(key, entry.reason, size=entry.size, mtime_ns=entry.mtime_ns)
        return SourceFile(key=key, place=entry, size=entry.size, mtime_ns=entry.mtime_ns)

    def _mark_cut(self, header: tarfile.TarInfo) -> None:
        entry, name = self._entries[_plain(header.name)], _plain(header.name)
        if not isinstance(entry, BlobRange) or entry.size == 0 or not header.isreg():
            return
        if self._content.read_at(entry.offset + entry.size - 1, 1):
            return
        there = max(0, self._content.size - entry.offset)
        reason = f"cut off: {there:,} of {entry.size:,} bytes are there"
        self._entries[name] = _Unreadable(reason, entry.mtime_ns, there)
        self.cut = key_of(name)


def _plain(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _mtime_ns(header: tarfile.TarInfo) -> int:
    return known_ns(int(header.mtime) * _NS) if math.isfinite(header.mtime) else 0


def _unended(file: BinaryIO) -> str | None:
    """Read on behind the end mark, where nothing but zeros belongs."""
    while data := file.read(1 << 16):
        if data.strip(b"\0"):
            return "data follows its end-of-archive marker, as in tar files joined with cat"
    return None


__all__ = ["list_tar"]
