"""What a server does under load: bad requests among good ones, and a minute of eight clients."""

import io
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import urllib3
from PIL import Image

from tests.serving.conftest import children, infer_http, infer_request, method

pytestmark = pytest.mark.slow
CLIENTS = 8
MOST_BYTES = 1_000_000  # the clients share the cores with the server: what they send larger, all of them wait for
HEAD = b"POST /v2/models/encoder/infer HTTP/1.1\r\nHost: x\r\n"


def encoded(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def icon_bomb():
    """A BLP file that says that it is 16 pixels a side, and holds a JPEG that is not."""
    inner = encoded(Image.new("L", (13_000, 13_000)), "JPEG")[:MOST_BYTES]
    place = 28 + 2 * 64 + 4
    head = b"BLP1" + struct.pack("<iIIIii", 0, 0, 16, 16, 5, 0)
    return head + struct.pack("<16I16II", place, *[0] * 15, len(inner), *[0] * 15, 0) + inner


class Clients:
    """What eight clients ask; each has a connection of its own."""

    def __init__(self, server):
        self._server, self._local = server, threading.local()

    def run(self, requests):
        """Answers and seconds, in order."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(self._timed, requests))

    def _timed(self, ask):
        if not hasattr(self._local, "infer"):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.insecure_channel(f"127.0.0.1:{self._server.grpc_port}", options=options)
            self._local.infer, self._local.pool = method(channel, "ModelInfer"), urllib3.PoolManager(retries=False)
        start = time.perf_counter()
        return ask(self._local), time.perf_counter() - start

    def file(self, data):
        """Ask for one file's embedding over gRPC: the embedding, and the reason why there is none."""

        def ask(local):
            answer = local.infer(infer_request([data], model="encoder"), timeout=30)
            return np.frombuffer(answer.raw_output_contents[0], np.float32), answer.raw_output_contents[1][4:]

        return ask

    def refused(self, images, model):
        """Send a whole request that must be refused."""

        def ask(local):
            status, _, text = infer_http(local.pool, self._server.http, images, model=model)
            assert status == 400, text
            return None, text

        return ask

    def raw(self, *parts, status, pause_s=0.0, half_close=False):
        """Send bytes; the answer must have a status."""

        def ask(local):
            with self._server.connect() as connection:
                try:
                    for part in parts:
                        connection.sendall(part)
                        time.sleep(pause_s)
                    if half_close:
                        connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # it was refused before all was sent; the answer is there
                answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
            return None, answer

        return ask


def test_bad_requests_are_named_and_cost_the_good_ones_nothing(serve, bundle, tmp_path, photo_crops):
    limits = (f"--max-file-bytes={MOST_BYTES}", "--max-decode-seconds=1", "--timeout-seconds=3")
    files = [encoded(crop, "JPEG") for crop in photo_crops]
    with serve(bundle.path, tmp_path, *limits) as server:
        clients = Clients(server)
        good = [clients.file(files[i % len(files)]) for i in range(900)]
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n" + b"{} loop\n" * 1000
        slow = b"P3\n6000 6000\n255\n" + b"1 2 3 " * (MOST_BYTES // 7)
        bombs = [encoded(Image.new("1", (9000, 9000)), "PNG"), icon_bomb(), postscript, slow]
        bad = [clients.file(data) for data in (b"", files[0][:300], *bombs, bytes(MOST_BYTES + 1))]
        bad += [
            clients.refused(np.zeros((1, 32, 32, 3), np.uint8), "encoder"),
            clients.refused(np.zeros((1, 32, 31, 3), np.uint8), "encoder_pixels"),
            clients.refused(np.zeros((33, 32, 32, 3), np.uint8), "encoder_pixels"),
            clients.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 100_000, status=400),
            clients.raw(HEAD + b"Content-Length: 70000000\r\n\r\n", bytes(1 << 20), status=413),
            clients.raw(HEAD + b"Content-Length: 100\r\n\r\nhalf", status=400, half_close=True),
            clients.raw(HEAD, status=408, pause_s=3.5),
        ]
        mixed = []
        for index, request in enumerate(good):
            mixed.append(request)
            if index % 9 == 8:
                mixed.append(bad[index // 9 % len(bad)])
        clients.run(good[:100])
        clean = clients.run(good)
        unready, over = [], threading.Event()

        def watch():
            while not over.wait(0.05):
                unready.extend([] if server.is_ready(5) else [time.monotonic()])

        watcher = threading.Thread(target=watch)
        watcher.start()
        found = clients.run(mixed)
        over.set()
        watcher.join()
        right = [answer for answer, _ in clean[: len(files)]]
        seconds, number = [], 0
        for request, ((vector, error), taken) in zip(mixed, found, strict=True):
            if request in bad:
                assert error, request
                assert vector is None or np.isnan(vector).all()
                continue
            assert error == b""
            np.testing.assert_allclose(vector, right[number % len(files)][0], rtol=1e-4, atol=1e-5)
            seconds.append(taken)
            number += 1
    assert len(mixed) == 1000
    assert unready == []
    p99_clean, p99 = np.percentile([taken for _, taken in clean], 99), np.percentile(seconds, 99)
    assert p99 <= 1.5 * p99_clean, f"{1000 * p99_clean:.1f} ms alone, {1000 * p99:.1f} ms among bad ones"


def resident(pids):
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


def test_a_minute_of_eight_clients_leaves_nothing_behind(serve, bundle, tmp_path, photo_crops):
    with serve(bundle.path, tmp_path) as running:
        clients = Clients(running)
        requests = [clients.file(encoded(crop, "JPEG")) for crop in photo_crops] * 10
        (worker,) = running.workers()
        pids = [running.process.pid, worker, *children(worker)]
        sizes, end = [], time.monotonic() + 60
        while time.monotonic() < end:
            assert all(answer[1] == b"" for answer, _ in clients.run(requests))
            sizes.append(resident(pids))
        running.process.terminate()
        assert running.process.wait(60) == 0
    assert sizes[-1] <= 1.05 * max(sizes[: len(sizes) // 3 + 1])
