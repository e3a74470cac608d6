"""PNG files, chunk by chunk: check sums, and the texts and profiles, which Pillow limits and pixels do not need."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_LEFT_OUT = (*_TEXTS, b"iCCP")
"""Chunks that no pixel depends on here, and that Pillow refuses above 1 MiB unpacked."""
_ORIENTING = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Keywords of the texts that may say which way up the image lies."""
_MOST_TEXT_BYTES = 16 << 20
"""What is unpacked of such a text; a text that says nothing by then says nothing."""


@dataclass(frozen=True, kw_only=True)
class PngFile:
    """A file whose checksums are right, up to where it ends."""

    data: bytes
    """The file without its texts and its colour profile."""
    info: dict[str, str | bytes]
    """Of its texts, those that may say which way up it lies, as Pillow would put them into ``Image.info``."""
    depth: int
    """Bits of a sample; 0 if the file ends before that."""
    colour: int
    """Colour type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha."""


def read_png(data: bytes) -> PngFile:
    """Take a PNG apart, and compare its check sums: Pillow's decoder stops at the last row, and misses flipped bits.

    A file that ends early is left to the decoder, which knows whether all pixels are there.

    Raises:
        ValueError: a check sum does not fit.
    """
    view = memoryview(data)
    info: dict[str, str | bytes] = {}
    parts: list[memoryview] = []
    start = 0
    for place, kind, length in chunks(data):
        end = place + 12 + length
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]) or end > len(data):
            raise ValueError("a check sum of the PNG does not fit")
        if kind in _LEFT_OUT:
            info |= _orienting(kind, view[place + 8 : end - 4])
            parts.append(view[start:place])
            start = end
    return PngFile(
        data=b"".join([*parts, view[start:]]) if parts else data,
        info=info,
        depth=data[24] if len(data) > 25 else 0,
        colour=data[25] if len(data) > 25 else 0,
    )


def chunks(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield place, type and length of each chunk up to the end, or to the one that is cut off."""
    place = len(MAGIC)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND" or place + 8 + length > len(data):
            return
        yield place, kind, length
        place += 12 + length


def _orienting(kind: bytes, text: memoryview) -> dict[str, str | bytes]:
    """Return what a text says, if it may be about the orientation."""
    keyword = bytes(text[:80]).split(b"\0", 1)[0]
    if kind not in _TEXTS or keyword not in _ORIENTING:
        return {}
    rest, name = text[len(keyword) + 1 :], keyword.decode()
    if kind == b"tEXt":
        value = bytes(rest[:_MOST_TEXT_BYTES])
        return {name: value if name == "exif" else value.decode("latin-1")}
    is_packed = kind == b"zTXt"
    if kind == b"iTXt":
        if len(rest) < 2:
            return {}
        is_packed = rest[0] != 0
        names = bytes(rest[2:4096]).split(b"\0", 2)  # language, keyword in that language
        if len(names) < 3:
            return {}
        rest = rest[4 + len(names[0]) + len(names[1]) :]
    else:
        rest = rest[1:]
    try:
        value = _unpacked(rest) if is_packed else bytes(rest[:_MOST_TEXT_BYTES])
    except zlib.error:
        return {}
    return {name: value.decode("latin-1")}


def _unpacked(data: memoryview) -> bytes:
    return zlib.decompressobj().decompress(data, _MOST_TEXT_BYTES)


__all__ = ["MAGIC", "PngFile", "chunks", "read_png"]
