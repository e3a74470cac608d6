"""A zip file, whose directory is read once and its members in place; nothing is ever unpacked to the disk."""

import calendar
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass

from mio_export.formats import image_suffixes
from mio_export.sources.blob import Blob, file_of, read_whole
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, in_order, unreadable
from mio_export.sources.suffixes import suffix_of

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_IS_ENCRYPTED, _IS_UTF8 = 0x1, 0x800
_NS = 1_000_000_000


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

    def read(self) -> tuple[bytes, int]:
        """Return its bytes, which have the length and the checksum that the directory says, and its time.

        Raises:
            OSError: they cannot be read, or are not those.
        """
        magic, name_size, extra_size = _LOCAL_HEADER.unpack(read_whole(self.blob, self.offset, _LOCAL_HEADER.size))
        if magic != _LOCAL_MAGIC:
            raise OSError(f"no zip member begins at byte {self.offset:,}")
        begin = self.offset + _LOCAL_HEADER.size + name_size + extra_size
        packed = read_whole(self.blob, begin, self.packed_size)
        data = _inflated(packed, self.size) if self.is_deflated else packed
        if len(data) != self.size or zlib.crc32(data) != self.crc:
            raise OSError("damaged in the zip (its length or checksum differs)")
        return data, self.mtime_ns


def list_zip(blob: Blob) -> Listing:
    """List the images of a zip file; keys are the members' names. Times have no zone there and are taken as UTC.

    Raises:
        OSError: it cannot be read, or its directory is missing or damaged.
    """
    try:
        with file_of(blob, size=blob.size, buffer_bytes=blob.buffer_bytes) as file, zipfile.ZipFile(file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise OSError(f"not a whole zip file ({error})") from None
    listing, suffixes = Listing(), image_suffixes()
    files: dict[str, SourceFile] = {}
    for info in members:
        key = _key(info)
        if suffix_of(key) not in suffixes:
            listing.ignored[suffix_of(key)] += 1
            continue
        if key in files:
            listing.replaced[key_of(blob.name)] += 1
        files[key] = _file(key, info, blob)
    listing.files = in_order(files)
    return listing


def _file(key: str, info: zipfile.ZipInfo, blob: Blob) -> SourceFile:
    mtime_ns, problem = _mtime_ns(info), _problem(info)
    if problem is not None:
        return unreadable(key, problem, size=info.file_size, mtime_ns=mtime_ns)
    place = _InZip(
        blob=blob,
        offset=info.header_offset,
        packed_size=info.compress_size,
        size=info.file_size,
        crc=info.CRC,
        is_deflated=info.compress_type == zipfile.ZIP_DEFLATED,
        mtime_ns=mtime_ns,
    )
    return SourceFile(key=key, place=place, size=info.file_size, mtime_ns=mtime_ns)


def _problem(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & _IS_ENCRYPTED:
        return "encrypted in the zip"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link in a zip, which is not followed"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by zip method {info.compress_type}; stored (0) and deflate (8) are read"
    return None


def _key(info: zipfile.ZipInfo) -> str:
    """Names without the UTF-8 flag are of no known encoding; their bytes are taken as those of files are."""
    return key_of(info.filename if info.flag_bits & _IS_UTF8 else info.filename.encode("cp437"))


def _mtime_ns(info: zipfile.ZipInfo) -> int:
    try:
        return calendar.timegm((*info.date_time, 0, 0, 0)) * _NS
    except ValueError:  # month 0
        return 0


def _inflated(packed: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return inflate.decompress(packed, size + 1)
    except zlib.error as error:
        raise OSError(f"damaged in the zip ({error})") from None


__all__ = ["list_zip"]
