"""A real Triton on a repository: the one that nvidia-pytriton holds, from the environment that `make` builds for it."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MIO_TRITON_PYTHON") or ROOT / ".venv-triton/bin/python")
START_S = 60
_WHERE = "import pytriton, sysconfig; print(pytriton.__file__, sysconfig.get_config_var('LIBDIR'))"


@dataclass(frozen=True)
class Triton:
    """A running server."""

    process: subprocess.Popen
    log: Path
    http_port: int
    grpc_port: int

    def is_ready(self):
        try:
            url = f"http://127.0.0.1:{self.http_port}/v2/health/ready"
            return urllib.request.urlopen(url, timeout=2).status == 200
        except OSError:
            return False

    def models(self):
        """Process ids of its Python models."""
        stub, found = str(self.log.parent / "backends/python/triton_python_backend_stub").encode(), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                if path.read_bytes().startswith(stub):
                    found.append(int(path.parent.name))
        return found


@contextmanager
def running(repository, folder, *models):
    """Start a repository with its own start.sh, and models of other repositories beside it; wait until it is ready.

    Args:
        repository: what ``mio deploy triton`` wrote.
        folder: an empty one, for the log and the backend.
        models: other folders of models.
    """
    found = subprocess.run([PYTHON, "-c", _WHERE], capture_output=True, text=True, check=True)
    file, libraries = found.stdout.split()
    home = Path(file).parent / "tritonserver"
    backend = shutil.copytree(home / "backends", folder / "backends") / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    http_port, grpc_port = _free_ports()
    options = {
        "backend-directory": backend.parent,
        "backend-config": f"python,shm-region-prefix-name=mio-test-{http_port}",
        "http-address": "127.0.0.1",
        "http-port": http_port,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc_port,
        "allow-metrics": "false",
    }
    command = ["sh", repository / "start.sh", *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--model-repository={path}" for path in models]
    environment = {
        **os.environ,
        "MODELS": str(repository / "models"),
        "PATH": f"{home / 'bin'}:{PYTHON.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{home.parents[1] / 'nvidia_pytriton.libs'}:{libraries}",
    }
    environment.pop("PYTHONPATH", None)
    log = folder / "log"
    with log.open("wb") as opened:
        process = subprocess.Popen(command, env=environment, stdout=opened, stderr=subprocess.STDOUT)
    server = Triton(process, log, http_port, grpc_port)
    try:
        deadline = time.monotonic() + START_S
        while not server.is_ready():
            assert process.poll() is None, log.read_text()[-20_000:]
            assert time.monotonic() < deadline, log.read_text()[-20_000:]
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _free_ports():
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
