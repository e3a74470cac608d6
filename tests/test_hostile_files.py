"""A thousand good images among every kind of bad file: one row for each, every good row right, never a traceback."""

import io
import os
import random
import re
import shutil
import stat
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mio_export.runtimes import open_runtime
from mio_export.sample import read_sample
from mio_export.store import load_embeddings, read_rows

DROP_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Corpus:
    """A folder of images, and the keys of its bad files and of its odd but good ones."""

    def __init__(self, folder):
        self.folder, self.bad, self.odd = folder, [], []
        folder.mkdir(parents=True)

    def put(self, name, data, *, is_bad=True):
        """Write a file; its name is text or bytes."""
        name = os.fsencode(name)
        path = os.path.join(os.fsencode(self.folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        self.add(name, is_bad=is_bad)

    def add(self, name, *, is_bad=True):
        key = os.fsencode(name).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
        (self.bad if is_bad else self.odd).append(key)

    def save(self, name, image, *, is_bad=False, **options):
        """Write an image in the format of its suffix."""
        file = io.BytesIO()
        image.copy().save(file, Image.registered_extensions()[os.path.splitext(name)[1].lower()], **options)
        self.put(name, file.getvalue(), is_bad=is_bad)

    def link(self, name, target, *, is_bad=True):
        (self.folder / name).symlink_to(target)
        self.add(name, is_bad=is_bad)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, photo_crops):
    """A corpus of 1,000 good images, and more than 200 bad and odd ones from seeded code."""
    corpus = Corpus(tmp_path_factory.mktemp("hostile") / "src")
    (corpus.folder / "good").mkdir()
    for index, data in enumerate(read_sample("test")):
        (corpus.folder / "good" / f"{index:04d}.png").write_bytes(data)
    draw, photo, other = random.Random(0), photo_crops[0], photo_crops[1]
    for add in (cut_off, damaged, no_images, bombs):
        add(corpus, draw, photo)
    modes(corpus, photo, other)
    names(corpus, (corpus.folder / "whole.png").read_bytes())
    links(corpus)
    for name in ("secret.png", "secret/also.jpg"):
        corpus.put(name, (corpus.folder / "whole.png").read_bytes())
        (corpus.folder / name).chmod(0)
    assert len(corpus.bad) + len(corpus.odd) >= 200
    return corpus.folder, corpus.bad, corpus.odd


def cut_off(corpus, draw, photo):
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp"):
        corpus.save(f"whole.{suffix}", photo)
        data = (corpus.folder / f"whole.{suffix}").read_bytes()
        for share in (1, 10, 50, 90, *draw.sample(range(2, 90), 6)):
            corpus.put(f"cut/{share:02d}-{draw.random():.6f}.{suffix}", data[: len(data) * share // 100])
    for suffix in ("jpg", "png"):
        data = (corpus.folder / f"whole.{suffix}").read_bytes()
        for share in (10, 50, 99):
            corpus.put(f"cut{share}.{suffix}", data[: len(data) * share // 100])


def damaged(corpus, draw, photo):
    """A flipped byte in a PNG's header; Pillow does not look at the checksums of what follows."""
    data = (corpus.folder / "whole.png").read_bytes()
    for number in range(12):
        position = 16 + number
        corpus.put(f"damaged/{number}.png", data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
    head = (corpus.folder / "whole.jpg").read_bytes()[:400]
    for number in range(6):
        corpus.put(f"damaged/{number}.jpg", head + draw.randbytes(300))


def no_images(corpus, draw, photo):
    corpus.put("empty.jpg", b"")
    corpus.put("text.jpg", b"this is not an image")
    for suffix in ("jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "ico", "ppm"):
        corpus.put(f"none/empty.{suffix}", b"")
        corpus.put(f"none/zeros.{suffix}", bytes(1000))
        corpus.put(f"none/noise.{suffix}", b"\xff" + draw.randbytes(999))
    starts = {"page.jpg": b"<!DOCTYPE html><html>404</html>", "archive.png": b"PK\x03\x04", "program.gif": b"\x7fELF"}
    starts |= {"paper.jpg": b"%PDF-1.7", "video.webp": b"\x00\x00\x00\x18ftypmp42", "drawing.png": b"<svg></svg>"}
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{ } loop\nshowpage\n%%EOF\n"
    starts |= {
        "program.jpg": postscript,
        "data.png": b"\x89HDF\r\n\x1a\n" + bytes(99),
        "video.jpg": b"\0\0\1\xb3" + bytes(99),
    }
    starts |= {
        "just-riff.webp": b"RIFF\x10\0\0\0WEBP",
        "just-gif.gif": b"GIF89a",
        "just-magic.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, start in starts.items():
        corpus.put(f"none/{name}", start)


def bombs(corpus, draw, photo):
    corpus.put("bomb.png", png_header(50_000, 50_000))
    for width, height in ((2**31 - 1, 1), (1, 2**31 - 1), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (0, 0), (0, 10)):
        corpus.put(f"bombs/{width}x{height}.png", png_header(width, height))
    corpus.put("bombs/65535.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\0" * 30 + b";")


def modes(corpus, photo, other):
    corpus.save("1x1.png", Image.new("RGB", (1, 1), "red"))
    corpus.save("60000x1.png", Image.linear_gradient("L").resize((60_000, 1)))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        corpus.save(f"modes/{mode}.png", photo.convert(mode))
    for mode in ("CMYK", "L"):
        corpus.save(f"modes/{mode}.jpg", photo.convert(mode))
    for mode in ("CMYK", "YCbCr", "LAB"):
        image = photo if mode != "LAB" else Image.merge("LAB", photo.split())
        corpus.save(f"modes/{mode}.tif", image.convert(mode))
    corpus.save("cmyk.jpg", photo.convert("CMYK"))
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64)
    corpus.save("grey16.png", Image.fromarray(ramp.astype(np.uint16)))
    corpus.save("modes/grey16.tif", Image.fromarray(ramp.astype(np.uint16)))
    corpus.save("modes/int32.tif", Image.fromarray(ramp.astype(np.int32)))
    corpus.save("modes/int32-beyond.tif", Image.fromarray(ramp.astype(np.int32) * 9), is_bad=True)
    corpus.save("modes/float.tif", Image.fromarray(ramp.astype(np.float32)), is_bad=True)
    corpus.save("palette.png", photo.quantize(16), transparency=3)
    for name in ("animated.gif", "animated.webp", "animated.png", "pages.tif"):
        corpus.save(name, photo, save_all=True, append_images=[other.copy(), photo.copy()])
    corpus.save("stereo.mpo", photo, save_all=True, append_images=[other.copy()])
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        corpus.save(f"modes/rotated-{orientation}.jpg", photo, exif=exif)
    corpus.save("modes/broken-exif.jpg", photo, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for suffix in ("jpg", "png"):
        corpus.save(f"modes/profile.{suffix}", photo, icc_profile=profile)
        corpus.save(f"modes/broken-profile.{suffix}", photo, icc_profile=profile[:50] + b"\xff" * 99)


def names(corpus, whole):
    """Good images, all of them."""
    long = "x" * 251 + ".png"
    odd = [
        "with space.png",
        " leading.png",
        "-o.png",
        "--prune.png",
        "with\nnewline.png",
        "tab\t.png",
        "\x1b[31mred.png",
    ]
    odd += [
        "ünïcödé.png",
        "u\u0308.png",
        "\u00fc.png",
        "🦊.png",
        "\u202egnp.png",
        "\ufeff.png",
        "* ?.png",
        "'\".png",
        "%00.png",
    ]
    odd += [
        "#truncated.png",
        "a.tar.png",
        ".hidden.png",
        "UPPER.PNG",
        "back\\slash.png",
        "back\\xff.png",
        "..png.png",
        long,
    ]
    odd += ["a/same.png", "b/same.png", "/".join(["deep" * 20] * 12) + "/x.png", "folder.png/inside.png", "C:\\x.png"]
    odd += [b"not-utf8-\xff.png", b"\xc3.png", b"latin-\xe4\xf6.png", b"\xed\xa0\x80.png", b"\xff/\xfe.png"]
    for name in odd:
        corpus.put(name, whole, is_bad=False)
    for name, seconds in (("year-2318.png", 11_000_000_000), ("year-1906.png", -2_000_000_000)):
        corpus.put(name, whole, is_bad=False)
        os.utime(corpus.folder / name, (seconds, seconds))
    for right, wrong in (
        ("png", "jpg"),
        ("jpg", "png"),
        ("webp", "gif"),
        ("gif", "webp"),
        ("bmp", "tif"),
        ("tif", "bmp"),
    ):
        corpus.put(f"wrong/{right}.{wrong}", (corpus.folder / f"whole.{right}").read_bytes(), is_bad=False)


def links(corpus):
    for name, target in {"dangling.jpg": "nowhere.jpg", "loop.jpg": "loop.jpg", "loop-1.png": "loop-2.png"}.items():
        corpus.link(name, target)
    corpus.link("loop-2.png", "loop-1.png")
    corpus.link("to-bad.png", "text.jpg")
    corpus.link("through-a-file.png", "whole.png/x.png")
    corpus.link("to-a-device.png", "/dev/zero")
    for name, target in {"to-good.png": "whole.png", "to-link.png": "to-good.png"}.items():
        corpus.link(name, target, is_bad=False)
    (corpus.folder / "all-again").symlink_to("good")  # listed once
    os.mkfifo(corpus.folder / "pipe.jpg")
    corpus.add("pipe.jpg")
    corpus.link("to-pipe.png", "pipe.jpg")
    os.mknod(corpus.folder / "socket.png", stat.S_IFSOCK | 0o600)
    corpus.add("socket.png")


def path_of(folder, key):
    """Return the path that a key stands for."""
    name = re.sub(rb"\\(\\|x([0-9a-f]{2}))", lambda m: bytes.fromhex(m[2].decode()) if m[2] else b"\\", key.encode())
    return os.path.join(os.fsencode(folder), name)


def run(bundle, folder, out):
    """Run ``mio embed`` without the right to read every file, which root has."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", "from mio_export.cli.main import main; main()"]
    prefix = DROP_PRIVILEGES if os.geteuid() == 0 else []
    arguments = ["embed", str(bundle.path), str(folder), "-o", str(out), "--shard-size", "100"]
    return subprocess.run(
        [*prefix, *command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )  # a pipe that is opened would hang until the timeout


def is_plain(reason):
    """Whether a person understands why a file failed: some words in one line, no bare or internal name."""
    assert re.fullmatch(r"[^\n]{12,200}", reason), reason
    assert len(reason.split()) >= 4, reason
    return not re.search(r"0x[0-9a-f]{6}|object at|Traceback|<class", reason)


def test_one_row_per_file_and_every_good_row_right(bundle, hostile, tmp_path):
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.fail("root can read every file; install setpriv (util-linux) to drop that right")
    folder, bad, odd = hostile
    result = run(bundle, folder, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    rows = {row.key: row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 1000 + len(bad) + len(odd)
    assert {key for key, row in rows.items() if row.status == "failed"} == set(bad)
    assert all(is_plain(rows[key].reason) for key in bad)
    store = load_embeddings(tmp_path / "out")
    assert len(store.keys) == 1000 + len(odd)
    preprocess = bundle.manifest.preprocess
    worst = 1.0
    with open_runtime(bundle) as runtime:
        for key, vector in zip(store.keys, store.vectors, strict=True):
            with open(path_of(folder, key), "rb") as file:
                alone = runtime.embed(preprocess.decode(file.read())[None])[0]
            worst = min(worst, float(vector @ alone / np.linalg.norm(vector) / np.linalg.norm(alone)))
    assert worst >= 0.99999


def test_the_reasons_are_named(bundle, hostile, tmp_path):
    run(bundle, hostile[0], tmp_path / "out")
    reasons = {row.key: row.reason for row in read_rows(tmp_path / "out")}
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.jpg"] == "not an image that Pillow can read"
    assert "decompression bomb" in reasons["bomb.png"]
    assert "truncated" in reasons["cut50.jpg"]
    assert reasons["dangling.jpg"] == "broken link (No such file or directory)"
    assert reasons["loop.jpg"] == "broken link (Too many levels of symbolic links)"
    assert reasons["pipe.jpg"] == "not a regular file (named pipe)"
    assert reasons["secret.png"] == "cannot be read: Permission denied"


def test_a_folder_of_nothing_but_bad_files_is_refused_and_a_bad_batch_is_not(bundle, hostile, tmp_path):
    folder, bad, _ = hostile
    only = tmp_path / "only"
    only.mkdir()
    broken = [key for key in bad if os.path.isfile(path_of(folder, key)) and not key.startswith("secret")]
    for number, key in enumerate(broken):
        shutil.copyfile(path_of(folder, key), only / f"{number:03d}.png")
    result = run(bundle, only, tmp_path / "none")
    assert (result.returncode, result.stderr.count("Traceback")) == (3, 0)
    assert f"all {len(broken)} files failed" in result.stderr
    shutil.copyfile(folder / "whole.png", only / "999.png")  # behind whole batches of bad ones
    result = run(bundle, only, tmp_path / "one")
    assert result.returncode == 0, result.stderr
    assert load_embeddings(tmp_path / "one").keys == ["999.png"]
