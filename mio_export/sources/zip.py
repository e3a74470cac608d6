"""A zip file, whose directory is read once and its members in place; nothing is ever unpacked to the disk."""

import stat
import struct
import zlib
from dataclasses import dataclass

from mio_export.image_formats.supported import image_suffixes
from mio_export.sources.blob import Blob, read_whole
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, check_size, in_order, unreadable
from mio_export.sources.suffixes import suffix_of
from mio_export.sources.zip_directory import ZipEntry, zip_entries

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_IS_ENCRYPTED = 0x1
_STORED, _DEFLATED = 0, 8
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class _InZip:
    """A member, stored or deflated.

    Source: APPNOTE.TXT 6.3.10, sections 4.3.7 and 4.4, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
    """

    blob: Blob
    offset: int
    """Of its local header."""
    packed_size: int
    size: int
    crc: int
    is_deflated: bool
    mtime_ns: int

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return its bytes, which have the length and the checksum that the directory says, and its time.

        Raises:
            OSError: they cannot be read, are not those, are more than ``max_bytes``, or the file changed meanwhile.
        """
        check_size(self.size, max_bytes)
        if not self.is_deflated and self.packed_size != self.size:
            raise _differs()
        magic, name_size, extra_size = _LOCAL_HEADER.unpack(read_whole(self.blob, self.offset, _LOCAL_HEADER.size))
        if magic != _LOCAL_MAGIC:
            raise OSError(f"no zip member begins at byte {self.offset:,}")
        begin = self.offset + _LOCAL_HEADER.size + name_size + extra_size
        data = self._inflated(begin) if self.is_deflated else read_whole(self.blob, begin, self.size)
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise _differs()
        self.blob.check()
        return data, self.mtime_ns

    def _inflated(self, begin: int) -> bytes:
        """Return what a deflated member says, and no more than one byte beyond what it should.

        The packed bytes are read a few MB at a time: they may be many, whatever comes out of them.
        """
        inflate, pieces, missing = zlib.decompressobj(-zlib.MAX_WBITS), [], self.size + 1
        for offset in range(0, self.packed_size, _PIECE_BYTES):
            packed = read_whole(self.blob, begin + offset, min(_PIECE_BYTES, self.packed_size - offset))
            try:
                pieces.append(inflate.decompress(packed, missing))
            except zlib.error as error:
                raise OSError(f"damaged in the zip ({error})") from None
            missing -= len(pieces[-1])
            if missing == 0 or inflate.eof:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def list_zip(blob: Blob) -> Listing:
    """List the images of a zip file; keys are the members' names. Times have no zone there and are taken as UTC.

    Names are those of the directory, byte for byte; a second name in a field of Info-ZIP's is not looked at.

    Raises:
        OSError: it cannot be read, or its directory is missing or damaged.
    """
    listing, suffixes = Listing(), image_suffixes()
    files: dict[str, SourceFile] = {}
    for entry in zip_entries(blob):
        if entry.name.endswith(b"/"):
            continue
        key = key_of(entry.name)
        suffix = suffix_of(key)
        if suffix not in suffixes:
            listing.ignored[suffix] += 1
            continue
        if key in files:
            listing.replaced[key_of(blob.name)] += 1
        files[key] = _file(key, entry, blob)
    listing.files = in_order(files)
    return listing


def _file(key: str, entry: ZipEntry, blob: Blob) -> SourceFile:
    problem = _problem(entry, blob)
    if problem is not None:
        return unreadable(key, problem, size=entry.size, mtime_ns=entry.mtime_ns)
    place = _InZip(
        blob=blob,
        offset=entry.offset,
        packed_size=entry.packed_size,
        size=entry.size,
        crc=entry.crc,
        is_deflated=entry.method == _DEFLATED,
        mtime_ns=entry.mtime_ns,
    )
    return SourceFile(key=key, place=place, size=entry.size, mtime_ns=entry.mtime_ns)


def _problem(entry: ZipEntry, blob: Blob) -> str | None:
    if entry.flags & _IS_ENCRYPTED:
        return "encrypted in the zip"
    if stat.S_ISLNK(entry.mode):
        return "a link in a zip, which is not followed"
    if entry.method not in (_STORED, _DEFLATED):
        return f"compressed by zip method {entry.method}; stored (0) and deflate (8) are read"
    if entry.offset < 0 or entry.packed_size > blob.size:
        return "damaged in the zip (its directory places it outside the file)"
    return None


def _differs() -> OSError:
    return OSError("damaged in the zip (its length or checksum differs)")


__all__ = ["list_zip"]
