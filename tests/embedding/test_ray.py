"""The Ray engine, with the real Ray on this machine: the bytes of the local engine, whatever dies on the way."""

import errno
import importlib.util
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.embedding import embed, ray_engine
from mio_export.embedding.versions import versions_here
from mio_export.errors import MioError, SpaceError
from mio_export.limits import Limits
from mio_export.runtimes import devices
from mio_export.store import read_rows, shard_paths

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="mio-export[ray] is not installed")
OPTIONS = {"runtime": "onnxruntime", "decode": "full", "shard_size": 5, "batch_size": 4}
COMMAND = ["--runtime", "onnxruntime", "--decode", "full", "--shard-size", "5", "--batch-size", "4"]
MIO = [sys.executable, "-c", "from mio_export.cli.main import main; main()"]


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two workers, for the tests of this file together; its address."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)  # a short path: Ray keeps sockets there
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 large images, each of which takes a while, 10 copies of some of them in other shards, and 3 broken files."""
    folder = tmp_path_factory.mktemp("ray") / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        small.resize((3000, 3000), Image.Resampling.NEAREST).save(folder / f"{index:02d}.png", compress_level=1)
    for index in range(10):
        shutil.copy(folder / f"{2 * index:02d}.png", folder / f"{39 - index:02d}-copy.png")
    for index in range(3):
        (folder / f"{20 * index:02d}-broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def expected(bundle, images, tmp_path_factory):
    """What the local engine makes of them."""
    out = tmp_path_factory.mktemp("ray") / "local"
    embed(bundle.path, images, out, **OPTIONS)
    assert {row.status for row in read_rows(out)} == {"ok", "duplicate", "failed"}
    return contents(out)


def contents(out):
    return {path.name: path.read_bytes() for path in [*shard_paths(out), out / "store.json"]}


def processes():
    """Every process as (pid, parent, command line)."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        pid, parent, *command = line.split(maxsplit=2)
        yield int(pid), int(parent), "".join(command)


def kill_a_busy_worker(*, within_s):
    """Kill a worker of this process's cluster that is at a shard, as the system does when memory runs out."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        running = list(processes())
        nodes = {pid for pid, parent, command in running if parent == os.getpid() and "raylet" in command}
        for pid, parent, command in running:
            if parent in nodes and command.startswith("ray::Map(_embed_shard)"):
                os.kill(pid, signal.SIGKILL)
                return pid
    return None


class Counted(Progress):
    """Keeps what it is told of."""

    def __init__(self):
        self.amounts, self.failed = [], []

    @contextmanager
    def task(self, *arguments, **options):
        yield self

    def advance(self, amount=1, *, failed=0, **options):
        self.amounts.append(amount)
        self.failed.append(failed)


@needs_ray
def test_ray_gives_the_bytes_of_the_local_engine_though_a_worker_is_killed(cluster, bundle, images, expected, tmp_path):
    progress = Counted()
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_a_busy_worker, within_s=60)
        result = embed(bundle.path, images, tmp_path / "out", engine="ray", progress=progress, **OPTIONS)
    assert (result.num_files, result.num_ok, result.num_duplicates, result.num_failed) == (53, 50, 10, 3)
    assert contents(tmp_path / "out") == expected
    assert killed.result() is not None
    assert (progress.amounts, sum(progress.failed)) == ([5] * 10 + [3], 3)
    assert embed(bundle.path, images, tmp_path / "out", engine="ray").num_embedded == 0


@needs_ray
@pytest.mark.slow
def test_a_shard_whose_workers_always_die_ends_the_run_and_the_next_run_goes_on(
    cluster, bundle, images, expected, tmp_path
):
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            kill_a_busy_worker(within_s=1)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(MioError, match=r"Ray gave up: WorkerCrashedError: .*\nwhat was finished is kept"):
        embed(bundle.path, images, tmp_path / "out", engine="ray", **OPTIONS)
    stop.set()
    assert contents(tmp_path / "out").items() < expected.items()
    embed(bundle.path, images, tmp_path / "out", engine="ray", **OPTIONS)
    assert contents(tmp_path / "out") == expected


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "joins"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_interrupted_run_says_so_and_goes_on(cluster, bundle, images, expected, tmp_path, number, joins):
    out = tmp_path / "out"
    command = [*MIO, "embed", bundle.path, images, "-o", out, *COMMAND, "--engine", "ray"]
    run = subprocess.Popen([*command, *(["--address", cluster] if joins else [])], stderr=subprocess.PIPE, text=True)
    while not shard_paths(out):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.02)
    run.send_signal(number)
    said = run.communicate(timeout=30)[1].splitlines()
    assert run.returncode == 128 + number
    assert said[-1].startswith("mio: interrupted; what was finished is kept")
    assert all(line.startswith(("onnxruntime fp32", "embedding:", "mio:")) for line in said), said
    assert 0 < len(shard_paths(out)) < len(expected) - 1
    embed(bundle.path, images, out, engine="ray", **OPTIONS)
    assert contents(out) == expected


@needs_ray
@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz", "photos.zip", "photos.parquet"])
def test_archives_and_relative_paths_go_to_the_workers(cluster, bundle, photos, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith("zip"):
        with zipfile.ZipFile(name, "w") as archive:
            for path in photos.rglob("*.jpg"):
                archive.write(path, path.name)
    elif name.endswith("parquet"):
        pq.write_table(pa.table({"image": [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]}), name)
    else:
        with tarfile.open(name, "w:gz" if name.endswith("gz") else "w") as archive:
            archive.add(photos, arcname=".")
    for engine in ("local", "ray"):
        embed(bundle.path, name, tmp_path / engine, engine=engine, **OPTIONS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@needs_ray
def test_a_worker_with_other_versions_ends_the_run_and_is_named(cluster, bundle, photos, tmp_path, monkeypatch):
    here = versions_here("onnxruntime")
    monkeypatch.setattr(ray_engine, "versions_here", lambda runtime: here | {"pillow": "12.0.0"})  # of the caller only
    with pytest.raises(SpaceError, match=r"of the Ray cluster has other versions .*: pillow \S+ \(here 12.0.0\); inst"):
        embed(bundle.path, photos, tmp_path / "out", engine="ray", **OPTIONS)
    assert shard_paths(tmp_path / "out") == []


@needs_ray
def test_files_that_only_the_caller_can_read_are_no_failed_rows(cluster, bundle, photos, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(photos), "/photos", recursive=True)
    try:
        with pytest.raises(MioError, match=r"read none of 5 files, such as .*same files at the same paths"):
            embed(bundle.path, "memory://photos", tmp_path / "out", engine="ray", **OPTIONS)
    finally:
        memory.rm("/photos", recursive=True)
    assert shard_paths(tmp_path / "out") == []


def test_wrong_calls_are_one_line(mio, bundle, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    cases = {
        ("--engine", "ray"): (5, "needs Ray Data, which is not installed: pip install 'mio-export[ray]'"),
        ("--engine", "spark"): (2, "engine must be local or ray, got 'spark'"),
        ("--address", "auto"): (2, "--address joins a Ray cluster, so it needs --engine ray; got 'auto' alone"),
        ("--engine", "ray", "--cache", tmp_path): (2, "--cache is a file of one machine"),
    }
    for arguments, (code, message) in cases.items():
        result = mio("embed", bundle.path, photos, "-o", tmp_path / "out", *arguments)
        assert (result.code, result.err.count("\n")) == (code, 1)
        assert message in result.err
    assert not (tmp_path / "out").exists()


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line(bundle, photos, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    run = subprocess.run(
        [*MIO, "embed", bundle.path, photos, "-o", tmp_path / "out", *COMMAND, "--engine", "ray", "--address", address],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[1:] == [
        f"mio: the Ray cluster {address} cannot be used: [Errno {errno.ECONNREFUSED}] Connection refused"
    ]


def test_threads_are_limited(monkeypatch):
    monkeypatch.setattr(devices, "_limit", math.inf)
    devices.limit_threads(1)
    assert devices.num_threads() == 1


@needs_ray
def test_the_limits_of_one_file_hold_on_every_worker(cluster, bundle, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for side in (40, 60):
        Image.new("RGB", (side, side)).save(folder / f"{side}.png")
    embed(bundle.path, folder, tmp_path / "out", engine="ray", limits=Limits(max_pixels=2_000), **OPTIONS)
    assert {row.key: row.reason for row in read_rows(tmp_path / "out")} == {
        "40.png": None,
        "60.png": "60x60 is more than 2,000 pixels (decompression bomb)",
    }
