"""What dynamic batching gives, and what the server costs: ResNet-18 at 224 px, fp32, single-image requests over gRPC.

    python benchmarks/serving.py            in the environment with the extra `serve`
    python benchmarks/serving.py --seconds 5

The load is made by Triton's own perf_analyzer (``make peers``), on the machine that serves. Fails below 80 % of the
runtime alone at the batch that formed, and where batching gains less than 80 % of what the runtime alone gains by it.
"""

import argparse
import base64
import csv
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mio_export import export, open_runtime
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.serving import ServeOptions, Server
from mio_export.serving.workspace import Triton

sys.path.insert(0, str(Path(__file__).parent))
PERF_ANALYZER = Path(__file__).parent.parent / ".peers" / "bin" / "perf_analyzer"
CLIENTS = 16
SIZING = (1, 4, 16, 64)
"""Numbers of clients that the advice on sizing is measured at."""
MAX_BATCH = 16
NUM_IMAGES = 8


class Load:
    """Load from perf_analyzer: single images in turn, as pixels or as JPEG files of 640x480."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
            (folder / name).symlink_to(next(Triton.installed().libraries.glob(pattern)))
        rng = np.random.default_rng(0)
        pixels = [rng.integers(0, 256, (224, 224, 3), dtype=np.uint8).tobytes() for _ in range(NUM_IMAGES)]
        files = [jpeg(rng) for _ in range(NUM_IMAGES)]
        self._write("pixels", pixels, [224, 224, 3])
        self._write("jpeg", [struct.pack("<I", len(file)) + file for file in files], [1])

    def run(self, server: Server, kind: str, clients: int) -> dict[str, float]:
        """Return images/s and latencies of some clients, and the mean batch that formed."""
        options, report = server.options, self._folder / "report.csv"
        before = batches(options.metrics_port, server.name)
        command = [PERF_ANALYZER, "-m", server.name + ("_jpeg" if kind == "jpeg" else ""), "-i", "grpc"]
        command += ["-u", f"127.0.0.1:{options.grpc_port}", "--concurrency-range", clients, "-b", 1, "-f", report]
        command += ["--input-data", self._folder / f"{kind}.json", "-p", round(1000 * self._seconds), "-r", 6]
        environment = os.environ | {"LD_LIBRARY_PATH": f"{self._folder}:{Triton.installed().libraries}"}
        done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        (row,) = csv.DictReader(io.StringIO(report.read_text()))
        number, total = (b - a for a, b in zip(before, batches(options.metrics_port, server.name), strict=True))
        return {
            "images_per_s": float(row["Inferences/Second"]),
            "p50_ms": float(row["p50 latency"]) / 1000,
            "p99_ms": float(row["p99 latency"]) / 1000,
            "mean_batch": total / number,
        }

    def _write(self, kind: str, items: list[bytes], shape: list[int]) -> None:
        data = [{"images": {"b64": base64.b64encode(item).decode(), "shape": shape}} for item in items]
        (self._folder / f"{kind}.json").write_text(json.dumps({"data": data}))


def jpeg(rng: np.random.Generator) -> bytes:
    """Return a file of the weight of a photograph: smooth shapes and some grain."""
    small = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    grain = rng.normal(0, 6, (480, 640, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def free_ports() -> dict[str, int]:
    """Return three ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))


@contextmanager
def serving(bundle: Path, *, max_batch: int) -> Iterator[Server]:
    """Start a server with ONNX Runtime."""
    options = ServeOptions(runtime="onnxruntime", device="cpu", max_batch=max_batch, **free_ports())
    with Server(bundle, options) as server:
        yield server


def batches(port: int, model: str) -> tuple[float, float]:
    """Return the number of batches so far, and of images in them."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    found = [re.search(rf'mio_batch_images_{what}{{model="{model}"}} (\S+)', text) for what in ("count", "sum")]
    number, total = (float(match.group(1)) if match else 0.0 for match in found)
    return number, total


def alone(bundle: Path, *, batch: int, seconds: float) -> float:
    """Return images/s of the runtime without a server."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    with open_runtime(bundle, "onnxruntime", device="cpu") as runtime:
        runtime.embed(images)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            runtime.embed(images)
            count += batch
        return count / (time.perf_counter() - start)


def main() -> None:
    """Measure, store, hold to the bounds."""
    from machine import save

    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of one of perf_analyzer's windows; it takes 3 or more"
    )
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        bundle = folder / "resnet18.mio"
        encoder = build_encoder("torchvision/resnet18", Preprocess(image_size=224)).eval()
        export(encoder, bundle, formats=("onnx",), max_batch=MAX_BATCH)
        load = Load(folder, seconds)
        with serving(bundle, max_batch=MAX_BATCH) as server:
            sizing = {
                kind: {str(clients): load.run(server, kind, clients) for clients in SIZING}
                for kind in ("pixels", "jpeg")
            }
        with serving(bundle, max_batch=1) as server:
            single = load.run(server, "pixels", CLIENTS)
        batched = sizing["pixels"][str(CLIENTS)]
        sizes = (1, round(batched["mean_batch"]))
        runtime = {str(size): alone(bundle, batch=size, seconds=3 * seconds) for size in sizes}
    one, many = (runtime[str(size)] for size in sizes)
    results = {
        "clients": sizing,
        "without batching": single,
        "runtime alone, images_per_s by batch": runtime,
        "gain by batching": batched["images_per_s"] / single["images_per_s"],
        "the runtime's own gain": many / one,
        "share of the runtime alone": batched["images_per_s"] / many,
    }
    save("serving", results)
    assert results["gain by batching"] >= 0.8 * results["the runtime's own gain"], results
    assert results["share of the runtime alone"] >= 0.8, results


if __name__ == "__main__":
    main()
