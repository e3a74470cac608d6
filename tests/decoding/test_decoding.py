"""What one file may cost: seconds, pixels, bytes and memory, whatever it claims, and nobody else's work."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mio_export.decoding import Decoder
from mio_export.decoding.bounded import passes_of
from mio_export.embedding.run import embed
from mio_export.errors import UsageError
from mio_export.limits import Limits
from mio_export.memory import lacks_memory
from mio_export.preprocess import DecodeError, Preprocess
from mio_export.store import read_rows

CONTRACT = Preprocess(image_size=32)
ENDLESS = b"P3\n6000 6000\n255\n" + b"1 2 3 " * 16_000_000
"""Plain text, which Pillow reads in Python, for about as many seconds as it has megabytes."""


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_of_many_scans(photo, count):
    """A progressive JPEG, 4,000 pixels a side, and nothing but empty scans: 14 bytes for 16 million pixels each."""
    data = encoded(photo.convert("L").resize((4000, 4000)), "JPEG", progressive=True)
    return data[: data.index(b"\xff\xda")] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x01\0\0\0\0" * count + b"\xff\xd9"


@pytest.fixture(scope="module")
def decoder():
    with Decoder(CONTRACT, limits=Limits(decode_s=30)) as decoder:
        yield decoder


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "ICO", "ICNS", "TGA", "PPM", "PCX", "SGI", "JPEG2000"]
)
def test_a_decoder_gives_the_contracts_pixels_in_every_format(decoder, photo_crops, format):
    data = encoded(photo_crops[0].resize((128, 128)), format)
    np.testing.assert_array_equal(decoder.decode(data), CONTRACT.decode(data))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_decoded_apart_to_the_same_pixels(decoder, photo_crops):
    data = encoded(photo_crops[0], "AVIF")
    assert passes_of(data) is None
    np.testing.assert_array_equal(decoder.decode(data), CONTRACT.decode(data))


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a", b"\xff\xd8\xff", b"BM", b"RIFF\x10\0\0\0WEBP", b"II*\0"])
def test_what_is_no_image_has_the_reason_that_the_contract_gives(decoder, data):
    with pytest.raises(DecodeError) as expected:
        CONTRACT.decode(data)
    with pytest.raises(DecodeError, match=re.escape(str(expected.value))):
        decoder.decode(data)


@pytest.mark.parametrize("kind", ["plain text", "scans", "chunks"])
def test_a_file_that_takes_too_long_fails_and_the_next_one_does_not(photo_crops, kind):
    if kind == "plain text":
        data = ENDLESS
    elif kind == "scans":
        data = jpeg_of_many_scans(photo_crops[0], 20_000)
    else:
        png = encoded(photo_crops[0], "PNG")
        data = png[:33] + chunk(b"abCd", b"") * 1_000_000 + png[33:]
    with Decoder(CONTRACT, limits=Limits(decode_s=0.5)) as decoder:
        start = time.monotonic()
        with pytest.raises(DecodeError, match=r"decoding takes more than 0.5 seconds \(--max-decode-seconds\)"):
            decoder.decode(data)
        assert time.monotonic() - start < 20
    with Decoder(CONTRACT) as decoder:
        decoder.decode(encoded(photo_crops[0], "GIF"))


def test_a_photo_is_decoded_here_and_what_may_take_long_is_not(photo_crops):
    photo = photo_crops[0]
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {})):
        assert passes_of(encoded(photo, kind, **options)) < 2e6, kind
    assert passes_of(jpeg_of_many_scans(photo, 100)) >= 100 * 4000 * 4000
    png = encoded(photo, "PNG")
    assert passes_of(png[:33] + chunk(b"abCd", b"") * 100_000 + png[33:]) is None
    for kind in ("GIF", "TIFF", "ICO"):
        assert passes_of(encoded(photo, kind)) is None
    animated = encoded(photo, "WEBP", save_all=True, append_images=[photo_crops[1]])
    assert passes_of(animated) is None


def test_an_isolated_decoder_decodes_nothing_here(photo_crops, monkeypatch):
    data = encoded(photo_crops[0], "JPEG")
    expected = CONTRACT.decode(data)
    with Decoder(CONTRACT, isolated=True) as apart, Decoder(CONTRACT) as here:
        monkeypatch.setattr(Preprocess, "decode", lambda *_, **__: pytest.fail("decoded in this process"))
        np.testing.assert_array_equal(apart.decode(data), expected)
        with pytest.raises(pytest.fail.Exception):
            here.decode(data)


def test_a_process_that_was_killed_between_two_files_costs_neither(photo_crops):
    data = encoded(photo_crops[0], "JPEG")
    with Decoder(CONTRACT, isolated=True) as decoder:
        expected = decoder.decode(data)
        (process,) = decoder._idle
        process.kill()
        process._process.wait()
        np.testing.assert_array_equal(decoder.decode(data), expected)


def test_a_process_that_is_stopped_is_ended_in_time_and_the_next_file_is_decoded():
    data = encoded(Image.effect_noise((1000, 1000), 100), "PNG")
    assert len(data) > 1 << 18  # longer than a pipe holds
    with Decoder(CONTRACT, limits=Limits(decode_s=0.5), isolated=True) as decoder:
        expected = decoder.decode(data)
        (process,) = decoder._idle
        os.kill(process._process.pid, signal.SIGSTOP)
        with pytest.raises(DecodeError, match="takes more than"):
            decoder.decode(data)
        np.testing.assert_array_equal(decoder.decode(data), expected)


def icon_of_a_jpeg(side):
    """A BLP file that says that it is 16 pixels a side, and holds a JPEG that is not."""
    inner = encoded(Image.new("L", (side, side)), "JPEG")
    head = b"BLP1" + struct.pack("<iIIIii", 0, 0, 16, 16, 5, 0)
    place = len(head) + 2 * 64 + 4
    return head + struct.pack("<16I16II", place, *[0] * 15, len(inner), *[0] * 15, 0) + inner


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its address space")
def test_a_file_that_takes_more_memory_than_its_size_explains_fails(decoder):
    with pytest.raises(DecodeError, match=r"takes more memory than an image of its size needs \(\d+ MiB\)"):
        decoder.decode(icon_of_a_jpeg(13_000))


def test_a_picture_in_a_container_has_no_more_pixels_than_any_other():
    with Decoder(CONTRACT, limits=Limits(max_pixels=1_000_000)) as decoder:
        with pytest.raises(DecodeError, match=r"more than 1,000,000 pixels \(decompression bomb\)"):
            decoder.decode(icon_of_a_jpeg(1_100))
        assert decoder.decode(icon_of_a_jpeg(16)).shape == CONTRACT.shape


def tiff_bomb():
    """A TIFF of 16 pixels a side whose one tile has 65,520."""
    place = 8 + 2 + 12 * 11 + 4
    tile = 65_520
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (284, 1)]
    tags += [(322, tile), (323, tile), (324, place), (325, 100)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + body + bytes(4) + zlib.compress(bytes(1000))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to its address space")
def test_a_tile_that_no_memory_holds_is_the_files_fault(decoder):
    with pytest.raises(DecodeError, match=r"takes more memory than an image of its size needs \(\d+ MiB\)"):
        decoder.decode(tiff_bomb())


def settled_bytes(pid):
    """Return a process's address space once it waits for its next file: it answers before it frees the last one."""
    import resource

    sizes = []
    while len(sizes) < 5 or len(set(sizes[-5:])) > 1:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        sizes = [*sizes, size] if state == "S" else []
        time.sleep(0.02)
    return sizes[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
@pytest.mark.parametrize(
    ("mib", "message"), [(200, r"may take \d+ MiB of memory, and \d+ MiB are free"), (8, "enough")]
)
def test_lack_of_memory_on_the_machine_is_not_the_files_fault(decoder, photo_crops, mib, message):
    import resource

    data = encoded(photo_crops[0].convert("RGB").resize((64, 64)), "GIF") + bytes(30 << 20)
    decoder.decode(data)
    (pid,) = children()
    held = settled_bytes(pid)
    resource.prlimit(pid, resource.RLIMIT_AS, (held + (mib << 20), resource.RLIM_INFINITY))
    with pytest.raises(MemoryError, match=message):
        decoder.decode(tiff_bomb() if mib > 100 else data)


def children(least_kib=0):
    """Return the decoding processes of this one that are not over, if they hold so much memory."""
    listed = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "pid=,rss=,args="], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, rss, args in lines if "mio_export.decoding.child" in args and int(rss) >= least_kib]


def busy_child(but=None):
    """Wait for a process that has been given all of ``ENDLESS``, other than one that is dying, and return it."""
    deadline = time.monotonic() + 60
    while not (found := {*children(least_kib=len(ENDLESS) // 1024 + 40_000)} - {but}):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found.pop()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_of_the_decoder_is_the_files_failure_and_the_next_one_is_decoded(photo_crops, number):
    with Decoder(CONTRACT) as decoder, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decoder.decode, ENDLESS)
        first = busy_child()
        os.kill(first, number)
        os.kill(busy_child(but=first), number)  # what went before could have been at fault: it is tried in a new one
        with pytest.raises(DecodeError, match=rf"the decoder crashed \({number.name}\)"):
            waiting.result(timeout=30)
        data = encoded(photo_crops[1], "GIF")
        np.testing.assert_array_equal(decoder.decode(data), CONTRACT.decode(data))


def test_a_decoder_that_the_system_kills_lacks_memory():
    with Decoder(CONTRACT) as decoder, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(decoder.decode, ENDLESS)
        os.kill(busy_child(), signal.SIGKILL)
        with pytest.raises(MemoryError, match="was killed"):
            waiting.result(timeout=30)


def test_closing_ends_what_is_still_decoded_and_leaves_no_process():
    others = children()
    with Decoder(CONTRACT) as decoder, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(decoder.decode, ENDLESS) for _ in range(2)]
        busy_child()
        start = time.monotonic()
        decoder.close()
        for future in waiting:
            with pytest.raises(RuntimeError, match="the decoder is closed"):
                future.result(timeout=30)
        assert time.monotonic() - start < 10
    assert children() == others


def test_any_number_of_seconds_can_be_allowed(photo_crops):
    data = encoded(photo_crops[0], "GIF")
    with Decoder(CONTRACT, limits=Limits(decode_s=1e300)) as decoder:
        np.testing.assert_array_equal(decoder.decode(data), CONTRACT.decode(data))


ODD_PARENT = """
import os, pathlib, signal, sys, tempfile
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)
assert "" in sys.path
from mio_export.decoding import Decoder
from mio_export.preprocess import Preprocess
with Decoder(Preprocess(image_size=32)) as decoder:
    decoder.decode(pathlib.Path(sys.argv[1]).read_bytes())
    print("decoded", flush=True)
    decoder.decode(pathlib.Path(sys.argv[2]).read_bytes())
"""


def test_a_parent_that_blocks_signals_and_whose_folder_is_gone_leaves_no_process_either(photo_crops, tmp_path):
    (tmp_path / "good.gif").write_bytes(encoded(photo_crops[0], "GIF"))
    (tmp_path / "endless.ppm").write_bytes(ENDLESS)
    command = [sys.executable, "-c", ODD_PARENT, str(tmp_path / "good.gif"), str(tmp_path / "endless.ppm")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "decoded\n"
            (pid,) = offspring(process.pid)
            time.sleep(0.5)  # by now it decodes what takes very long
            assert is_running(pid)
        finally:
            process.kill()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_decoding_process_outlives_its_parent_and_a_hanging_file_stops_no_signal(bundle, tmp_path, number):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "endless.ppm").write_bytes(ENDLESS)
    Image.new("RGB", (40, 40)).save(folder / "good.png")
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()"]
    arguments = ["embed", str(bundle.path), str(folder), "-o", str(tmp_path / "out"), "--runtime", "onnxruntime"]
    process = subprocess.Popen(
        [*command, *arguments, "--decode", "full"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (pids := offspring(process.pid)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), stderr
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() - start < 2  # what it decodes would take longer
        time.sleep(0.02)


def offspring(pid):
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(text) for text in listed.stdout.split()]


def is_running(pid):
    state = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_files_beyond_a_limit_are_rows_with_the_option_that_allows_them(bundle, tmp_path, mio):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "good.png")
    Image.effect_noise((60, 60), 60).save(folder / "many-bytes.bmp")
    Image.new("RGB", (200, 200)).save(folder / "many-pixels.png")
    (folder / "endless.ppm").write_bytes(ENDLESS)
    command = ("embed", bundle.path, folder, "-o", out, "--runtime", "onnxruntime", "--decode", "full")
    limits = ("--max-file-bytes", 100_000_000, "--max-pixels", 37_000_000, "--max-decode-seconds", 0.5)
    assert mio(*command, *limits).code == 0
    reasons = {row.key: (row.stage, row.reason) for row in read_rows(out)}
    assert reasons.pop("endless.ppm") == ("decode", "decoding takes more than 0.5 seconds (--max-decode-seconds)")
    assert set(reasons.values()) == {(None, None)}
    (folder / "endless.ppm").unlink()
    out = tmp_path / "small"
    command = (*command[:4], out, *command[5:])
    assert mio(*command, "--max-file-bytes", 3_000, "--max-pixels", 30_000).code == 0
    reasons = {row.key: (row.stage, row.reason) for row in read_rows(out)}
    assert reasons["good.png"] == (None, None)
    assert reasons["many-bytes.bmp"][0] == "read"
    assert "more than the limit of 3,000 (--max-file-bytes)" in reasons["many-bytes.bmp"][1]
    assert reasons["many-pixels.png"] == ("decode", "200x200 is more than 30,000 pixels (decompression bomb)")
    assert mio(*command, "--retry-failed").code == 0
    assert {row.status for row in read_rows(out)} == {"ok"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_file_bytes": 0}, "max_file_bytes must be 1 or more, got 0"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more, got 0"),
        ({"decode_s": 0}, "decode_s must be a number of seconds above 0, got 0"),
        ({"decode_s": float("nan")}, "decode_s must be a number of seconds above 0, got nan"),
        ({"decode_s": float("inf")}, "decode_s must be a number of seconds above 0, got inf"),
    ],
)
def test_limits_that_mean_nothing_are_refused(values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Limits(**values)


def test_more_pixels_than_the_contract_allows_are_refused(bundle, photos, tmp_path):
    message = "max_pixels 200,000,000 is more than the encoder's contract allows (178,956,970)"
    with pytest.raises(UsageError, match=re.escape(message)):
        embed(bundle.path, photos, tmp_path / "out", limits=Limits(max_pixels=200_000_000))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 98765"), True),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (ValueError("not enough image data"), False),
        (OSError("image file is truncated"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_lack_of_memory_is_known_by_what_libraries_say(error, expected):
    assert lacks_memory(error) is expected


def test_threads_share_a_decoder_and_one_process_serves_one_thread(photo_crops):
    files, others = [encoded(crop, "GIF") for crop in photo_crops], children()
    with Decoder(CONTRACT) as decoder, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(decoder.decode, files))
        assert len(children()) <= len(others) + 2
    for data, pixels in zip(files, found, strict=True):
        np.testing.assert_array_equal(pixels, CONTRACT.decode(data))
