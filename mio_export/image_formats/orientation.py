"""Which way up an image lies, from its EXIF block or its XMP.

Nothing but the orientation is read: other values of the block may be anything, and of any size. Of a block that is
damaged the orientation is found, or not, where Pillow's own reader finds it.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any

_TAG = 0x0112
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_HEADERS = {b"II*\0": "<", b"MM\0*": ">", b"II\0*": "<", b"MM*\0": ">"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes of a value by its TIFF type; entries of other types are skipped."""
_NUMBERS = {3: "H", 4: "L", 5: "LL", 6: "b", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q"}
_XMP = re.compile(rb'tiff:Orientation(="|>)([0-9])')


def orientation_of(info: Mapping[Any, Any]) -> int:
    """Return the orientation of an image, 1 to 8, as EXIF numbers them.

    The first orientation entry of the EXIF block counts; without one, that of the XMP does. What is odd or cut off is
    1: the image is taken as it lies, as viewers do.

    Args:
        info: what Pillow read beside the pixels.
    """
    try:
        value = _in_exif(_exif_block(info))
        if value is None:
            value = _in_xmp(info)
    except (struct.error, ValueError, TypeError, OverflowError):
        return 1
    return int(value) if value in range(2, 9) else 1


def split_exif(data: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG file without its EXIF block, and the block; any other file as it is, and nothing."""
    place, kept, block = 2, [data[:2]], b""
    while data.startswith(b"\xff\xd8\xff") and place + 4 <= len(data) and data[place] == 0xFF:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == _START_OF_SCAN:
            break
        if data[place + 1] == _APP1 and data[place + 4 : place + 10] == b"Exif\0\0":
            block = block or data[place + 4 : end]
        else:
            kept.append(data[place:end])
        place = end
    return (b"".join(kept) + data[place:], block) if block else (data, b"")


def _exif_block(info: Mapping[Any, Any]) -> bytes:
    """Return the block as a TIFF file; old PNG writers put it into text, in hexadecimal."""
    block = info.get("exif")
    if block is None and (text := info.get("Raw profile type exif")):
        block = bytes.fromhex("".join(text.split("\n")[3:]))
    return re.sub(rb"^(Exif\0\0){1,2}", b"", block) if isinstance(block, bytes) else b""


def _in_exif(block: bytes) -> float | None:
    if not block:
        return None
    if block[:4] not in _HEADERS:
        raise ValueError("not a TIFF header")
    order = _HEADERS[block[:4]]
    place = int(struct.unpack_from(f"{order}L", block, 4)[0])
    if place + 2 > len(block):
        return None
    (count,) = struct.unpack_from(f"{order}H", block, place)
    outside_bytes, seen = 0, set()
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        if entry + 12 > len(block):
            return None
        tag, kind, number, start = struct.unpack_from(f"{order}HHLL", block, entry)
        size = number * _SIZES.get(kind, 0)
        if tag in seen:
            continue
        if size > 4:
            outside_bytes += size
            if outside_bytes > len(block):
                continue  # an impossible length is skipped
            if start + size > len(block):
                return None  # what is cut off ends the block
        if size and tag == _TAG:
            return _number(order, kind, block, start if size > 4 else entry + 8)
        if size:
            seen.add(tag)
    return None


def _number(order: str, kind: int, block: bytes, start: int) -> float:
    """Return the first number of an entry; 1 if it holds none."""
    if kind not in _NUMBERS:
        return 1
    numbers = struct.unpack_from(f"{order}{_NUMBERS[kind]}", block, start)
    if len(numbers) == 1:
        return float(numbers[0])
    return float(numbers[0] / numbers[1]) if numbers[1] else 1


def _in_xmp(info: Mapping[Any, Any]) -> int:
    text = info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    match = _XMP.search(text.encode(errors="replace") if isinstance(text, str) else text)
    return int(match[2]) if match else 1


__all__ = ["orientation_of", "split_exif"]
