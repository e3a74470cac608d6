"""What embedding costs as collections grow: time for each file, memory, threads."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mio_export.embedding import embed
from mio_export.sources import list_images, list_sources
from mio_export.store import Row, read_info, shard_path, write_info, write_shard

OPTIONS = {"runtime": "onnxruntime", "decode": "full"}
# the peak is VmHWM: what getrusage says begins with the peak of the process that started this one
CHILD = """
import json, re, sys, time
from mio_export.embedding import embed
bundle, source, out, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
seconds = []
for _ in range(options.pop("times", 1)):
    wall, start = time.perf_counter(), time.process_time()
    result = embed(bundle, source, out, **options)
    seconds.append((time.process_time() - start, time.perf_counter() - wall))
peak_bytes = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
imported = sorted({"torch", "onnxruntime"} & set(sys.modules))
counts = (result.num_files, result.num_embedded)
print(json.dumps({"counts": counts, "seconds": seconds, "peak_bytes": peak_bytes, "imported": imported}))
"""


def in_child(bundle, source, out, *, prefix=(), code=CHILD, **options):
    """Embed in a process of its own; return what it prints."""
    command = [*prefix, sys.executable, "-c", code, str(bundle.path), str(source), str(out), json.dumps(options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def png(rng, side=16):
    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_images(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(count)
    for index in range(count):
        (folder / f"{index:06d}.png").write_bytes(png(rng))
    return folder


@pytest.fixture
def memory_folder():
    """A folder that lies in memory where the system has such."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


def write_finished(bundle, photos, folder, count):
    """Write a folder of empty files, and a store that has a row for each (with vectors of one number)."""
    source, out = folder / "source", folder / "out"
    for start in range(0, count, 1000):
        (source / f"{start // 1000:04d}").mkdir(parents=True)
        for index in range(start, min(start + 1000, count)):
            (source / f"{start // 1000:04d}" / f"image-{index:07d}.jpg").touch()
    embed(bundle.path, photos, folder / "real", **OPTIONS)
    info = read_info(folder / "real")
    out.mkdir()
    write_info(out, info)
    files = list_images(source).files
    for start in range(0, count, info.shard_size):
        rows = [
            Row(key=f.key, size=f.size, mtime_ns=f.mtime_ns, sha256=f"{i:064x}", status="ok", stage=None, reason=None)
            for i, f in enumerate(files[start : start + info.shard_size], start)
        ]
        vectors = np.zeros((len(rows), 1), np.float32)
        write_shard(shard_path(out, start // info.shard_size), replace(info, embedding_dim=1), rows, vectors)
    return source, out


@pytest.mark.parametrize("count", [5_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_with_nothing_to_do_no_runtime_is_opened_and_time_and_memory_are_small(bundle, photos, memory_folder, count):
    source, out = write_finished(bundle, photos, memory_folder, count)
    found = in_child(bundle, source, out, times=2)
    start = time.perf_counter()
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()", "embed", bundle.path, source]
    subprocess.run([*map(str, command), "-o", str(out)], check=True, capture_output=True, timeout=300)
    (cold_s, _), (warm_s, wall_s) = found["seconds"]
    print(  # noqa: T201
        f"{count:,} files, nothing to do: process time {cold_s:.2f} s, again {warm_s:.2f} s (wall {wall_s:.2f} s),"
        f" whole command {time.perf_counter() - start:.2f} s, {found['peak_bytes'] / 1e6:.0f} MB"
    )
    assert found["counts"] == [count, 0]
    assert found["imported"] == []
    assert warm_s <= 1 + 20e-6 * count
    assert wall_s <= 60
    assert found["peak_bytes"] <= 1e9


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(bundle, memory_folder):
    peaks = []
    for count in (2_000, 20_000):
        source = write_images(memory_folder / str(count), count)
        found = in_child(bundle, source, memory_folder / f"of-{count}", shard_size=500, **OPTIONS)
        assert found["counts"] == [count, count]
        peaks.append(found["peak_bytes"])
    print(f"peak memory: {peaks[0] / 1e6:.1f} MB with 2,000 images, {peaks[1] / 1e6:.1f} MB with 20,000")  # noqa: T201
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.slow
def test_bad_files_cost_no_speed(bundle, tmp_path):
    good = write_images(tmp_path / "good", 2000)
    mixed = shutil.copytree(good, tmp_path / "mixed")
    for index, path in enumerate(sorted(mixed.iterdir())[::20]):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], b"", b"no image" + data[8:])[index % 3])
    seconds = {good: [], mixed: []}
    for round_number in range(9):
        for folder in (good, mixed) if round_number % 2 else (mixed, good):
            start = time.perf_counter()
            result = embed(bundle.path, folder, tmp_path / f"{folder.name}-{round_number}", **OPTIONS)
            seconds[folder].append(time.perf_counter() - start)
            assert result.num_failed == (100 if folder == mixed else 0)
    medians = {folder.name: statistics.median(values) for folder, values in seconds.items()}
    print(f"2,000 files: {medians['good']:.3f} s, with 5 % bad ones {medians['mixed']:.3f} s")  # noqa: T201
    assert medians["mixed"] <= 1.03 * medians["good"]


THREADS = """
import json, os, sys
from pathlib import Path
from mio_export.embedding import embed
from mio_export.runtimes.onnxruntime import OnnxRuntime
found, original = {}, OnnxRuntime._run
def busy():
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc/self/task").glob("*/stat")]
    return len(stats)
def run(self, images):
    vectors = original(self, images)
    found["session"] = self._session.get_session_options().intra_op_num_threads
    found["threads"] = max(found.get("threads", 0), busy())
    return vectors
OnnxRuntime._run = run
options = json.loads(sys.argv[4])
before = busy()
embed(sys.argv[1], sys.argv[2], sys.argv[3], **options)
print(json.dumps(found | {"before": before}))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_on_one_core_one_thread_computes(bundle, photos, tmp_path):
    found = in_child(bundle, photos, tmp_path / "out", prefix=("taskset", "-c", "0"), code=THREADS, **OPTIONS)
    print(found)  # noqa: T201
    assert found["session"] == 1
    assert found["threads"] - found["before"] <= 2  # one that decodes, one that waits for the disk


@pytest.mark.slow
def test_a_tar_is_listed_and_a_shard_written_fast(bundle, tmp_path, memory_folder):
    import tarfile

    data = png(np.random.default_rng(0))
    with tarfile.open(memory_folder / "images.tar", "w") as tar:
        for index in range(50_000):
            info = tarfile.TarInfo(f"{index:06d}.png")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    start = time.perf_counter()
    files = list_sources([memory_folder / "images.tar"]).files
    sizes = sum(len(file.read()[0]) for file in files)
    members_per_s = len(files) / (time.perf_counter() - start)
    assert sizes == 50_000 * len(data)
    num_rows, dim = 4096, 2048
    vectors = np.random.default_rng(0).standard_normal((num_rows, dim)).astype(np.float32)
    rows = [
        Row(key=f"{i:06d}.png", size=1, mtime_ns=1, sha256=f"{i:064x}", status="ok", stage=None, reason=None)
        for i in range(num_rows)
    ]
    embed(bundle.path, write_images(tmp_path / "few", 2), tmp_path / "real", **OPTIONS)
    info = replace(read_info(tmp_path / "real"), embedding_dim=dim)
    seconds = []
    for number in range(5):
        start = time.perf_counter()
        write_shard(shard_path(tmp_path, number), info, rows, vectors)
        seconds.append(time.perf_counter() - start)
    mb_per_s = vectors.nbytes / 1e6 / statistics.median(seconds)
    print(f"tar: {members_per_s:,.0f} members/s listed and read; Parquet: {mb_per_s:,.0f} MB/s written and synced")  # noqa: T201
    assert members_per_s >= 10_000
    assert mb_per_s >= 150
