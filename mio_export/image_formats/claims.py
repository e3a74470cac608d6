"""How large an image says that it is, for formats whose pixels take memory before Pillow lets anyone look."""

import io
import struct
from collections.abc import Iterator

from PIL import IcnsImagePlugin, IcoImagePlugin, Image


def claimed_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield width and height of each picture that opening or loading a WebP, ICO or ICNS file unpacks.

    Of other formats nothing is yielded: Pillow gives their size before it takes any memory for them. Of a file that
    is damaged nothing is either: Pillow does not open it.
    """
    try:
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = webp_size(data)
            yield from [size] if size else []
        elif data[:4] == b"\0\0\1\0":
            yield from _ico_sizes(data)
        elif data[:4] == b"icns":
            yield from _icns_sizes(data)
    except (SyntaxError, IndexError, TypeError, ValueError, OSError, struct.error):
        return


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a WebP file's canvas; None if its header does not say."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L" and head[0] == 0x2F:
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _ico_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the size that the picture itself gives; the directory, of one byte a side, often lies."""
    entries = IcoImagePlugin.IcoFile(io.BytesIO(data)).entry
    if entries:
        yield from _size_of(data[entries[0].offset :], ("PNG", "DIB"))  # the one that Pillow takes


def _icns_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    icns = IcnsImagePlugin.IcnsFile(io.BytesIO(data))
    for kind, _ in icns.SIZES[icns.bestsize()]:
        if kind in icns.dct:
            start, length = icns.dct[kind]
            yield from _size_of(data[start : start + length], ("PNG", "JPEG2000"))


def _size_of(data: bytes, formats: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    with Image.open(io.BytesIO(data), formats=formats) as image:
        yield image.width, image.height // 2 if image.format == "DIB" else image.height


__all__ = ["claimed_sizes", "webp_size"]
