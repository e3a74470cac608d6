"""What dynamic batching gives, and what the server costs: ResNet-18 at 224 px, fp32, 16 clients with one image each.

    python benchmarks/serving.py            in the environment with the extra `serve`
    python benchmarks/serving.py --seconds 5

Fails below 1.3 times the throughput without batching, and below 80 % of the runtime alone at the batch that formed.
"""

import argparse
import re
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

from mio_export import export, open_runtime
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.serving import RemoteEncoder, ServeOptions, Server

sys.path.insert(0, str(Path(__file__).parent))
CLIENTS = 16
MAX_BATCH = 16


def free_ports() -> dict[str, int]:
    """Return three ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))


def served(bundle: Path, *, max_batch: int, seconds: float) -> dict[str, float]:
    """Return images/s through the server, and the mean batch that formed."""
    options = ServeOptions(runtime="onnxruntime", device="cpu", max_batch=max_batch, **free_ports())
    with Server(bundle, options) as server:
        before = batches(options.metrics_port)
        counts, stop = [0] * CLIENTS, time.perf_counter() + seconds

        def ask(index: int) -> None:
            image = np.random.default_rng(index).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
            with RemoteEncoder(server.grpc_url) as encoder:
                while time.perf_counter() < stop:
                    encoder.embed(image)
                    counts[index] += 1

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(CLIENTS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - start
        number, total = (b - a for a, b in zip(before, batches(options.metrics_port), strict=True))
        return {"images_per_s": sum(counts) / taken, "mean_batch": total / number}


def batches(port: int) -> tuple[float, float]:
    """Return the number of batches so far, and of images in them."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    found = [re.search(rf'mio_batch_images_{what}{{model="resnet18"}} (\S+)', text) for what in ("count", "sum")]
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
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        bundle = Path(folder) / "resnet18.mio"
        encoder = build_encoder("torchvision/resnet18", Preprocess(image_size=224)).eval()
        export(encoder, bundle, formats=("onnx",), max_batch=MAX_BATCH)
        batched = served(bundle, max_batch=MAX_BATCH, seconds=seconds)
        single = served(bundle, max_batch=1, seconds=seconds)
        runtime = alone(bundle, batch=round(batched["mean_batch"]), seconds=seconds)
    gain, share = batched["images_per_s"] / single["images_per_s"], batched["images_per_s"] / runtime
    results = {"batched": batched, "single": single, "runtime_images_per_s": runtime, "gain": gain, "share": share}
    save("serving", results)
    assert gain >= 1.3, gain
    assert share >= 0.8, share


if __name__ == "__main__":
    main()
