"""Run an artifact on real images, at several batch sizes and on every device asked for, and hold it to the encoder."""

import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mio_export.bundle import Artifact, Format, Manifest, ParitySummary, runtime_of
from mio_export.errors import GateError, MissingBackendError, one_line
from mio_export.evidence.budget import Budget
from mio_export.evidence.report import Evidence, batch_sizes
from mio_export.files import sha256_file, write_text
from mio_export.parity.reference import Reference
from mio_export.parity.report import Comparison, Matrix, ParityReport, compare, relative_errors
from mio_export.preprocess import Pixels
from mio_export.runtimes import BACKENDS, Runtime
from mio_export.runtimes.devices import library_has_cuda
from mio_export.runtimes.opening import open_file

_PACKAGES = (
    "mio-export",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxslim",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
    "pillow",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateResult:
    """What came of running an artifact."""

    report: ParityReport
    embeddings: Matrix | None
    """Of the reference's images at the largest batch size, shape (N, D); None if it did not run."""
    images_per_s: float | None
    """At the largest batch size, while proving; not part of the proof."""


def prove(
    folder: Path,
    artifact: Artifact,
    *,
    manifest: Manifest,
    reference: Reference,
    devices: Sequence[str] = ("cpu",),
    stages: Sequence[Mapping[str, Any]] = (),
    open: Callable[[str], Runtime] | None = None,
) -> GateResult:
    """Compare an artifact with the encoder; what it finds is in the report, never raised.

    Args:
        folder: where the artifact's files lie.
        artifact: what to run, and how; its verdict is not looked at.
        manifest: the batch range and the requirements.
        reference: what to compare with.
        devices: where to run it; what cannot run anywhere here is ``unproven``.
        stages: what the export noted of each of its stages.
        open: gives what runs the artifact on a device; None: this machine, from ``folder``.
    """
    budget = reference.budget(artifact.precision, manifest.requirements)
    found = _Findings(budget, reference)
    ran, unproven = [], []
    for device in devices:
        try:
            with open(device) if open else _opened(folder, artifact, reference, device) as runtime:
                found.look(runtime, device, manifest.max_batch)
            ran.append(device)
        except MissingBackendError as error:
            unproven.append(str(error))
        except GateError as error:
            found.problems.append(str(error))
    report = ParityReport(
        artifact=artifact.file,
        format=artifact.format,
        precision=artifact.precision,
        runtime=artifact.runtime,
        devices=tuple(ran),
        options=artifact.options,
        budget=budget,
        requirements=manifest.requirements,
        own_rms_error=reference.own_rms_error,
        own_row_error=reference.own_row_error,
        comparisons=tuple(found.comparisons),
        golden=found.golden,
        shapes=found.shapes,
        stages=tuple(stages),
        evidence=Evidence(
            artifact_sha256=sha256_file(folder / artifact.file),
            companions={name: sha256_file(folder / name) for name in artifact.companions},
            weights_sha256=reference.weights_sha256,
            images_sha256=reference.images.sha256,
            images=reference.images.description,
            golden_sha256=reference.golden_sha256,
        ),
        versions=versions(),
        problems=tuple(_without(folder, problem) for problem in found.problems),
        unproven=_without(folder, "; ".join(unproven)) if unproven and not ran else None,
    )
    return GateResult(report=report, embeddings=found.embeddings, images_per_s=found.images_per_s)


class _Findings:
    """What is found of one artifact, device by device."""

    def __init__(self, budget: Budget, reference: Reference) -> None:
        self.budget = budget
        self.reference = reference
        self.comparisons: list[Comparison] = []
        self.golden: dict[str, float] = {}
        self.shapes: dict[str, str] = {}
        self.problems: list[str] = list(reference.problems)
        self.embeddings: Matrix | None = None
        self.images_per_s: float | None = None

    def look(self, runtime: Runtime, device: str, max_batch: int) -> None:
        """Compare at every batch size, then look at the golden images and at shapes beyond the contract."""
        for size in batch_sizes(max_batch):
            self._compare(runtime, device, size)
        self._golden(runtime, max_batch)
        self._shapes(runtime, max_batch)

    def _compare(self, runtime: Runtime, device: str, batch_size: int) -> None:
        where = f"batch {batch_size}" + ("" if device == "cpu" else f" on {device}")
        start = time.perf_counter()
        try:
            candidate = embed_in_batches(runtime, self.reference.images.pixels, batch_size)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises on a declared batch size is a finding
            self.problems.append(f"{where}: fails: {type(error).__name__}: {one_line(error)}")
            return
        self.images_per_s = len(candidate) / (time.perf_counter() - start)
        comparison = compare(
            self.reference.embeddings,
            candidate,
            budget=self.budget,
            batch_size=batch_size,
            device=device,
            labels=self.reference.images.labels,
        )
        self.comparisons.append(comparison)
        self.problems += [f"{where}: {problem}" for problem in comparison.problems]
        self.embeddings = candidate if comparison.num_rows else None

    def _golden(self, runtime: Runtime, max_batch: int) -> None:
        """Hold the golden images to the error budget: colour, so that swapped channels show on grey collections too.

        int8 is calibrated on the user's images and has no error budget; of these others only finite rows are asked.
        """
        pixels = np.stack(list(self.reference.golden.values()))
        try:
            candidate = embed_in_batches(runtime, pixels, min(len(pixels), max_batch))
        except Exception:  # noqa: BLE001 - it fails on the other images too, which is said there
            return
        if candidate.shape != self.reference.golden_embeddings.shape:
            return
        errors = relative_errors(self.reference.golden_embeddings, candidate)
        for name, error in zip(self.reference.golden, errors, strict=True):
            self.golden[name] = max(float(error), self.golden.get(name, 0.0))
            bound = self.budget.max_row_error
            if not np.isfinite(error) or (bound is not None and error > bound):
                self.problems.append(f"golden image {name}: relative error {error:.1e}" + _above(bound))

    def _shapes(self, runtime: Runtime, max_batch: int) -> None:
        height, width, channels = runtime.image_shape
        beyond = {
            f"batch {max_batch + 1}": (max_batch + 1, height, width, channels),
            f"height {height + 8}": (2, height + 8, width, channels),
            f"{channels + 1} channels": (2, height, width, channels + 1),
        }
        for name, shape in beyond.items():
            accepted = runtime.accepts((min(shape[0], max_batch + 1), *shape[1:]))
            self.shapes[name] = "accepted" if accepted else "rejected"
            if accepted and not name.startswith("batch"):
                self.problems.append(f"images of {name} are accepted; the contract says {runtime.image_shape}")


def _without(folder: Path, text: str) -> str:
    """Leave out where the bundle lies: a report holds no path of this machine."""
    return text.replace(f"{folder}/", "")


def _above(bound: float | None) -> str:
    return f" is above {bound:.1e}" if bound is not None else ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of every library that the verdict rests on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def embed_in_batches(runtime: Runtime, pixels: Pixels, batch_size: int) -> Matrix:
    """Embed all images in batches of one size; fewer images than one batch are repeated to fill it."""
    num_images = len(pixels)
    if num_images < batch_size:
        pixels = np.resize(pixels, (batch_size, *pixels.shape[1:]))
    starts = range(0, len(pixels), batch_size)
    return np.concatenate([runtime.embed(pixels[start : start + batch_size]) for start in starts])[:num_images]


def _opened(folder: Path, artifact: Artifact, reference: Reference, device: str) -> Runtime:
    return open_file(
        artifact.runtime,
        folder / artifact.file,
        image_shape=reference.images.pixels.shape[1:],
        embedding_dim=reference.embeddings.shape[1],
        device=device,
        options=artifact.options,
        companions=artifact.companions,
    )


def devices_for(format: Format) -> tuple[str, ...]:
    """Return where a format can run on this machine; engines need CUDA, whether it is there or not."""
    library = BACKENDS[runtime_of(format)].library
    if library == "tensorrt":
        return ("cuda",)
    return ("cpu", "cuda") if library_has_cuda(library) else ("cpu",)


def write_report(folder: Path, artifact: Artifact, report: ParityReport) -> ParitySummary:
    """Write a report into a bundle's folder, under a name that its content decides; return the verdict on it."""
    text = report.to_json()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    parts = [artifact.format, artifact.precision, *([artifact.capability] if artifact.capability else [])]
    name = f"parity/{'-'.join(parts)}.json"
    path = folder / name
    if path.is_symlink() or (path.is_file() and sha256_file(path) != sha256):
        name = f"parity/{'-'.join(parts)}-{sha256[:12]}.json"  # a newer verdict never overwrites what a manifest names
    write_text(folder / name, text)
    return ParitySummary(verdict=report.verdict, devices=report.devices, report=name, report_sha256=sha256)
