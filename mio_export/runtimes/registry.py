"""Which backend opens which artifact."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import WEIGHTS, Bundle, Format, Precision, load_bundle
from mio_export.errors import GateError, UsageError
from mio_export.files import sha256_file
from mio_export.runtimes.base import Runtime
from mio_export.runtimes.devices import resolve_device


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to run one format."""

    format: Format | None
    """The artifact that it takes; None: the encoder's own weights."""
    opener: str
    """``module:function`` that opens it; imported only when it is used."""
    library: str
    """What computes: ``torch`` or ``onnxruntime``."""


BACKENDS = {
    "onnxruntime": Backend(
        format="onnx", opener="mio_export.runtimes.onnxruntime:open_onnxruntime", library="onnxruntime"
    ),
    "torchscript": Backend(
        format="torchscript", opener="mio_export.runtimes.torchscript:open_torchscript", library="torch"
    ),
    "torch": Backend(format=None, opener="mio_export.runtimes.torch_eager:open_torch", library="torch"),
}
"""Every backend, the one preferred by ``auto`` first."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, an artifact and a device, all settled."""

    runtime: str
    precision: Precision
    device: str
    file: str
    """What is run, relative to the bundle: an artifact, or the weights for ``torch``."""
    sha256: str
    """Its sha256."""


def choose(bundle: Bundle, runtime: str = "auto", *, precision: str = "auto", device: str = "auto") -> Choice:
    """Settle every ``auto``: the first backend of ``BACKENDS`` for which the bundle holds a proved artifact.

    Raises:
        UsageError: the name is not known, or the bundle has no such artifact.
        MissingBackendError: CUDA is asked for and there is none.
    """
    if precision not in ("auto", "fp32"):
        raise UsageError(f"precision must be auto or fp32, got {precision!r}")
    if runtime != "auto" and runtime not in BACKENDS:
        raise UsageError(f"runtime must be auto, {', '.join(BACKENDS)}; got {runtime!r}")
    settled: Precision = "fp32"
    proved = {a.format for a in bundle.manifest.artifacts if a.precision == settled and a.parity.verdict == "proved"}
    if runtime == "auto":
        runtime = next(name for name, backend in BACKENDS.items() if backend.format is None or backend.format in proved)
    file, sha256 = _target(bundle, BACKENDS[runtime].format, settled)
    resolved = resolve_device(device, library=BACKENDS[runtime].library)
    return Choice(runtime=runtime, precision=settled, device=resolved, file=file, sha256=sha256)


def open_runtime(
    bundle: Bundle | str | Path, runtime: str = "auto", *, precision: str = "auto", device: str = "auto"
) -> Runtime:
    """Open a backend on a bundle.

        with open_runtime("encoder.mio", "onnxruntime") as runtime:
            embeddings = runtime.embed(images)  # uint8 (N, H, W, C) to float32 (N, D)

    Args:
        bundle: a bundle or its path.
        runtime: ``auto``, ``onnxruntime``, ``torchscript`` or ``torch``.
        precision: ``auto`` or ``fp32``.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact.
        MissingBackendError: the backend or the device is not there.
        GateError: the artifact does not load.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    return open_choice(bundle, choose(bundle, runtime, precision=precision, device=device))


def open_choice(bundle: Bundle, choice: Choice) -> Runtime:
    """Open what ``choose`` settled.

    Raises:
        GateError: the file is not the one that was proved.
    """
    if sha256_file(bundle.path / choice.file) != choice.sha256:
        raise GateError(
            f"{bundle.path / choice.file} is not the file that was proved (its sha256 differs); export it again"
        )
    path = bundle.path if BACKENDS[choice.runtime].format is None else bundle.path / choice.file
    return open_file(
        choice.runtime,
        path,
        image_shape=bundle.manifest.preprocess.shape,
        embedding_dim=bundle.manifest.encoder.embedding_dim,
        device=choice.device,
    )


def open_file(
    runtime: str, path: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str = "cpu"
) -> Runtime:
    """Open one artifact, whether or not a bundle holds it yet."""
    module, function = BACKENDS[runtime].opener.split(":")
    opened: Runtime = getattr(importlib.import_module(module), function)(
        path, image_shape=image_shape, embedding_dim=embedding_dim, device=device
    )
    return opened


def _target(bundle: Bundle, format: Format | None, precision: Precision) -> tuple[str, str]:
    if format is None:
        return WEIGHTS, bundle.manifest.weights_sha256
    artifact = bundle.artifact(format, precision)
    return artifact.file, artifact.sha256
