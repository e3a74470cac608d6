"""What a server does under load: bad requests among good ones, and a minute of eight clients."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pytriton", reason="the server has an environment of its own: make test builds it")

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.slow
CLIENTS = 8
MAX_BYTES = 1_000_000  # the clients share the cores with the server: what they send larger, all of them wait for


def files_of(photo_crops):
    files = []
    for crop in photo_crops:
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


def infer(client, model, array, datatype):
    tensor = triton.InferInput("images", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    answer = client.infer(model, [tensor], client_timeout=60)
    return answer.as_numpy("embedding"), answer.as_numpy("error")[0, 0]


def run(server, requests):
    """Send requests with eight clients; return what became of each, and its seconds."""
    local = threading.local()

    def ask(request):
        if not hasattr(local, "client"):
            local.client = triton.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}")
        start = time.perf_counter()
        try:
            found = infer(local.client, *request)
        except InferenceServerException as error:
            found = error
        return found, time.perf_counter() - start

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(ask, requests))


def test_bad_requests_are_named_and_cost_the_good_ones_nothing(serve, bundle, tmp_path, photo_crops):
    with serve(bundle.path, tmp_path / "log", f"--max-image-bytes={MAX_BYTES}") as server:
        hold_bad_requests_apart(server, files_of(photo_crops))


def hold_bad_requests_apart(server, files):
    good = [("encoder_jpeg", np.array([[files[i % len(files)]]], object), "BYTES") for i in range(900)]
    item = [b"", files[0][:300], bomb(), b"x" * (MAX_BYTES + 1)]
    bad = [("encoder_jpeg", np.array([[data]], object), "BYTES") for data in item] + [
        ("encoder_jpeg", np.zeros((1, 32, 32, 3), np.uint8), "UINT8"),
        ("encoder", np.zeros((1, 32, 31, 3), np.uint8), "UINT8"),
        ("encoder", np.zeros((33, 32, 32, 3), np.uint8), "UINT8"),
    ]
    mixed = []
    for index, request in enumerate(good):
        mixed.append(request)
        if index % 9 == 8:
            mixed.append(bad[index // 9 % len(bad)])
    run(server, good[:100])
    clean = run(server, good)
    found = run(server, mixed)
    expected = {request[1][0, 0]: answer[0] for request, (answer, _) in zip(good, clean, strict=True)}
    seconds = []
    for request, (answer, taken) in zip(mixed, found, strict=True):
        if any(request is each for each in bad):
            assert isinstance(answer, InferenceServerException) or answer[1], request[0]
        else:
            vector, error = answer
            assert error == b""
            assert np.allclose(vector, expected[request[1][0, 0]], rtol=1e-4, atol=1e-5)
            seconds.append(taken)
    p99_clean, p99 = np.percentile([taken for _, taken in clean], 99), np.percentile(seconds, 99)
    assert len(mixed) == 1000
    assert p99 <= 1.5 * p99_clean, f"{1000 * p99_clean:.1f} ms alone, {1000 * p99:.1f} ms among bad ones"


def resident(pids):
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


def test_a_minute_of_eight_clients_leaves_nothing_behind(serve, bundle, tmp_path, photo_crops):
    files = files_of(photo_crops)
    requests = [("encoder_jpeg", np.array([[file] for file in files[:4]], object), "BYTES")] * 200
    with serve(bundle.path, tmp_path / "log") as running:
        pids = [running.process.pid, *running.workers(), *running.servers()]
        sizes, end = [], time.monotonic() + 60
        while time.monotonic() < end:
            answers = run(running, requests)
            assert all(not isinstance(answer, InferenceServerException) for answer, _ in answers)
            sizes.append(resident(pids))
        running.process.terminate()
        assert running.process.wait(60) == 0
    assert sizes[-1] <= 1.05 * max(sizes[: len(sizes) // 3 + 1])
    assert not list(Path("/dev/shm").glob(f"mio-{running.process.pid}-*"))
