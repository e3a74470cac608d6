"""Open an artifact: the very file that was proved, with the options that it was proved with."""

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from mio_export.bundle import Bundle, load_bundle
from mio_export.bundle.onnx_file import check_onnx
from mio_export.errors import GateError
from mio_export.extras import naming_extras
from mio_export.files import sha256_file
from mio_export.runtimes.backends import BACKENDS
from mio_export.runtimes.base import Runtime
from mio_export.runtimes.selection import Choice, check_evidence, choose


class Selected:
    """What was chosen of a bundle; its runtime is opened when it is first asked for, and only once.

    A context manager that closes the runtime, if it is open.

    Args:
        bundle: whose artifact.
        choice: which, and how it runs.
        runtime: what runs it, if it is open already; it is closed with this object.
    """

    def __init__(self, bundle: Bundle, choice: Choice, runtime: Runtime | None = None) -> None:
        self.bundle, self.choice = bundle, choice
        self._runtime = runtime

    @property
    def runtime(self) -> Runtime:
        """What runs it; errors as in ``open_choice``."""
        if self._runtime is None:
            self._runtime = open_choice(self.bundle, self.choice)
        return self._runtime

    def close(self) -> None:
        """Close the runtime, if it is open."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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


def open_choice(bundle: Bundle, choice: Choice, *, checked: set[str] | None = None) -> Runtime:
    """Open what ``choose`` resolved.

    Args:
        bundle: whose artifact.
        choice: which, and how it runs.
        checked: names of files whose sha256 was compared just now; those that are compared here are added.

    Raises:
        GateError: a file is not the one that was proved, or the evidence of its proof does not fit it.
    """
    checked = set() if checked is None else checked
    for name, sha256 in {choice.file: choice.sha256, **choice.companions}.items():
        path = bundle.file(name)
        if not path.is_file():
            raise GateError(f"{path} is missing; export it again")
        if name not in checked and sha256_file(path) != sha256:
            raise GateError(f"{path} is not the file that was proved (its sha256 differs); export it again")
        checked.add(name)
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
        MissingBackendError: the backend is not installed.
    """
    if BACKENDS[runtime].format in ("onnx", "openvino"):
        check_onnx(path, companions)
    module, function = BACKENDS[runtime].opener.split(":")
    with naming_extras():
        opened: Runtime = getattr(importlib.import_module(module), function)(
            path, image_shape=image_shape, embedding_dim=embedding_dim, device=device, options=options or {}
        )
    return opened


__all__ = ["Selected", "open_choice", "open_file", "open_runtime"]
