"""Ray Serve, with the real Ray on this machine: the same answers, though a replica is killed and while it ends."""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

from mio_export.runtimes import open_runtime
from mio_export.serving import RemoteEncoder

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="mio-export[ray] is not installed")
COMMAND = [sys.executable, "-c", "from mio_export.cli.main import main; main()"]


def cosine(a, b):
    return ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


def replicas(running):
    """Process ids of the replicas."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    nodes = {pid for pid, parent, command in rows if parent == str(running.process.pid) and "raylet" in command}
    return {int(pid) for pid, parent, command in rows if parent in nodes and "ServeReplica:" in command}


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its sockets: a short path."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        yield folder


@pytest.fixture(scope="module")
def ray_server(serve, bundle, ray_folder, tmp_path_factory):
    """`mio serve --engine ray` with two replicas."""
    options = ["--engine=ray", "--replicas=2", "--grpc-port=8001", "--timeout-seconds=20"]
    with serve(bundle.path, tmp_path_factory.mktemp("ray"), *options, RAY_TMPDIR=ray_folder) as running:
        yield running


@pytest.fixture(scope="module")
def files(photos):
    return [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]


@pytest.fixture(scope="module")
def expected(bundle, files):
    pixels = np.stack([bundle.manifest.preprocess.decode(file) for file in files])
    with open_runtime(bundle, "onnxruntime") as runtime:
        return pixels, runtime.embed(pixels)


def test_replicas_give_the_embeddings_of_the_artifact(ray_server, bundle, files, expected, photos, mio):
    pixels, vectors = expected
    with RemoteEncoder(ray_server.http, space=bundle.manifest.space) as encoder:
        found, errors = encoder.embed_files([*files, b"no image"])
        assert [error is None for error in errors] == [True] * len(files) + [False]
        assert cosine(found[:-1], vectors) >= 0.99999
        assert cosine(encoder.embed(pixels), vectors) >= 0.99999
    result = mio("verify", bundle.path, "--server", ray_server.http, "--images", photos)
    assert result.code == 0, result.err
    assert "gRPC" not in ray_server.log.read_text()


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_nobody_notices(ray_server, files, expected):
    stop, answers, ready = threading.Event(), [], []

    def ask():
        with RemoteEncoder(ray_server.http) as encoder:
            while not stop.is_set():
                answers.append(encoder.embed_files(files[:4])[0])

    def look():
        while not stop.is_set():
            ready.append(ray_server.is_ready(5))
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for work in (ask, ask, look)]
    before = replicas(ray_server)
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        os.kill(min(before), signal.SIGKILL)
        start = time.monotonic()
        while len(replicas(ray_server) - {min(before)}) < 2:
            assert time.monotonic() - start < 5
            time.sleep(0.05)
        time.sleep(3)  # until it takes requests
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(before) == 2
    assert len(answers) > 20
    assert all(cosine(answer, expected[1][:4]) >= 0.99999 for answer in answers)
    assert all(ready)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--grpc-port=8002"], 2, "neither --grpc-port nor --workers"),
        (["--workers=2"], 2, "neither --grpc-port nor --workers"),
        (["--replicas=0"], 2, "1 or more"),
        (["--http-port={}"], 2, "choose another --http-port"),
        (["--max-batch=33"], 2, "max_batch must be 1 to 32"),
        (["--address=127.0.0.1:9", "--http-port=18999"], 1, "cannot be used"),
    ],
)
def test_what_does_not_go_with_ray_is_refused_before_ray_starts(server, bundle, mio, options, status, message):
    options = [option.format(server.http_port) for option in options]
    result = mio("serve", bundle.path, "--runtime=onnxruntime", "--engine=ray", *options)
    assert (result.code, message in result.err) == (status, True), result.err


@pytest.mark.slow
def test_more_replicas_than_processors_are_refused(bundle, ray_folder):
    command = [*COMMAND, "serve", bundle.path, "--runtime=onnxruntime", "--engine=ray", "--http-port=18998"]
    done = subprocess.run(
        [*command, "--replicas=10000"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "RAY_TMPDIR": ray_folder},
    )
    assert (done.returncode, "replicas must be at most" in done.stderr) == (2, True), done.stderr


def test_a_changed_bundle_is_refused(bundle, tmp_path, mio):
    path = shutil.copytree(bundle.path, tmp_path / "encoder.mio")
    with (path / "encoder.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff\x00")
    result = mio("serve", path, "--engine=ray")
    assert result.code == 3
    assert "encoder.onnx: sha256 is" in result.err


@pytest.mark.slow
def test_a_machine_with_other_versions_starts_no_replica(bundle, ray_folder):
    code = f"""
from mio_export.serving import ServeOptions, ray_serve
real = ray_serve.versions_here
ray_serve.versions_here = lambda runtime: {{**real(runtime), "pillow": "1.0"}}
try:
    ray_serve.serve_with_ray({str(bundle.path)!r}, ServeOptions(runtime="onnxruntime", http_port=18998))
except Exception as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "RAY_TMPDIR": ray_folder}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.stdout.startswith("MioError Ray Serve does not start: SpaceError: a worker on "), done.stderr
    assert done.stdout.endswith("(here 1.0); install the same on all of them\n")


@pytest.mark.slow
def test_a_cluster_that_serves_already_is_left_alone(ray_server, ray_folder, bundle):
    command = [*COMMAND, "serve", bundle.path, "--runtime=onnxruntime", "--engine=ray", "--address=auto"]
    done = subprocess.run(
        [*command, "--http-port=18999"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "RAY_TMPDIR": ray_folder},
    )
    assert done.returncode == 2, done.stderr
    assert "serves something already" in done.stderr
    assert ray_server.is_ready()


@pytest.mark.slow
def test_sigterm_answers_open_requests_first(ray_server, photo_crops):
    """The last test of this file: the server ends."""
    photo = io.BytesIO()
    photo_crops[0].resize((5000, 5000)).save(photo, "JPEG")
    found = {}

    def ask():
        with RemoteEncoder(ray_server.http, num_retries=0) as encoder:
            found["connected"] = True
            found["answer"] = encoder.embed_files([photo.getvalue()] * 8)

    asking = threading.Thread(target=ask)
    asking.start()
    while "connected" not in found:
        time.sleep(0.01)
    time.sleep(0.5)
    assert asking.is_alive()
    ray_server.process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert ray_server.process.wait(30) == 0
    assert found["answer"][1] == [None] * 8
    assert "server stopped; all open requests were answered" in ray_server.log.read_text()
    assert replicas(ray_server) == set()
