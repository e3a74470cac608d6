"""A real server of a small bundle, in processes of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import urllib3

from mio_export.serving.messages import SERVICE, message, message_class
from mio_export.serving.protocol import HEADER_LENGTH, join, pack, split, unpack

COMMAND = (sys.executable, "-c", "from mio_export.cli.main import main; main()")
START_S = 60


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen
    log: Path
    access: Path
    http_port: int
    grpc_port: int

    @property
    def http(self):
        return f"http://127.0.0.1:{self.http_port}/encoder"

    @property
    def grpc(self):
        return f"grpc://127.0.0.1:{self.grpc_port}/encoder"

    def is_ready(self, timeout_s=2):
        try:
            return get(self.http.replace("/encoder", "/v2/health/ready"), timeout_s).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def metrics(self):
        return get(self.http.replace("/encoder", "/metrics"), 5).data.decode()

    def workers(self):
        """Process ids of the workers."""
        return children(self.process.pid)

    def records(self):
        """The access log, a moment later: it is written now and then."""
        time.sleep(0.3)
        return [json.loads(line) for line in self.access.read_text().splitlines()]

    def connect(self):
        """A bare connection for HTTP."""
        return socket.create_connection(("127.0.0.1", self.http_port), timeout=15)


def get(url, timeout_s):
    with urllib3.PoolManager(retries=False, timeout=timeout_s) as pool:
        return pool.request("GET", url)


def children(pid):
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [int(child) for child, parent in rows if int(parent) == pid]


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def serving(bundle, folder, *options, **environment):
    """Start `mio serve`, wait until it says that it is ready, and end it."""
    command = [*COMMAND, "serve", bundle, "--runtime=onnxruntime"]  # no measuring, unless options say so
    http_port, grpc_port = free_ports(2)
    log, access = folder / "log", folder / "access"
    with log.open("wb") as err, access.open("wb") as out:
        process = subprocess.Popen(
            [*command, f"--http-port={http_port}", f"--grpc-port={grpc_port}", *options],
            stdout=out,
            stderr=err,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        deadline = time.monotonic() + START_S
        while "call it:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Running(process, log, access, http_port, grpc_port)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def infer_http(pool, url, images, *, model="encoder_pixels", headers=None):
    """Embed over HTTP: status, embeddings, reasons."""
    is_files = isinstance(images, list)
    content = pack(images) if is_files else images.tobytes()
    tensor = {
        "name": "images",
        "datatype": "BYTES" if is_files else "UINT8",
        "shape": [len(images), 1] if is_files else [*images.shape],
        "parameters": {"binary_data_size": len(content)},
    }
    body, length = join({"inputs": [tensor], "parameters": {"binary_data_output": True}}, [content])
    path = url.replace("/encoder", f"/v2/models/{model}/infer")
    answer = pool.request("POST", path, body=body, headers={HEADER_LENGTH: str(length), **(headers or {})})
    if answer.status != 200:
        return answer.status, None, answer.data
    outputs = split(answer.data, int(answer.headers[HEADER_LENGTH]), "outputs")["outputs"]
    vectors = np.frombuffer(outputs[0]["data"], np.float32).reshape(outputs[0]["shape"])
    return 200, vectors, [reason.decode() for reason in unpack(outputs[1]["data"])]


def infer_request(images, *, model="encoder_pixels", **fields):
    is_files = isinstance(images, list)
    shape = [len(images), 1] if is_files else images.shape
    return message(
        "ModelInferRequest",
        model_name=model,
        inputs=[{"name": "images", "datatype": "BYTES" if is_files else "UINT8", "shape": shape}],
        raw_input_contents=[pack(images) if is_files else images.tobytes()],
        **fields,
    )


def method(channel, name, *, answer=None, kind="unary_unary", asked=None):
    return getattr(channel, kind)(
        f"/{SERVICE}/{name}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=message_class(answer or f"{name}Response").FromString,
    )


@pytest.fixture(scope="session")
def server(tmp_path_factory, bundle):
    with serving(bundle.path, tmp_path_factory.mktemp("server"), "--runtime=auto") as running:
        yield running


@pytest.fixture(scope="session")
def serve():
    return serving
