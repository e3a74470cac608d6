"""A server in a process of its own, and the bundles that it serves; for the benchmarks beside this file."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
SIZE = (640, 480)
"""Width and height of the photographs."""
MAX_BATCH = 16
START_S = 120.0
END_S = 60.0
_MAIN = "import sys; from mio_export.cli.main import main; sys.exit(main())"


@dataclass(frozen=True, kw_only=True)
class Code:
    """A checkout of this repository, and the Python that runs it."""

    tree: Path = ROOT
    python: Path = Path(sys.executable)

    @property
    def is_old(self) -> bool:
        """Whether its server is the one on Triton, with other names and a port of its own for metrics."""
        return not (self.tree / "mio_export" / "serving" / "engine.py").exists()


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    name: str
    models: dict[str, str]
    """The name of the model that takes ``pixels``, and of the one that takes ``files``."""
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Path

    def url(self, scheme: str = "http") -> str:
        """What ``RemoteEncoder`` takes."""
        return f"{scheme}://127.0.0.1:{self.http_port if scheme == 'http' else self.grpc_port}/{self.name}"

    def get(self, path: str, *, port: int | None = None) -> str | None:
        """Return what lies at a path, None where the server does not give it."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http_port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except (OSError, urllib.error.HTTPError):
            return None

    def is_ready(self) -> bool:
        """Whether both models are."""
        return all(self.get(f"/v2/models/{model}/ready") is not None for model in self.models.values())

    def pids(self) -> dict[int, int]:
        """Return the server's processes, and the parent of each."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
        found = {self.process.pid: parents.get(self.process.pid, 0)}
        while more := {pid: parent for pid, parent in parents.items() if parent in found and pid not in found}:
            found |= more
        return found

    def resident_bytes(self) -> int:
        """Return the memory of all its processes together; pages that they share count once."""
        total = 0
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it has ended
                continue
            total += next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
        return total


@contextmanager
def serving(
    bundle: Path, *options: str, code: Code | None = None, cores: Iterable[int] | None = None
) -> Iterator[Running]:
    """Start ``mio serve`` with ONNX Runtime on the processor, or on these cores; wait until it is ready, and end it."""
    code = code or Code()
    http, grpc, metrics = free_ports(3)
    suffixes = {"pixels": "", "files": "_jpeg"} if code.is_old else {"pixels": "_pixels", "files": ""}
    ports = {"http": http, "grpc": grpc} | ({"metrics": metrics} if code.is_old else {})
    arguments = ["serve", str(bundle), "--runtime", "onnxruntime", "--device", "cpu"]
    arguments += [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
    log = bundle.parent / f"server-{http}.log"
    pinned = [] if cores is None else ["taskset", "-c", ",".join(map(str, cores))]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*pinned, code.python, "-c", _MAIN, *arguments, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=code.tree,
            env=os.environ | {"PYTHONPATH": str(code.tree)},
            start_new_session=True,
        )
    running = Running(
        process=process,
        name=bundle.stem,
        models={kind: bundle.stem + suffix for kind, suffix in suffixes.items()},
        http_port=http,
        grpc_port=grpc,
        metrics_port=ports.get("metrics", http),
        log=log,
    )
    try:
        deadline = time.monotonic() + START_S
        while not running.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            print("the server did not end by itself", file=sys.stderr)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@asynccontextmanager
async def watched(server: Running) -> AsyncIterator[dict[str, list[float]]]:
    """Look at readiness and memory while something else happens."""
    seen: dict[str, list[float]] = {"ready": [], "bytes": []}

    async def look() -> None:
        while True:
            seen["ready"].append(float(await asyncio.to_thread(server.get, "/v2/health/ready") is not None))
            seen["bytes"].append(float(await asyncio.to_thread(server.resident_bytes)))
            await asyncio.sleep(0.5)

    task = asyncio.ensure_future(look())
    try:
        yield seen
    finally:
        task.cancel()


def growth(sizes: list[float]) -> float:
    """Return the memory of the last half as a multiple of that before, without the first fifth, which warms up."""
    start, half = len(sizes) // 5, len(sizes) // 2
    return float(np.median(sizes[half:]) / np.median(sizes[start:half]))


def free_ports(number: int) -> list[int]:
    """Return ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def photographs(number: int, seed: int = 0, size: tuple[int, int] = SIZE) -> list[bytes]:
    """Return JPEG files, crops of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos, files = [Image.fromarray(photo) for photo in load_sample_images().images], []
    for index in range(number):
        photo = photos[index % len(photos)]
        height = int(rng.integers(160, photo.height + 1))
        width = height * SIZE[0] // SIZE[1]
        left, top = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).resize(size).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def make_bundle(path: Path, backbone: str, *, side: int, precisions: tuple[str, ...] = ("fp32",)) -> Path:
    """Export an encoder with random weights, whose batch norms have seen photographs."""
    import torch

    from mio_export import export
    from mio_export.models import build_encoder
    from mio_export.preprocess import Preprocess

    images = path.parent / f"{path.stem}-images"
    images.mkdir()
    for index, file in enumerate(photographs(192)):
        (images / f"{index:03d}.jpg").write_bytes(file)
    torch.manual_seed(0)
    stem = "small" if backbone == "small" else "imagenet"
    encoder = build_encoder(backbone, Preprocess(image_size=side, resize_size=side * 8 // 7), stem=stem).train()
    pixels = np.stack([encoder.preprocess.decode(file.read_bytes()) for file in sorted(images.iterdir())[:16]])
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.from_numpy(pixels))
    export(encoder.eval(), path, formats=("onnx",), precisions=precisions, images=images, limit=96, max_batch=MAX_BATCH)
    return path
