"""A look at the first bytes of a file: how much work decoding it can be at most, if they tell."""

import struct

from mio_export.image_formats.claims import webp_size
from mio_export.image_formats.png import MAGIC, chunks

_MOST_PIXELS = 1 << 26
"""Larger images are decoded apart from this process, for their memory."""
_MOST_SEGMENTS = 256
_MOST_EXIF_BYTES = 1 << 16
_MOST_CHUNKS = 1 << 16
_PASSES_A_CHUNK = 64
"""Reading the header of a PNG's chunk in Python takes as long as decoding about so many pixels."""


def passes_of(data: bytes) -> int | None:
    """Return how many times a pixel is computed at most while a file is decoded, all pixels together.

    None if the first bytes do not tell: of formats other than JPEG, PNG, still WebP and plain BMP, of images above 67
    megapixels, and of files with unusually many parts.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _of_jpeg(data)
    if data.startswith(MAGIC):
        return _of_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _of_webp(data)
    if data.startswith(b"BM"):
        return _of_bmp(data)
    return None


def _of_jpeg(data: bytes) -> int | None:
    """Pixels by scans: a progressive JPEG may have thousands of scans in a few kilobytes."""
    place, width, height, num_components, exif_bytes = 2, 0, 0, 0, 0
    is_sequential = False
    for _ in range(_MOST_SEGMENTS):
        if place + 10 > len(data) or data[place] != 0xFF:
            return None
        marker, length = data[place + 1], data[place + 2] << 8 | data[place + 3]
        if marker == 0xDA:
            is_one_scan = is_sequential and data[place + 4] == num_components  # libjpeg takes no other then
            scans = 1 if is_one_scan else data.count(b"\xff\xda", place)
            return _passes(width, height, times=scans, parsed=len(data) >> 3)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, num_components = struct.unpack_from(">HHB", data, place + 5)
            is_sequential = marker in (0xC0, 0xC1)
        elif marker == 0xE1:
            exif_bytes += length
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        if length < 2 or exif_bytes > _MOST_EXIF_BYTES:
            return None  # Pillow reads every value of the block, and each may be all of it
        place += 2 + length
    return None


def _of_png(data: bytes) -> int | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    count = 0
    for count, _ in enumerate(chunks(data)):
        if count > _MOST_CHUNKS:
            return None
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    return _passes(width, height, times=2 if depth == 16 else 1, parsed=_PASSES_A_CHUNK * count + (len(data) >> 3))


def _of_webp(data: bytes) -> int | None:
    is_animated = data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)
    size = webp_size(data)
    return None if is_animated or size is None else _passes(*size, times=2)


def _of_bmp(data: bytes) -> int | None:
    if len(data) < 54:
        return None
    header, width, height, _, _, compression = struct.unpack_from("<IiiHHI", data, 14)
    if header not in (40, 108, 124) or compression not in (0, 3):
        return None  # runs of equal pixels are unpacked in Python
    return _passes(width, abs(height), times=1)


def _passes(width: int, height: int, *, times: int, parsed: int = 0) -> int | None:
    return width * height * times + parsed if 0 < width * height <= _MOST_PIXELS else None


__all__ = ["passes_of"]
