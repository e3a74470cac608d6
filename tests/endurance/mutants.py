"""Mutants: valid files changed a little, each by its kind and a number, the same in every process."""

import gzip
import hashlib
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import originals
from originals import exif_block, jpegs, json_of, lists, parquets, png_chunk, pngs, tars, tiffs, webps, zips
from PIL import Image

Draw = random.Random
Change = Callable[[bytes, Draw], bytes]

NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
MAGICS = (
    b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08",
    b"RIFF\xff\0\0\0WEBPVP8X", b"BM", b"\0\0\1\0\1\0", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n",
    b"%PDF-1.7", b"8BPS\0\1", b"\x89HDF\r\n\x1a\n", b"GRIB\0\0\0\1", b"BUFR\0\0\0\3", b"\0\0\1\xb3", b"SIMPLE  =",
    b"icns\0\0\0\xff", b"P6 9 9 255\n", b"PK\3\4", b"\x1f\x8b\x08", b"PAR1", b"\0\0\0\x0cjP  \r\n\x87\n",
    b"\0\0\0\x20ftypavif", b"\xd7\xcd\xc6\x9a\0\0",
)  # fmt: skip


def mutant(kind: str, number: int, *, bundle: Path, store: Path) -> tuple[str, bytes]:
    """Return the name and bytes of a mutant.

    Args:
        kind: a key of ``KINDS``.
        number: which one; the same number gives the same bytes.
        bundle: its manifest is what ``manifest`` changes.
        store: its ``store.json`` is what ``store`` changes.
    """
    draw = Draw(f"{kind} {number}")
    if kind in ("manifest", "store"):
        path = bundle / "manifest.json" if kind == "manifest" else store / "store.json"
        return path.name, _json(json_of(path), draw, sealed=kind == "manifest")
    if kind == "exif":
        return _with_exif(_changed(exif_block(draw.choice("<>")), draw, [_ifd]), draw)
    files, changes, suffix = KINDS[kind]
    data = _changed(draw.choice(files()), draw, changes)
    if kind == "tar" and draw.random() < 0.25:
        data = gzip.compress(data, 1, mtime=0)
        return "mutant.tar.gz", _generic(data, draw) if draw.random() < 0.5 else data
    return f"mutant{suffix}", data


def _changed(data: bytes, draw: Draw, changes: Sequence[Change]) -> bytes:
    """Change the structure, or bytes without regard to it, or both."""
    if changes and draw.random() < 0.7:
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            data = draw.choice(changes)(data, draw)
        if draw.random() < 0.8:
            return data
    return _generic(data, draw)


def _generic(data: bytes, draw: Draw) -> bytes:
    return draw.choice((_flip, _flip, _flip, _cut, _repeat, _remove, _number, _number, _magic))(data, draw)


def _flip(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20)) if data else 0):
        changed[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(changed)


def _cut(data: bytes, draw: Draw) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _span(data: bytes, draw: Draw) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 4, 16, 64, 512, 4096)))


def _repeat(data: bytes, draw: Draw) -> bytes:
    start, end = _span(data, draw)
    return data[:end] + data[start:end] * draw.choice((1, 1, 2, 50)) + data[end:]


def _remove(data: bytes, draw: Draw) -> bytes:
    start, end = _span(data, draw)
    return data[:start] + data[end:]


def _number(data: bytes, draw: Draw) -> bytes:
    """Write a number at the edge of its type."""
    size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
    value = (draw.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, order)
    start = draw.randrange(max(1, len(data) - size))
    return data[:start] + value + data[start + size :]


def _magic(data: bytes, draw: Draw) -> bytes:
    magic = draw.choice(MAGICS)
    return magic + data[draw.choice((0, len(magic))) :]


def _ifd(data: bytes, draw: Draw) -> bytes:
    """Change an entry of a TIFF structure's first directory: tag, type, count, value, or the next directory's place."""
    order = ">" if data[:2] == b"MM" else "<"
    changed = bytearray(data)
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
        entry = start + 2 + 12 * draw.randrange(max(1, min(count, 60)))
        match draw.randrange(7):
            case 0:
                struct.pack_into(order + "H", changed, entry, draw.choice((*_TAGS, draw.randrange(65536))))
            case 1 | 2:
                struct.pack_into(order + "H", changed, entry + 2, draw.choice((*range(19), 255, 65535)))
            case 3:
                struct.pack_into(order + "I", changed, entry + 4, draw.choice(NUMBERS) % 2**32)
            case 4:
                struct.pack_into(order + "I", changed, entry + 8, draw.choice((8, start, *NUMBERS)) % 2**32)
            case 5:
                struct.pack_into(order + "d", changed, len(data) - 8, draw.choice((float("nan"), float("inf"), -1e308)))
            case 6:
                struct.pack_into(
                    order + "I", changed, start + 2 + 12 * count, draw.choice((8, start, 2**31, 2**32 - 1))
                )
    except struct.error:
        return _flip(data, draw)
    return bytes(changed)


_TAGS = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 282, 284, 296, 306, 317, 320, 322, 323, 324, 325, 330, 338)
_TAGS += (339, 347, 513, 529, 530, 700, 33432, 34377, 34665, 34675, 34853, 36864, 37121, 37500, 40965, 41486, 50706)


def _with_exif(block: bytes, draw: Draw) -> tuple[str, bytes]:
    """Put an EXIF block into a file that is whole otherwise, so that its image can always be decoded."""
    match draw.randrange(3):
        case 0:
            block = b"Exif\0\0" + block[:65000]
            data = jpegs()[0]
            return "mutant.jpg", data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
        case 1:
            data = pngs()[0]
            return "mutant.png", data[:33] + png_chunk(b"eXIf", block) + data[33:]
        case _:
            file = io.BytesIO()
            Image.open(io.BytesIO(jpegs()[0])).save(file, "WEBP", exif=block, quality=50, method=0)
            return "mutant.webp", file.getvalue()


def _jpeg_segment(data: bytes, draw: Draw) -> bytes:
    """Change a segment: its length, a byte of it, its place, or how often it is there."""
    segments, position = [], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        size = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segments.append(data[position : position + size])
        position += size
    if not segments:
        return _flip(data, draw)
    index = draw.randrange(len(segments))
    segment = bytearray(segments[index])
    match draw.randrange(6):
        case 0 if len(segment) >= 4:
            segment[2:4] = (draw.choice((0, 1, 2, 3, 255, 65535, len(segment)))).to_bytes(2, "big")
        case 1 | 2 if len(segment) > 4:
            segment[draw.randrange(4, len(segment))] = draw.choice((0, 1, 2, 3, 8, 12, 16, 127, 255))
        case 3 if len(segment) > 4:
            segment[1] = draw.choice(
                (0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE)
            )
        case 4:
            segments.insert(draw.randrange(len(segments)), bytes(segment))
        case _:
            segment = bytearray()
    segments[index] = bytes(segment)
    return data[:2] + b"".join(segments) + data[position:]


def _png_chunk(data: bytes, draw: Draw) -> bytes:
    """Change a chunk and give it a right check sum, or move, repeat, drop or add one."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + size]))
        position += 12 + size
    if not chunks:
        return _flip(data, draw)
    index = draw.randrange(len(chunks))
    kind, body = chunks[index]
    match draw.randrange(7):
        case 0 | 1 if body:
            place = draw.randrange(len(body))
            chunks[index] = (
                kind,
                body[:place] + bytes([draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))]) + body[place + 1 :],
            )
        case 2:
            chunks[index] = draw.choice((b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"zTXt")), body
        case 3:
            chunks.insert(draw.randrange(len(chunks) + 1), (kind, body))
        case 4:
            chunks.pop(index)
        case 5:
            text = b"key\0\0" + zlib.compress(bytes(draw.choice((10, 100_000, 3_000_000))), 1)
            added = draw.choice(
                ((b"zTXt", text), (b"iCCP", text), (b"tRNS", bytes(2)), (b"PLTE", bytes(7)), (b"gAMA", b""))
            )
            chunks.insert(1, added)
        case _:
            chunks = [(k, zlib.compress(_generic(_inflated(b), draw)) if k == b"IDAT" else b) for k, b in chunks]
    return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:
        return data


def _riff_chunk(data: bytes, draw: Draw) -> bytes:
    """Change a chunk's name, size or content, or drop or repeat it; the whole's length is right."""
    chunks, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        chunks.append(data[position : position + 8 + size + size % 2])
        position += 8 + size + size % 2
    if not chunks:
        return _flip(data, draw)
    index = draw.randrange(len(chunks))
    chunk = chunks[index]
    match draw.randrange(5):
        case 0:
            chunks[index] = (
                draw.choice((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF", b"ICCP")) + chunk[4:]
            )
        case 1:
            chunks[index] = chunk[:4] + (draw.choice(NUMBERS) % 2**32).to_bytes(4, "little") + chunk[8:]
        case 2:
            chunks[index] = chunk[:8] + _generic(chunk[8:], draw)
        case 3:
            chunks.insert(draw.randrange(len(chunks) + 1), chunk)
        case _:
            chunks.pop(index)
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


_TAR_FIELDS = ((0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
_TAR_VALUES = (
    b"",
    b"\0",
    b"0",
    b"7" * 11,
    b"-1",
    b"8",
    b" 0\0",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"\x80" + bytes(10) + b"\1",
)
_TAR_VALUES += (
    b"../up.png",
    b"/abs.png",
    b"a\0b.png",
    b"\xff\xfe.png",
    b"x" * 100,
    b"a/../b.png",
    b"./",
    b"/",
    b".png",
)
_TAR_TYPES = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"5",
    b"6",
    b"7",
    b"L",
    b"K",
    b"x",
    b"g",
    b"S",
    b"D",
    b"V",
    b"M",
    b"\0",
    b"X",
    b"z",
)


def _tar_header(data: bytes, draw: Draw) -> bytes:
    """Change a field of a header, and give the header a right check sum."""
    headers = [start for start in range(0, len(data) - 511, 512) if data[start + 257 : start + 262] == b"ustar"]
    if not headers:
        return _flip(data, draw)
    start = draw.choice(headers)
    header = bytearray(data[start : start + 512])
    offset, size = draw.choice(_TAR_FIELDS)
    value = draw.choice(_TAR_TYPES if size == 1 else _TAR_VALUES)
    header[offset : offset + size] = value[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


_PAX_VALUES = (
    b"nan",
    b"inf",
    b"-1e400",
    b"1e19",
    b"-5",
    b"",
    b"99999999999999999999",
    b"\xff\xfe.png",
    b"a\0b.png",
    b"../up.png",
)
_PAX_NAMES = (
    b"mtime",
    b"size",
    b"path",
    b"linkpath",
    b"GNU.sparse.name",
    b"GNU.sparse.size",
    b"GNU.sparse.map",
    b"hdrcharset",
)


def _pax_record(data: bytes, draw: Draw) -> bytes:
    """Replace the records of a pax header by one whose length is right, or nearly so."""
    headers = [start for start in range(0, len(data) - 1023, 512) if data[start + 156 : start + 157] in (b"x", b"g")]
    if not headers:
        return _tar_header(data, draw)
    start = draw.choice(headers)
    record = b" " + draw.choice(_PAX_NAMES) + b"=" + draw.choice(_PAX_VALUES) + b"\n"
    length = len(record) + len(str(len(record) + 2)) + draw.choice((0, 0, 0, 0, 1, -1, 10**6))
    record = str(length).encode() + record
    size = b"%011o\0" % len(record)
    header = bytearray(data[start : start + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + record.ljust(512, b"\0") + data[start + 1024 :]


_ZIP_CENTRAL = (
    (4, 2),
    (6, 2),
    (8, 2),
    (10, 2),
    (12, 2),
    (14, 2),
    (16, 4),
    (20, 4),
    (24, 4),
    (28, 2),
    (30, 2),
    (32, 2),
    (42, 4),
)
_ZIP_END = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))
_ZIP_LOCAL = ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))
_ZIP_NAMES = (b"", b"/", b"../up.png", b"/abs.png", b"\xff\xfe.png", b"a\0b.png", b"x.png/", b"\\.png", b"C:\\x.png")


def _zip_field(data: bytes, draw: Draw) -> bytes:
    """Change a number in a member's header, in the directory or at the end."""
    sign, fields = draw.choice(
        ((b"PK\1\2", _ZIP_CENTRAL), (b"PK\1\2", _ZIP_CENTRAL), (b"PK\5\6", _ZIP_END), (b"PK\3\4", _ZIP_LOCAL))
    )
    places = [found.start() for found in re.finditer(re.escape(sign), data)]
    if not places:
        return _flip(data, draw)
    offset, size = draw.choice(fields)
    value = draw.choice((*NUMBERS, 8, 9, 12, 14, 93, 95, 99)) % 2 ** (8 * size)
    start = draw.choice(places) + offset
    return data[:start] + value.to_bytes(size, "little") + data[start + size :]


def _zip_name(data: bytes, draw: Draw) -> bytes:
    """Give a member of the directory another name and extra field, all lengths being right."""
    places = [found.start() for found in re.finditer(rb"PK\x01\x02", data)]
    end = data.rfind(b"PK\5\6")
    if not places or end < 0 or end + 20 > len(data):
        return _flip(data, draw)
    start = draw.choice(places)
    old = sum(struct.unpack_from("<HH", data, start + 28)) if start + 32 <= len(data) else 0
    name = draw.choice(_ZIP_NAMES)
    unicode_path = b"\1" + struct.pack("<I", zlib.crc32(name)) + draw.choice(("é.png".encode(), b"\xff.png", b""))
    extra = draw.choice(
        (b"", struct.pack("<HH", 0x7075, len(unicode_path)) + unicode_path, b"\1\0\xff\xff", b"\x75\x70\1\0")
    )
    header = data[start : start + 28] + struct.pack("<HH", len(name), len(extra)) + data[start + 32 : start + 46]
    grown = len(name) + len(extra) - old
    tail = bytearray(data[end:])
    if len(tail) >= 16:
        struct.pack_into("<I", tail, 12, (struct.unpack_from("<I", tail, 12)[0] + grown) % 2**32)
    return data[:start] + header + name + extra + data[start + 46 + old : end] + bytes(tail)


def _parquet_footer(data: bytes, draw: Draw) -> bytes:
    """Change bytes of the description at the end, or its length."""
    (size,) = struct.unpack("<I", data[-8:-4]) if len(data) > 12 else (0,)
    if not 0 < size < len(data) - 8:
        return _flip(data, draw)
    if draw.random() < 0.1:
        return data[:-8] + struct.pack("<I", draw.choice(NUMBERS) % 2**32) + data[-4:]
    footer = _flip(data[-8 - size : -8], draw)
    return data[: -8 - size] + footer + data[-8:]


_LINES = (
    b"../up.png",
    b"/dev/zero.png",
    b"\xff\xfe.png",
    b"a\0b.png",
    b" .png",
    b"x" * 5000 + b".png",
    b"one.png\0",
    b"~/x.png",
    b".png",
)
_LINES += (
    b"http://127.0.0.1:9/x.png",
    b"file:///x.png",
    b"folder/../one.png",
    b"one.png/x.png",
    b"\r.png",
    b"*.png",
    b"\xef\xbb\xbfone.png",
)


def _line(data: bytes, draw: Draw) -> bytes:
    """Add an odd line, or repeat one."""
    lines = data.split(b"\n")
    lines.insert(draw.randrange(len(lines) + 1), draw.choice((*_LINES, draw.choice(lines))))
    return b"\n".join(lines)


_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    2**200,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "x" * 10_000,
)
_VALUES += (
    "\ud800",
    "../x",
    "/abs",
    "\x1b[31m",
    [],
    {},
    [None],
    {"": 1},
    [[[[]]]],
    {"a": {"b": {}}},
    1.5,
    "1",
    "0" * 64,
)


def _json(data: bytes, draw: Draw, *, sealed: bool) -> bytes:
    """Change values by type, drop, add and repeat keys; a manifest gets a right digest most of the time."""
    if draw.random() < 0.15:
        return _generic(data, draw)
    if draw.random() < 0.02:
        return draw.choice(
            (b"[" * 100_000, b'{"a":' * 100_000, b'{"a":1' + b"0" * 100_000 + b"}", b"", b"null", b"\xff\xfe")
        )
    values = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        _change(values, draw)
    if sealed and isinstance(values, dict) and draw.random() < 0.8:
        rest = {name: value for name, value in values.items() if name != "digest"}
        values["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(values).encode()


def _change(values: Any, draw: Draw) -> None:
    """Walk to some place in nested values and change it there."""
    while True:
        names = list(values) if isinstance(values, dict) else list(range(len(values)))
        if not names:
            return
        name = draw.choice(names)
        inner = values[name]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.8:
            values = inner
            continue
        match draw.randrange(6):
            case 0:
                del values[name]
            case 1 if isinstance(values, dict):
                values["unknown"] = deepcopy(draw.choice(_VALUES))
            case 2 if isinstance(inner, str):
                values[name] = _generic(inner.encode(errors="surrogatepass"), draw).decode(errors="replace")
            case 3 if isinstance(inner, int | float):
                values[name] = draw.choice((-inner, inner + 1, str(inner), inner * 10**9))
            case _:
                values[name] = deepcopy(draw.choice(_VALUES))
        return


KINDS: dict[str, tuple[Callable[[], Sequence[bytes]], Sequence[Change], str]] = {
    "tar": (tars, (_tar_header, _tar_header, _pax_record), ".tar"),
    "zip": (zips, (_zip_field, _zip_field, _zip_name), ".zip"),
    "parquet": (parquets, (_parquet_footer,), ".parquet"),
    "list": (lists, (_line,), ".txt"),
    "jpeg": (jpegs, (_jpeg_segment,), ".jpg"),
    "png": (pngs, (_png_chunk,), ".png"),
    "tiff": (tiffs, (_ifd,), ".tif"),
    "webp": (webps, (_riff_chunk,), ".webp"),
    "exif": (originals.jpegs, (), ".jpg"),
    "manifest": (tuple, (), ".json"),
    "store": (tuple, (), ".json"),
}
ARCHIVES = ("tar", "zip", "parquet", "list")
IMAGES = ("jpeg", "png", "tiff", "webp", "exif")
