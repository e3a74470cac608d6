"""Which backend opens which artifact."""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from mio_export.bundle import WEIGHTS, Artifact, Bundle, Format, Precision, load_bundle
from mio_export.errors import GateError, MissingBackendError, UsageError
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
    """What computes; see ``devices.resolve_device``."""
    module: str
    """What must be importable."""
    install: str
    """How to get it."""


_TORCH = {"library": "torch", "module": "torch", "install": "pip install torch torchvision"}
_HERE = "mio_export.runtimes"
BACKENDS = {
    "onnxruntime": Backend(
        format="onnx",
        opener=f"{_HERE}.onnxruntime:open_onnxruntime",
        library="onnxruntime",
        module="onnxruntime",
        install="pip install onnxruntime",
    ),
    "openvino": Backend(
        format="openvino",
        opener=f"{_HERE}.openvino:open_openvino",
        library="openvino",
        module="openvino",
        install="pip install 'mio-export[openvino]'",
    ),
    "tensorrt": Backend(
        format="tensorrt",
        opener=f"{_HERE}.tensorrt:open_tensorrt",
        library="tensorrt",
        module="tensorrt",
        install="pip install tensorrt, from the package index of NVIDIA itself",
    ),
    "tensorrt-rtx": Backend(
        format="tensorrt-rtx",
        opener=f"{_HERE}.tensorrt:open_tensorrt_rtx",
        library="tensorrt",
        module="tensorrt_rtx",
        install="pip install 'mio-export[tensorrt-rtx]'",
    ),
    "pt2": Backend(format="pt2", opener=f"{_HERE}.torch_export:open_pt2", **_TORCH),
    "torchscript": Backend(format="torchscript", opener=f"{_HERE}.torchscript:open_torchscript", **_TORCH),
    "torch": Backend(format=None, opener=f"{_HERE}.torch_eager:open_torch", **_TORCH),
}
"""Every backend, the one preferred by ``auto`` first."""
NAMED_ONLY = frozenset({"pt2", "torchscript"})


def backend_of(format: Format) -> str:
    """Return the name of the backend that runs a format."""
    return next(name for name, backend in BACKENDS.items() if backend.format == format)


def check_installed(format: Format) -> None:
    """Refuse a format whose library is not there.

    Raises:
        MissingBackendError: with the command that installs it.
    """
    backend = BACKENDS[backend_of(format)]
    if importlib.util.find_spec(backend.module) is None:
        raise MissingBackendError(f"{format} needs {backend.module}, which is not installed: {backend.install}")


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
    companions: Mapping[str, str] = field(default_factory=dict)
    """Files that it needs beside it, and their sha256."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the backend is told: what it was told when the artifact was proved."""


def choose(bundle: Bundle, runtime: str = "auto", *, precision: str = "auto", device: str = "auto") -> Choice:
    """Settle every ``auto``.

    The runtime is the first of ``BACKENDS`` for which the bundle holds a proved artifact; the precision fp32, if any
    artifact has it; the device CUDA, if it is there and the artifact was proved on it, else the CPU.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        MissingBackendError: a device is asked for and is not there.
    """
    if precision != "auto" and precision not in get_args(Precision):
        raise UsageError(f"precision must be auto, {', '.join(get_args(Precision))}; got {precision!r}")
    if runtime != "auto" and runtime not in BACKENDS:
        raise UsageError(f"runtime must be auto, {', '.join(BACKENDS)}; got {runtime!r}")
    proved = [
        artifact
        for artifact in bundle.manifest.artifacts
        if artifact.parity.verdict == "proved"
        and runtime in ("auto", backend_of(artifact.format))
        and artifact.precision == ("fp32" if precision == "auto" else precision)
    ]
    if runtime == "torch" or (not proved and (runtime, precision) in (("auto", "auto"), ("auto", "fp32"))):
        return _eager(bundle, precision, device)
    if not proved:
        held = [f"{a.format} {a.precision} ({a.parity.verdict})" for a in bundle.manifest.artifacts]
        wanted = " ".join(name for name in (runtime, precision) if name != "auto")
        raise UsageError(
            f"{bundle.path} holds no proved {wanted} artifact; it holds: {', '.join(dict.fromkeys(held)) or 'none'}"
        )
    order = list(BACKENDS)
    return choice_of(min(proved, key=lambda artifact: order.index(backend_of(artifact.format))), device=device)


def choice_of(artifact: Artifact, *, device: str = "auto") -> Choice:
    """Settle the device for an artifact.

    Raises:
        UsageError: the device's name is not known.
        MissingBackendError: the device is asked for and is not there.
    """
    runtime = backend_of(artifact.format)
    resolved = resolve_device(device, library=BACKENDS[runtime].library)
    if device == "auto" and artifact.parity.devices and resolved not in artifact.parity.devices:
        resolved = artifact.parity.devices[0]
    return Choice(
        runtime=runtime,
        precision=artifact.precision,
        device=resolved,
        file=artifact.file,
        sha256=artifact.sha256,
        companions=artifact.companions,
        options=artifact.options,
    )


def _eager(bundle: Bundle, precision: str, device: str) -> Choice:
    if precision not in ("auto", "fp32"):
        raise UsageError(f"runtime torch computes in fp32, got precision {precision!r}")
    resolved = resolve_device(device, library="torch")
    sha256 = bundle.manifest.weights_sha256
    return Choice(runtime="torch", precision="fp32", device=resolved, file=WEIGHTS, sha256=sha256)


def open_runtime(
    bundle: Bundle | str | Path, runtime: str = "auto", *, precision: str = "auto", device: str = "auto"
) -> Runtime:
    """Open a backend on a bundle.

        with open_runtime("encoder.mio", "onnxruntime") as runtime:
            embeddings = runtime.embed(images)  # uint8 (N, H, W, C) to float32 (N, D)

    Args:
        bundle: a bundle or its path.
        runtime: ``auto`` or a name in ``BACKENDS``.
        precision: ``auto``, ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        device: ``auto``, ``cpu``, ``cuda``, or for ONNX Runtime ``tensorrt``.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        MissingBackendError: the backend or the device is not there.
        GateError: the artifact does not load, or is not the file that was proved.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    return open_choice(bundle, choose(bundle, runtime, precision=precision, device=device))


def open_choice(bundle: Bundle, choice: Choice) -> Runtime:
    """Open what ``choose`` settled.

    Raises:
        GateError: a file is not the one that was proved.
    """
    for name, sha256 in {choice.file: choice.sha256, **choice.companions}.items():
        path = bundle.path / name
        if not path.is_file():
            raise GateError(f"{path} is missing; export it again")
        if sha256_file(path) != sha256:
            raise GateError(f"{path} is not the file that was proved (its sha256 differs); export it again")
    return open_file(
        choice.runtime,
        bundle.path if BACKENDS[choice.runtime].format is None else bundle.path / choice.file,
        image_shape=bundle.manifest.preprocess.shape,
        embedding_dim=bundle.manifest.encoder.embedding_dim,
        device=choice.device,
        options=choice.options,
    )


def open_file(
    runtime: str,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    embedding_dim: int,
    device: str = "cpu",
    options: Mapping[str, str] | None = None,
) -> Runtime:
    """Open one artifact, whether or not a bundle holds it yet."""
    module, function = BACKENDS[runtime].opener.split(":")
    opened: Runtime = getattr(importlib.import_module(module), function)(
        path, image_shape=image_shape, embedding_dim=embedding_dim, device=device, options=options or {}
    )
    return opened
