"""A real server of a small bundle, in a process of its own; these tests run where the extra `serve` is installed."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

MIO = Path(sys.executable).parent / "mio"
START_S = 90


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen
    log: Path
    ports: dict

    @property
    def http(self):
        return f"http://127.0.0.1:{self.ports['http']}/encoder"

    @property
    def grpc(self):
        return f"grpc://127.0.0.1:{self.ports['grpc']}/encoder"

    def metrics(self):
        return urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics", timeout=5).read().decode()

    def is_ready(self):
        try:
            return urllib.request.urlopen(self.http.replace("encoder", "v2/health/ready"), timeout=2).status == 200
        except OSError:
            return False

    def servers(self):
        """Process ids of the children: the server."""
        found = subprocess.run(["ps", "--ppid", str(self.process.pid), "-o", "pid="], capture_output=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def workers(self):
        """Process ids of the workers, and the model of each."""
        tree = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in tree.splitlines()[1:]]
        servers = {str(pid) for pid in self.servers()}
        found = {int(pid): re.search(r"models/([^/]+)/", text) for pid, parent, text in rows if parent in servers}
        return {pid: match.group(1) for pid, match in found.items() if match}


def free_ports():
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(("http", "grpc", "metrics"), ports, strict=True))


@contextmanager
def serving(bundle, log, *options):
    """Start `mio serve`, wait until it says that it is ready, and end it."""
    ports = free_ports()
    arguments = [f"--{name}-port={port}" for name, port in ports.items()]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [MIO, "serve", bundle, "--runtime", "onnxruntime", *arguments, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + START_S
        while "call it:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Running(process, log, ports)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory, bundle):
    with serving(bundle.path, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def serve():
    return serving
