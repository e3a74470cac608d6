"""A thousand good images among every kind of bad file: one row for each, every good row right, never a traceback."""

import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mio_export.runtimes import open_runtime
from mio_export.sample import read_sample
from mio_export.store import load_embeddings, read_rows

DROP_PRIVILEGES = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, photo_crops):
    """The folder; with the keys of the bad files and of the odd but good ones."""
    folder = tmp_path_factory.mktemp("hostile") / "src"
    (folder / "good").mkdir(parents=True)
    for index, data in enumerate(read_sample("test")):
        (folder / "good" / f"{index:04d}.png").write_bytes(data)
    photo = photo_crops[0]
    photo.save(folder / "whole.jpg")
    photo.save(folder / "whole.png")
    bad, odd = [], ["whole.jpg", "whole.png"]

    def put(name, data, names):
        path = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        names.append(name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name)

    def save(name, image, **options):
        image.save(folder / name, **options)
        odd.append(name)

    put("empty.jpg", b"", bad)
    for share in (10, 50, 99):
        for suffix in ("jpg", "png"):
            data = (folder / f"whole.{suffix}").read_bytes()
            put(f"cut{share}.{suffix}", data[: len(data) * share // 100], bad)
    put("text.jpg", b"this is not an image", bad)
    put("bomb.png", png_header(50_000, 50_000), bad)
    save("1x1.png", Image.new("RGB", (1, 1), "red"))
    save("60000x1.png", Image.linear_gradient("L").resize((60_000, 1)))
    save("cmyk.jpg", photo.convert("CMYK"))
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    save("grey16.png", Image.fromarray(ramp))
    palette = photo.quantize(16)
    save("palette.png", palette, transparency=3)
    frames = [photo, photo_crops[1]]
    save("animated.gif", frames[0], save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    save("rotated.jpg", photo, exif=exif)
    whole = (folder / "whole.png").read_bytes()
    for name in (
        "with space.png",
        "with\nnewline.png",
        "ünïcödé.png",
        b"not-utf8-\xff.png",
        "a/same.png",
        "b/same.png",
    ):
        put(name, whole, odd)
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    put("secret.png", whole, bad)
    (folder / "secret.png").chmod(0)
    bad += ["dangling.jpg", "loop.jpg", "pipe.jpg"]
    return folder, bad, odd


def run(bundle, folder, out):
    """Run ``mio embed`` without the right to read every file, which root has."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", "from mio_export.cli.main import main; main()"]
    prefix = DROP_PRIVILEGES if os.geteuid() == 0 else []
    arguments = ["embed", str(bundle.path), str(folder), "-o", str(out), "--shard-size", "100"]
    return subprocess.run(
        [*prefix, *command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )  # a pipe that is opened would hang until the timeout


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
    assert all(rows[key].reason and "\n" not in rows[key].reason for key in bad)
    store = load_embeddings(tmp_path / "out")
    assert len(store.keys) == 1000 + len(odd)
    preprocess = bundle.manifest.preprocess
    worst = 1.0
    with open_runtime(bundle) as runtime:
        for key, vector in zip(store.keys, store.vectors, strict=True):
            path = os.path.join(os.fsencode(folder), key.replace("\\xff", "\udcff").encode("utf-8", "surrogateescape"))
            with open(path, "rb") as file:
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
