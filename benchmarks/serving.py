"""What the server costs: its throughput and latency beside the runtime alone, and beside an older server.

    python benchmarks/serving.py [--old CHECKOUT --old-python PYTHON] [--seconds 1.5] [--rounds 2] [--only small]

ResNet-18 at 224 px in fp32 and int8, and a small encoder at 28 px, on the processor; one image in a request, pixels or
JPEG files of 640x480. The load is made by Triton's own perf_analyzer (``make peers``), on the machine that serves. Old
and new take turns (old new, old new), and the runtime alone is measured after each turn, at the batch that formed.
Fails, after everything is stored, where a bound is missed.
"""

import argparse
import base64
import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from served import ROOT, Code, Running, make_bundle, photographs, serving

PERF_ANALYZER = ROOT / ".peers" / "bin" / "perf_analyzer"
SIDES = {"resnet18": 224, "small": 28}
NUM_IMAGES = 8
LEAST_SHARE = 0.95
"""Of the runtime alone at the batch that formed; where there are four clients or more, and an image costs something."""
LEAST_RATE = 1000
"""Images/s of the small encoder with eight clients."""
MOST_ADDED_MS = 1.5
"""What the server may add to the runtime's median, with one client."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured at once."""

    encoder: str
    precision: str
    protocol: str
    kind: str
    clients: int


CELLS = [
    *(
        Cell(encoder="resnet18", precision=precision, protocol=protocol, kind=kind, clients=clients)
        for precision in ("fp32", "int8")
        for kind in ("pixels", "files")
        for protocol, numbers in (("grpc", (1, 4, 16, 64)), ("http", (16,)))
        for clients in numbers
    ),
    *(
        Cell(encoder="small", precision="fp32", protocol=protocol, kind=kind, clients=clients)
        for kind, numbers in (("pixels", (1, 8)), ("files", (8,)))
        for protocol in ("grpc", "http")
        for clients in numbers
    ),
]


class Load:
    """Load from perf_analyzer: single images in turn."""

    def __init__(self, folder: Path, python: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._libraries = libraries(python)
        for name, pattern in (("libb64.so.0d", "libb64-*"), ("libcudart.so.12", "libcudart-*")):
            (folder / name).symlink_to(next(self._libraries.glob(pattern)))
        rng = np.random.default_rng(0)
        for encoder, side in SIDES.items():
            pixels = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes() for _ in range(NUM_IMAGES)]
            self._write(f"{encoder}-pixels", pixels, [side, side, 3])
        files = photographs(NUM_IMAGES, seed=1)
        for encoder in SIDES:
            self._write(f"{encoder}-files", [struct.pack("<I", len(file)) + file for file in files], [1])

    def run(self, server: Running, cell: Cell) -> dict[str, float]:
        """Return images/s, latencies, and the mean batch that formed."""
        port = server.grpc_port if cell.protocol == "grpc" else server.http_port
        report, data = self._folder / "report.csv", self._folder / f"{cell.encoder}-{cell.kind}.json"
        command = [PERF_ANALYZER, "-m", server.models[cell.kind], "-i", cell.protocol, "-u", f"127.0.0.1:{port}"]
        command += ["--concurrency-range", cell.clients, "-b", 1, "-f", report, "--input-data", data]
        command += ["-p", round(1000 * self._seconds), "-s", 999]  # three windows, however much they differ
        environment = os.environ | {"LD_LIBRARY_PATH": f"{self._folder}:{self._libraries}"}
        before = batches(server)
        done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{cell}\n{done.stdout}{done.stderr}")
        (row,) = csv.DictReader(io.StringIO(report.read_text()))
        number, total = (b - a for a, b in zip(before, batches(server), strict=True))
        return {
            "images_per_s": float(row["Inferences/Second"]),
            "p50_ms": float(row["p50 latency"]) / 1000,
            "p99_ms": float(row["p99 latency"]) / 1000,
            "mean_batch": total / number,
        }

    def _write(self, name: str, items: list[bytes], shape: list[int]) -> None:
        data = [{"images": {"b64": base64.b64encode(item).decode(), "shape": shape}} for item in items]
        (self._folder / f"{name}.json").write_text(json.dumps({"data": data}))


def libraries(python: Path) -> Path:
    """Return the folder of the libraries that perf_analyzer needs, which come with Triton's package."""
    for environment in (ROOT / ".venv-triton", python.parent.parent):
        for found in environment.glob("lib/python*/site-packages/nvidia_pytriton.libs"):
            return found
    raise SystemExit("perf_analyzer needs the libraries of nvidia-pytriton: name the old server's --old-python")


def batches(server: Running) -> tuple[float, float]:
    """Return the number of batches so far, and of images in them, over the models that count them."""
    text = server.get("/metrics", port=server.metrics_port) or ""
    number, total = (
        sum(map(float, re.findall(rf"^mio_batch_images_{what}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for what in ("count", "sum")
    )
    return number, total


def alone(bundle: Path, precision: str, *, batch: int, seconds: float) -> dict[str, float]:
    """Return images/s and the median latency of the runtime without a server."""
    from mio_export import open_runtime

    side, times = SIDES[bundle.stem], []
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    with open_runtime(bundle, "onnxruntime", precision=precision, device="cpu") as runtime:
        for _ in range(3):
            runtime.embed(images)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            runtime.embed(images)
            times.append(time.perf_counter() - start)
    return {"batch": batch, "images_per_s": batch / mean(times), "p50_ms": 1000 * median(times)}


def measured(
    cell: Cell, servers: dict[str, Running], load: Load, bundle: Path, *, rounds: int, seconds: float
) -> dict[str, object]:
    """Measure a cell in turns; return the means of all turns and the ratios."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in [*servers, "runtime"]}
    for _ in range(rounds):
        for name, server in servers.items():
            turns[name].append(load.run(server, cell))
        batch = max(1, round(turns["new"][-1]["mean_batch"]))
        turns["runtime"].append(alone(bundle, cell.precision, batch=batch, seconds=seconds))
    found = {name: {key: mean(turn[key] for turn in runs) for key in runs[0]} for name, runs in turns.items()}
    row: dict[str, object] = asdict(cell) | found
    rate, runtime = found["new"]["images_per_s"], found["runtime"]
    if "old" in servers:
        pairs = zip(turns["new"], turns["old"], strict=True)
        row["times the old server, by turn"] = [new["images_per_s"] / old["images_per_s"] for new, old in pairs]
    if cell.kind == "pixels":
        row["share of the runtime alone"] = rate / runtime["images_per_s"]
        if cell.clients == 1:
            row["added_ms"] = found["new"]["p50_ms"] - runtime["p50_ms"]
    print(json.dumps(row), flush=True)
    return row


def short(row: dict[str, object]) -> list[str]:
    """Return the bounds that a cell misses."""
    name = " ".join(str(row[key]) for key in ("encoder", "precision", "protocol", "kind", "clients"))
    missed = []
    times = row.get("times the old server, by turn", [1.0])
    if row["encoder"] == "resnet18" and max(times) < 1:
        missed.append(f"{name}: {mean(times):.3f} times the old server, and slower in every turn")
    share = row.get("share of the runtime alone", 1.0)
    if row["encoder"] == "resnet18" and int(row["clients"]) >= 4 and share < LEAST_SHARE:
        missed.append(f"{name}: {share:.3f} of the runtime alone")
    if float(row.get("added_ms", 0.0)) > MOST_ADDED_MS:
        missed.append(f"{name}: {row['added_ms']:.2f} ms above the runtime alone")
    rate = row["new"]["images_per_s"]
    if row["encoder"] == "small" and row["clients"] == 8 and row["kind"] == "pixels" and rate < LEAST_RATE:
        missed.append(f"{name}: {rate:.0f} images/s")
    return missed


def main() -> None:
    """Measure, store, hold to the bounds."""
    from machine import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="checkout of an older version to compare with")
    parser.add_argument("--old-python", type=Path, help="its Python  [default: CHECKOUT/.venv-serve/bin/python]")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a window; perf_analyzer takes three")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--cells", type=int, help="measure only so many, and store nothing")
    options = parser.parse_args()
    codes = {"new": Code()}
    if options.old:
        python = options.old_python or options.old / ".venv-serve" / "bin" / "python"
        codes = {"old": Code(tree=options.old.resolve(), python=python.absolute()), **codes}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = Load(folder, next(iter(codes.values())).python, options.seconds)
        for encoder, side in SIDES.items():
            if options.only not in (None, encoder):
                continue
            cells = [cell for cell in CELLS if cell.encoder == encoder][: options.cells]
            precisions = tuple(dict.fromkeys(cell.precision for cell in cells))
            bundle = make_bundle(folder / f"{encoder}.mio", encoder, side=side, precisions=precisions)
            for precision in precisions:
                with ExitStack() as stack:
                    servers = {
                        name: stack.enter_context(serving(bundle, "--precision", precision, code=code))
                        for name, code in codes.items()
                    }
                    for cell in (cell for cell in cells if cell.precision == precision):
                        times = {"rounds": options.rounds, "seconds": options.seconds}
                        rows.append(measured(cell, servers, load, bundle, **times))
    missed = [line for row in rows for line in short(row)]
    if options.cells is None:
        save("serving", {"bounds missed": missed, "cells": rows})
    if missed:
        raise SystemExit("\n".join(["bounds missed:", *missed]))


if __name__ == "__main__":
    main()
