"""Packages that a plain installation lacks, and the extra of mio-export that installs each."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from mio_export.errors import MissingBackendError

_TORCH = ("torch", "torchvision", "lightly")
EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime",),
    "torch": _TORCH,
    "export": (*_TORCH, "ml_dtypes", "onnx", "onnxscript", "onnxslim"),
    "train": (*_TORCH, "filelock", "pytorch_lightning", "sklearn", "yaml"),
    "heic": ("pillow_heif",),
    "openvino": ("openvino",),
    "ray": ("ray",),
    "signing": ("model_signing",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx",),
    "timm": ("timm",),
}
"""Modules by extra; the first extra that has a module is the smallest."""
_EXTRA_OF = {"mio_export.exporting": "export", "mio_export.train": "train", "mio_export.quickstart": "all"}
"""Packages of ours that need more than the one module that is found missing."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    command = f"pip install 'mio-export[{extra}]'"
    return f"{command}, or 'mio-export[gpu]' for an NVIDIA GPU" if extra == "cpu" else command


def is_installed(module: str) -> bool:
    """Whether a module can be imported, as far as that is known without importing it."""
    return importlib.util.find_spec(module) is not None


def missing_extra(error: ModuleNotFoundError) -> MissingBackendError | None:
    """Return what to tell the user of a module that is not installed; None: no extra installs it."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    if extra is None:
        return None
    wanted = _importing(error.__traceback__)
    if wanted == "all" or module in EXTRAS.get(wanted or "", ()):
        extra = wanted or extra
    return MissingBackendError(f"{module} is not installed: {install_command(extra)}")


@contextmanager
def naming_extras() -> Iterator[None]:
    """Turn the failed import of an optional package into one line that names its extra.

    Raises:
        MissingBackendError: a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error


def _importing(traceback: TracebackType | None) -> str | None:
    """Return the extra of the outermost package of ours that was being imported or run."""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        package = ".".join(name.split(".")[:2])
        if package in _EXTRA_OF:
            return _EXTRA_OF[package]
        traceback = traceback.tb_next
    return None


__all__ = ["EXTRAS", "install_command", "is_installed", "missing_extra", "naming_extras"]
