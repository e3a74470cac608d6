"""Run an artifact on real images at several batch sizes and hold it to the encoder."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from mio_export.bundle import Format, Precision
from mio_export.errors import GateError
from mio_export.files import sha256_file
from mio_export.models import Encoder
from mio_export.parity.images import ParityImages
from mio_export.parity.report import BUDGETS, Comparison, Matrix, ParityReport, compare
from mio_export.preprocess import Pixels
from mio_export.runtimes import BACKENDS, Runtime
from mio_export.runtimes.devices import resolve_device
from mio_export.runtimes.registry import open_file

_PACKAGES = (
    "mio-export",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "numpy",
    "pillow",
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The encoder's own embeddings of some images: what every artifact is held to."""

    images: ParityImages
    embeddings: Matrix
    """Eager PyTorch, float32, on the CPU; shape (N, D)."""
    weights_sha256: str

    @classmethod
    def of(cls, encoder: Encoder, images: ParityImages, *, weights_sha256: str) -> "Reference":
        """Embed the images with the encoder itself."""
        return cls(images=images, embeddings=encoder.embed(images.pixels, batch_size=32), weights_sha256=weights_sha256)


def prove(
    artifact: Path,
    *,
    format: Format,
    precision: Precision,
    reference: Reference,
    max_batch: int,
    device: str = "cpu",
) -> ParityReport:
    """Compare an artifact with the encoder at every batch size; what it finds is in the report, never raised.

    Args:
        artifact: the file, whether or not a bundle holds it yet.
        format: names the backend that opens it.
        precision: names the budget.
        reference: what to compare with.
        max_batch: largest declared batch.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        MissingBackendError: the backend or the device is not there.
    """
    runtime_name = next(name for name, backend in BACKENDS.items() if backend.format == format)
    device = resolve_device(device, library=BACKENDS[runtime_name].library)
    shape = (reference.images.pixels.shape[1:], reference.embeddings.shape[1])
    comparisons: list[Comparison] = []
    problems: list[str] = []
    try:
        with open_file(runtime_name, artifact, image_shape=shape[0], embedding_dim=shape[1], device=device) as runtime:
            for size in batch_sizes(max_batch):
                comparison = _compare_at(runtime, size, reference, precision)
                if isinstance(comparison, Comparison):
                    comparisons.append(comparison)
                    problems += [f"batch {size}: {problem}" for problem in comparison.problems]
                else:
                    problems.append(comparison)
    except GateError as error:
        problems.append(str(error))
    return ParityReport(
        artifact=artifact.name,
        format=format,
        precision=precision,
        runtime=runtime_name,
        device=device,
        budget=BUDGETS[precision],
        comparisons=tuple(comparisons),
        evidence={
            "artifact_sha256": sha256_file(artifact),
            "weights_sha256": reference.weights_sha256,
            "images_sha256": reference.images.sha256,
            "images": reference.images.description,
        },
        versions=versions(),
        problems=tuple(problems),
    )


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes that an artifact is proved at: 1, 2, 17 and the largest declared."""
    return tuple(sorted({1, min(2, max_batch), min(17, max_batch), max_batch}))


def versions() -> dict[str, str]:
    """Return the versions of Python and of every library that the verdict rests on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _compare_at(runtime: Runtime, batch_size: int, reference: Reference, precision: Precision) -> Comparison | str:
    """Compare at one batch size; a line of text if the backend fails there."""
    try:
        candidate = _embed_in_batches(runtime, reference.images.pixels, batch_size)
    except Exception as error:  # noqa: BLE001 - whatever a backend raises on a declared batch size is a finding
        return f"batch {batch_size}: fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return compare(reference.embeddings, candidate, batch_size=batch_size, budget=BUDGETS[precision])


def _embed_in_batches(runtime: Runtime, pixels: Pixels, batch_size: int) -> Matrix:
    """Embed all images in batches of one size; fewer images than one batch are repeated to fill it."""
    num_images = len(pixels)
    if num_images < batch_size:
        pixels = np.resize(pixels, (batch_size, *pixels.shape[1:]))
    starts = range(0, len(pixels), batch_size)
    return np.concatenate([runtime.embed(pixels[start : start + batch_size]) for start in starts])[:num_images]
