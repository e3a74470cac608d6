"""Small valid files of every kind that is fuzzed, the same in every process."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def _picture(mode: str = "RGB", size: tuple[int, int] = (26, 20)) -> Image.Image:
    width, height = size
    ramp = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3)
    return Image.fromarray((ramp * 37 % 251).astype(np.uint8)).convert(mode)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif_block(order: str = "<") -> bytes:
    """A TIFF structure with an orientation, numbers of every type and two sub-directories."""
    entries = [
        (0x010F, 2, b"maker\0"),
        (ORIENTATION, 3, struct.pack(order + "H", 6)),
        (0x011A, 5, struct.pack(order + "II", 72, 1)),
        (0x0128, 3, struct.pack(order + "H", 2)),
        (0x0132, 2, b"2026:01:01 00:00:00\0"),
        (0x8769, 4, struct.pack(order + "I", 0)),
        (0x8825, 4, struct.pack(order + "I", 0)),
        (0x9204, 10, struct.pack(order + "ii", -1, 3)),
        (0xA300, 7, b"\3"),
        (0xC620, 12, struct.pack(order + "d", 1.5)),
    ]
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 10: 8, 12: 8}
    directory, beyond = struct.pack(order + "H", len(entries)), b""
    start = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, value in entries:
        if len(value) > 4:
            field, beyond = struct.pack(order + "I", start + len(beyond)), beyond + value
        else:
            field = value.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, kind, len(value) // sizes[kind]) + field
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + directory + bytes(4) + beyond


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its check sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _interlaced() -> bytes:
    """A PNG of 8 x 8 whose seven passes are written by hand: Pillow writes none."""
    rows = b""
    for left, top, step_x, step_y in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)):
        for _ in range(top, 8, step_y):
            rows += b"\0" + bytes(range(len(range(left, 8, step_x))))
    rows += b"".join(b"\0" + bytes(range(4)) for _ in range(4)) + b"".join(b"\0" + bytes(range(8)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@cache
def jpegs() -> Sequence[bytes]:
    """Baseline, progressive, grey, CMYK, odd sampling, restart markers, with EXIF, of several pictures."""
    photo, exif = _picture(), b"Exif\0\0" + exif_block()
    return (
        _saved(photo, "JPEG"),
        _saved(photo, "JPEG", progressive=True, exif=exif),
        _saved(photo.convert("L"), "JPEG"),
        _saved(photo.convert("CMYK"), "JPEG"),
        _saved(photo, "JPEG", subsampling=0, restart_marker_blocks=1),
        _saved(photo, "JPEG", subsampling=1, comment="x", dpi=(72, 72), exif=b"Exif\0\0" + exif_block(">")),
        _saved(photo, "MPO", save_all=True, append_images=[photo]),
    )


@cache
def pngs() -> Sequence[bytes]:
    """Every colour type, 16 bits, transparency, interlaced, animated, with text and EXIF."""
    photo = _picture()
    grey16 = Image.fromarray((np.arange(26 * 20).reshape(20, 26) * 120).astype(np.uint16))
    info_options = {"exif": exif_block(), "dpi": (72, 72), "icc_profile": b"none"}
    return (
        _saved(photo, "PNG"),
        _saved(photo.convert("RGBA"), "PNG"),
        _saved(photo.quantize(16), "PNG", transparency=3),
        _saved(photo.convert("LA"), "PNG"),
        _saved(photo.convert("1"), "PNG"),
        _saved(grey16, "PNG", transparency=4),
        _saved(photo, "PNG", save_all=True, append_images=[photo.rotate(90)]),
        _saved(photo, "PNG", **info_options),
        _interlaced(),
    )


@cache
def tiffs() -> Sequence[bytes]:
    """Raw and compressed, grey to CMYK, 16 bits, pages, both byte orders."""
    photo = _picture()
    grey16 = Image.fromarray((np.arange(26 * 20).reshape(20, 26) * 120).astype(np.uint16))
    names = ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd")
    compressed = [_saved(photo, "TIFF", compression=name) for name in names]
    return (
        *compressed,
        _saved(photo.convert("1"), "TIFF", compression="group4"),
        _saved(grey16, "TIFF"),
        _saved(photo.convert("CMYK"), "TIFF"),
        _saved(photo, "TIFF", save_all=True, append_images=[photo.convert("L")]),
        _saved(photo, "TIFF", tiffinfo={ORIENTATION: 6, 305: "x", 34665: {}}),
        _big_endian(photo),
        _saved(photo, "TIFF", big_tiff=True),
    )


def _big_endian(photo: Image.Image) -> bytes:
    pixels, (width, height) = photo.convert("L").tobytes(), photo.size
    shorts = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1), (278, height))
    directory = struct.pack(">H", len(shorts) + 2)
    directory += b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in shorts)
    directory += struct.pack(">HHII", 273, 4, 1, 8) + struct.pack(">HHII", 279, 4, 1, len(pixels))
    return b"MM\0*" + struct.pack(">I", 8 + len(pixels)) + pixels + directory + bytes(4)


@cache
def webps() -> Sequence[bytes]:
    """Lossy, lossless, transparent, animated, with EXIF."""
    photo = _picture()
    return (
        _saved(photo, "WEBP"),
        _saved(photo, "WEBP", lossless=True, exif=exif_block()),
        _saved(photo.convert("RGBA"), "WEBP", icc_profile=b"none"),
        _saved(photo, "WEBP", save_all=True, append_images=[photo.rotate(90)]),
    )


MEMBERS = tuple(f"{'n' * (120 if number % 2 else 3)}é{number}.png" for number in range(4))


@cache
def tars() -> Sequence[bytes]:
    """GNU and pax archives: long names, links of both kinds, a folder, times with fractions."""
    return tuple(_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))


def _tar(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for number, name in enumerate(MEMBERS if form != tarfile.USTAR_FORMAT else MEMBERS[::2]):
            info = tarfile.TarInfo(name)
            data = _saved(_picture(size=(8 + number, 8)), "PNG")
            info.size, info.mtime = len(data), 1e9 + 0.5 if form == tarfile.PAX_FORMAT else 10**9
            tar.addfile(info, io.BytesIO(data))
        for kind, name, target in (
            (tarfile.SYMTYPE, "soft.png", MEMBERS[0]),
            (tarfile.LNKTYPE, "hard.png", MEMBERS[2]),
            (tarfile.DIRTYPE, "folder.png", ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return file.getvalue()


@cache
def zips() -> Sequence[bytes]:
    """Stored and deflated, with a comment, and one with zip64 fields."""
    return tuple(
        _zip(*options) for options in ((zipfile.ZIP_STORED, 0), (zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, 1))
    )


def _zip(compression: int, zip64: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for number, name in enumerate(MEMBERS):
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=bool(zip64)) as member:
                member.write(_saved(_picture(size=(8 + number, 8)), "PNG"))
        archive.comment = b"comment"
    return file.getvalue()


@cache
def parquets() -> Sequence[bytes]:
    """Bytes beside keys, bare and compressed, and structs as Hugging Face writes them; several row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [_saved(_picture(size=(8 + number, 8)), "PNG") for number in range(4)]
    tables = (
        (pa.table({"key": list(MEMBERS), "image": images}), {"row_group_size": 2}),
        (pa.table({"image": [{"bytes": data, "path": name} for data, name in zip(images, MEMBERS, strict=True)]}), {}),
        (pa.table({"key": list(MEMBERS), "jpg": images}), {"compression": "zstd", "data_page_version": "2.0"}),
        (pa.table({"bytes": [images[0], None, images[2], images[3]]}), {"use_dictionary": True}),
    )
    files = []
    for table, options in tables:
        file = io.BytesIO()
        pq.write_table(table, file, **options)
        files.append(file.getvalue())
    return tuple(files)


LISTED = ("one.png", "folder/two.png", "three é.png")


@cache
def lists() -> Sequence[bytes]:
    """Lines with comments, blank ones, a missing file, a pipe and a folder among them."""
    lines = [*LISTED, "# comment", "", "./missing.png", "pipe.png", "folder.png", "text.txt"]
    return ("\n".join(lines).encode(), "\ufeff\r\n".join(lines).encode())


def write_listed(folder: Path) -> None:
    """Write what the lists name."""
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "folder.png").mkdir(exist_ok=True)
    for number, name in enumerate(LISTED):
        (folder / name).write_bytes(_saved(_picture(size=(8 + number, 8)), "PNG"))
    if not (folder / "pipe.png").exists():
        os.mkfifo(folder / "pipe.png")


def json_of(path: Path) -> bytes:
    """A JSON file, with its values in one order."""
    return json.dumps(json.loads(path.read_bytes()), indent=1).encode()
