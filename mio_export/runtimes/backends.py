"""Every backend: what it runs, which package carries it, and how to get that."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from mio_export.bundle import Format, runtime_of
from mio_export.errors import MissingBackendError
from mio_export.extras import install_command, is_installed


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
    distributions: tuple[str, ...]
    """Packages that carry it; the first that is installed counts."""
    install: str
    """How to get it."""

    @property
    def is_installed(self) -> bool:
        """Whether its library is there; nothing is imported."""
        return is_installed(self.module)

    @property
    def version(self) -> str | None:
        """Version of its package; None if none is installed. Nothing is imported."""
        found = first_distribution(self.distributions)
        return found[1] if found else None


def first_distribution(names: Sequence[str]) -> tuple[str, str] | None:
    """Return name and version of the first package that is installed; None if none is."""
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


_torch = partial(Backend, library="torch", module="torch", distributions=("torch",), install=install_command("torch"))
_HERE = "mio_export.runtimes"
BACKENDS = {
    "onnxruntime": Backend(
        format="onnx",
        opener=f"{_HERE}.onnxruntime:open_onnxruntime",
        library="onnxruntime",
        module="onnxruntime",
        distributions=("onnxruntime-gpu", "onnxruntime"),
        install=install_command("cpu"),
    ),
    "openvino": Backend(
        format="openvino",
        opener=f"{_HERE}.openvino:open_openvino",
        library="openvino",
        module="openvino",
        distributions=("openvino",),
        install=install_command("openvino"),
    ),
    "tensorrt": Backend(
        format="tensorrt",
        opener=f"{_HERE}.tensorrt:open_tensorrt",
        library="tensorrt",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        install=install_command("tensorrt"),
    ),
    "tensorrt-rtx": Backend(
        format="tensorrt-rtx",
        opener=f"{_HERE}.tensorrt:open_tensorrt_rtx",
        library="tensorrt",
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        install=install_command("tensorrt-rtx"),
    ),
    "pt2": _torch(format="pt2", opener=f"{_HERE}.torch_export:open_pt2"),
    "torchscript": _torch(format="torchscript", opener=f"{_HERE}.torchscript:open_torchscript"),
    "torch": _torch(format=None, opener=f"{_HERE}.torch_eager:open_torch"),
}
"""Every backend, the one preferred by ``auto`` first."""
NAMED_ONLY = frozenset({"pt2", "torchscript"})
"""Backends that are opened only when they are named: their files hold programs, not only weights and a graph."""


def check_installed(format: Format) -> None:
    """Refuse a format whose library is not there.

    Raises:
        MissingBackendError: with the command that installs it.
    """
    backend = BACKENDS[runtime_of(format)]
    if not backend.is_installed:
        raise MissingBackendError(f"{format} needs {backend.module}, which is not installed: {backend.install}")


__all__ = ["BACKENDS", "NAMED_ONLY", "Backend", "check_installed", "first_distribution"]
