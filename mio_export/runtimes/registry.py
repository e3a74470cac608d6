"""Which backend opens which artifact."""

import importlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from mio_export.bundle import WEIGHTS, Artifact, Bundle, Format, Precision, load_bundle, runtime_of
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.evidence import artifact_problems
from mio_export.files import sha256_file
from mio_export.onnx_file import check_onnx
from mio_export.runtimes.base import Runtime
from mio_export.runtimes.devices import devices_of, resolve_device


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
"""Backends that are opened only when they are named: their files hold programs, not only weights and a graph."""


def backend_of(format: Format) -> str:
    """Return the name of the backend that runs a format."""
    return runtime_of(format)


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

    The runtime is the first of ``BACKENDS`` for which the bundle holds a proved artifact, never one of ``NAMED_ONLY``;
    the precision fp32, if any artifact has it; the device CUDA, if it is there and the artifact was proved on it, else
    the CPU.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        MissingBackendError: a device is asked for and is not there.
        GateError: the artifact was not proved on the device that is asked for.
    """
    if precision != "auto" and precision not in get_args(Precision):
        raise UsageError(f"precision must be auto, {', '.join(get_args(Precision))}; got {precision!r}")
    if runtime != "auto" and runtime not in BACKENDS:
        raise UsageError(f"runtime must be auto, {', '.join(BACKENDS)}; got {runtime!r}")
    proved = [
        artifact
        for artifact in bundle.manifest.artifacts
        if artifact.parity.verdict == "proved"
        and _is_meant(runtime, backend_of(artifact.format))
        and artifact.precision == ("fp32" if precision == "auto" else precision)
    ]
    if runtime == "torch" or (not proved and (runtime, precision) in (("auto", "auto"), ("auto", "fp32"))):
        return _eager(bundle, precision, device)
    if not proved:
        raise UsageError(_nothing_proved(bundle, runtime, precision))
    order = list(BACKENDS)
    first = min(proved, key=lambda artifact: order.index(backend_of(artifact.format)))
    return choice_of(first, device=device, bundle=bundle.path)


def choose_elsewhere(bundle: Bundle, runtime: str = "auto", *, precision: str = "auto", device: str = "auto") -> Choice:
    """Settle every ``auto`` as ``choose`` does, for a machine that may have another device; the evidence is checked.

    The device is ``cuda``, if the artifact was proved on it, whether or not it is here.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        GateError: the artifact was not proved on the device that is asked for, or its evidence does not fit.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {device!r}")
    here = choose(bundle, runtime, precision=precision)
    wanted = (here.runtime, here.file, here.sha256)
    rows = [a for a in bundle.manifest.artifacts if (backend_of(a.format), a.file, a.sha256) == wanted]
    if device == "auto":
        device = "cuda" if any("cuda" in row.parity.devices for row in rows) else "cpu"
    choice = replace(here, device=device)
    check_evidence(bundle, choice)
    return choice


def _is_meant(runtime: str, backend: str) -> bool:
    return backend not in NAMED_ONLY if runtime == "auto" else backend == runtime


def _nothing_proved(bundle: Bundle, runtime: str, precision: str) -> str:
    held = [f"{a.format} {a.precision} ({a.parity.verdict})" for a in bundle.manifest.artifacts]
    wanted = " ".join(name for name in (runtime, precision) if name != "auto")
    message = f"{bundle.path} holds no proved {wanted} artifact; it holds: {', '.join(dict.fromkeys(held)) or 'none'}"
    named = {backend_of(a.format) for a in bundle.manifest.artifacts if a.parity.verdict == "proved"} & NAMED_ONLY
    if runtime == "auto" and named:
        message += f"\nauto opens no {' or '.join(sorted(named))}; name it: --runtime {min(named)}"
    return message


def choice_of(artifact: Artifact, *, device: str = "auto", bundle: Path | None = None) -> Choice:
    """Choose the device for an artifact: one that it was proved on.

    Args:
        artifact: a row of a bundle's manifest.
        device: ``auto``: CUDA, if it is there and the artifact was proved on it, else the first that it was proved on.
        bundle: where it lies, for messages.

    Raises:
        UsageError: the device's name is not known.
        MissingBackendError: the device is asked for and is not there.
        GateError: the artifact was not proved, or not on this device.
    """
    runtime = backend_of(artifact.format)
    library = BACKENDS[runtime].library
    proved = artifact.parity.devices if artifact.parity.verdict == "proved" else ()
    if device in devices_of(library) and device not in proved:  # whether or not it is there
        raise GateError(_not_proved(artifact, device, bundle))
    resolved = resolve_device(device, library=library)
    if device == "auto" and proved and resolved not in proved:
        resolved = proved[0]
    if resolved not in proved:
        raise GateError(_not_proved(artifact, resolved, bundle))
    return Choice(
        runtime=runtime,
        precision=artifact.precision,
        device=resolved,
        file=artifact.file,
        sha256=artifact.sha256,
        companions=artifact.companions,
        options=artifact.options,
    )


def _not_proved(artifact: Artifact, device: str, bundle: Path | None) -> str:
    runtime, proof = backend_of(artifact.format), artifact.parity
    named = f" --runtime {runtime}" if runtime in NAMED_ONLY else ""
    proved = f"was proved on {' and '.join(proof.devices) or 'no device'}, not on {device}"
    found = proved if proof.verdict == "proved" else f"is {proof.verdict}"
    return (
        f"{artifact.file} ({artifact.format} {artifact.precision}) {found};"
        f" prove it there: mio verify {bundle or 'NAME.mio'} --images DIR --device {device}{named}"
    )


def _eager(bundle: Bundle, precision: str, device: str) -> Choice:
    """Choose eager PyTorch: the encoder itself, which artifacts are proved against and which needs no proof."""
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
            vectors, errors = runtime.embed_files(["cat.jpg", "dog.png"])  # float32 (N, D), a reason or None each
            vectors = runtime.embed(images)  # uint8 (N, H, W, C), as the bundle's contract decodes them

    Args:
        bundle: a bundle or its path.
        runtime: ``auto`` or a name in ``BACKENDS``.
        precision: ``auto``, ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        device: ``auto``, ``cpu``, ``cuda``, or for ONNX Runtime ``tensorrt``.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        MissingBackendError: the backend or the device is not there.
        GateError: the artifact does not load, is not the file that was proved, or was not proved on the device.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    return open_choice(bundle, choose(bundle, runtime, precision=precision, device=device))


def open_choice(bundle: Bundle, choice: Choice) -> Runtime:
    """Open what ``choose`` settled.

    Raises:
        GateError: a file is not the one that was proved, or the evidence of its proof does not fit it.
    """
    for name, sha256 in {choice.file: choice.sha256, **choice.companions}.items():
        path = bundle.file(name)
        if not path.is_file():
            raise GateError(f"{path} is missing; export it again")
        if sha256_file(path) != sha256:
            raise GateError(f"{path} is not the file that was proved (its sha256 differs); export it again")
    check_evidence(bundle, choice)
    runtime = open_file(
        choice.runtime,
        bundle.path if BACKENDS[choice.runtime].format is None else bundle.path / choice.file,
        image_shape=bundle.manifest.preprocess.shape,
        embedding_dim=bundle.manifest.encoder.embedding_dim,
        device=choice.device,
        options=choice.options,
        companions=choice.companions,
    )
    runtime.preprocess, runtime.max_batch = bundle.manifest.preprocess, bundle.manifest.max_batch
    return runtime


def check_evidence(bundle: Bundle, choice: Choice) -> None:
    """Hold the reports of an artifact to the manifest; the encoder itself has none.

    Raises:
        GateError: they do not fit, or no row of the manifest allows the choice.
    """
    if BACKENDS[choice.runtime].format is None:
        return
    wanted = (choice.runtime, choice.precision, choice.file, choice.sha256)
    for artifact in bundle.manifest.artifacts:
        if (backend_of(artifact.format), artifact.precision, artifact.file, artifact.sha256) == wanted:
            if choice.device not in artifact.parity.devices or artifact.parity.verdict != "proved":
                raise GateError(_not_proved(artifact, choice.device, bundle.path))
            if problems := artifact_problems(bundle, artifact):
                raise GateError("\n     ".join([f"{bundle.path} is refused", *problems[:3]]))
            return
    raise GateError(f"{bundle.path} holds no {choice.file} for {choice.runtime} {choice.precision} any more")


def open_file(
    runtime: str,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    embedding_dim: int,
    device: str = "cpu",
    options: Mapping[str, str] | None = None,
    companions: Collection[str] = (),
) -> Runtime:
    """Open one artifact, whether or not a bundle holds it yet.

    Raises:
        GateError: it does not load, or is a graph that reads other files than its ``companions``.
    """
    if BACKENDS[runtime].format in ("onnx", "openvino"):
        check_onnx(path, companions)
    module, function = BACKENDS[runtime].opener.split(":")
    opened: Runtime = getattr(importlib.import_module(module), function)(
        path, image_shape=image_shape, embedding_dim=embedding_dim, device=device, options=options or {}
    )
    return opened
