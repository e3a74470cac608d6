"""The central directory of a zip file: the raw bytes of each name, whatever Python's version makes of them.

Source: APPNOTE.TXT 6.3.10, sections 4.3.12 to 4.3.16 and 4.5.3,
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import calendar
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mio_export.sources.blob import Blob, file_of, read_whole

_ENTRY = struct.Struct("<4s4x4H3L3H4xLL")
_ENTRY_MAGIC = b"PK\x01\x02"
_END = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sLQL")
_LOCATOR_MAGIC = b"PK\x06\x07"
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_MAGIC = b"PK\x06\x06"
_FIELD = struct.Struct("<HH")
_IS_64 = 0xFFFFFFFF
_SIZES_64 = 0x0001
_LONGEST_COMMENT = 0xFFFF
_PIECE_BYTES = 4 << 20
_NS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipEntry:
    """What the directory says of one member."""

    name: bytes
    """Up to its first null byte."""
    flags: int
    method: int
    mtime_ns: int
    """Its local time, taken as UTC; 0 where it is no date."""
    crc: int
    packed_size: int
    size: int
    mode: int
    """Of the file on Unix, 0 elsewhere."""
    offset: int
    """Of its local header in the file; negative where the directory is damaged."""


def zip_entries(blob: Blob) -> Iterator[ZipEntry]:
    """Yield the members in the order of the directory, folders included.

    Raises:
        OSError: the file cannot be read, or its directory is missing or damaged.
    """
    end, tail_offset, tail = _find_end(blob)
    size, offset, length_64 = _place(blob, end, tail_offset, tail)
    location = tail_offset + end
    start = location - length_64 - size
    if start < 0:
        raise _damaged("its directory would begin before the file")
    # a piece at a time: a damaged end record may claim all of a large file for the directory
    with file_of(blob, size=blob.size, buffer_bytes=max(1, min(size, _PIECE_BYTES))) as file:
        file.seek(start)
        while file.tell() < start + size:
            yield _entry(file, start - offset)


def _find_end(blob: Blob) -> tuple[int, int, bytes]:
    """Return where the end record begins in the last bytes of the file, where those begin, and the bytes."""
    needed = _END.size + _LONGEST_COMMENT + _LOCATOR.size + _END_64.size
    offset = max(0, blob.size - needed)
    tail = read_whole(blob, offset, blob.size - offset)
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != _END_MAGIC or tail[-2:] != b"\0\0":
        end = tail.rfind(_END_MAGIC, max(0, end - _LONGEST_COMMENT))
    if end < 0 or end + _END.size > len(tail):
        raise _damaged("no directory at its end")
    return end, offset, tail


def _place(blob: Blob, end: int, tail_offset: int, tail: bytes) -> tuple[int, int, int]:
    """Return the directory's length, its offset as the file has it, and the length of what follows it but the end."""
    *_, size, offset, _ = _END.unpack_from(tail, end)
    length_64 = _LOCATOR.size + _END_64.size
    if end < length_64 or tail[end - _LOCATOR.size : end - _LOCATOR.size + 4] != _LOCATOR_MAGIC:
        return size, offset, 0
    _, disk, _, disks = _LOCATOR.unpack_from(tail, end - _LOCATOR.size)
    if disk != 0 or disks > 1:
        raise _damaged("a part of several")
    record = _END_64.unpack_from(tail, end - length_64)
    if record[0] != _END_64_MAGIC:
        return size, offset, 0
    return record[8], record[9], length_64


def _entry(file: BinaryIO, shift: int) -> ZipEntry:
    """Read an entry; offsets in it are off by ``shift``."""
    head = file.read(_ENTRY.size)
    if len(head) < _ENTRY.size or head[:4] != _ENTRY_MAGIC:
        raise _damaged(f"no entry at byte {file.tell() - len(head):,} of it, where its directory should continue")
    _, flags, method, time, date, crc, packed_size, size, num_name, num_extra, num_comment, attributes, offset = (
        _ENTRY.unpack(head)
    )
    rest = file.read(num_name + num_extra + num_comment)
    if _IS_64 in (packed_size, size, offset):
        extra = rest[num_name : num_name + num_extra]
        size, packed_size, offset = _sizes_64(extra, size, packed_size, offset)
    return ZipEntry(
        name=rest[:num_name].partition(b"\0")[0],
        flags=flags,
        method=method,
        mtime_ns=_mtime_ns(date, time),
        crc=crc,
        packed_size=packed_size,
        size=size,
        mode=attributes >> 16,
        offset=offset + shift,
    )


def _sizes_64(extra: bytes, *values: int) -> Iterator[int]:
    """Yield size, packed size and offset, each from the field of 64-bit numbers where it does not fit in 32 bits."""
    numbers = _field(extra, _SIZES_64)
    for value in values:
        if value == _IS_64 and len(numbers) >= 8:
            value, numbers = int.from_bytes(numbers[:8], "little"), numbers[8:]
        yield value


def _field(extra: bytes, wanted: int) -> bytes:
    while len(extra) >= _FIELD.size:
        kind, length = _FIELD.unpack_from(extra)
        if kind == wanted:
            return extra[_FIELD.size : _FIELD.size + length]
        extra = extra[_FIELD.size + length :]
    return b""


def _mtime_ns(date: int, time: int) -> int:
    parts = ((date >> 9) + 1980, date >> 5 & 0xF, date & 0x1F, time >> 11, time >> 5 & 0x3F, (time & 0x1F) * 2)
    try:
        return calendar.timegm((*parts, 0, 0, 0)) * _NS
    except ValueError:  # month 0
        return 0


def _damaged(what: str) -> OSError:
    return OSError(f"not a whole zip file ({what})")


__all__ = ["ZipEntry", "zip_entries"]
