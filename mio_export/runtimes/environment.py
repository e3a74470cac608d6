"""What this machine has: runtimes, devices and extras, and how to get the missing ones."""

import importlib.util
import os
import platform
from dataclasses import dataclass

from mio_export.extras import install_command, is_installed
from mio_export.runtimes.backends import BACKENDS, Backend, first_distribution
from mio_export.runtimes.devices import has_cuda, library_has_cuda, num_threads


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that this machine has or lacks."""

    name: str
    available: bool
    detail: str
    """A version, or what it is good for."""
    remedy: str = ""
    """How to get it, if it is missing."""


def diagnose() -> list[Finding]:
    """Look at this machine; a backend is imported only where there is a GPU that it may use."""
    return [
        Finding(
            name="python",
            available=True,
            detail=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        ),
        Finding(
            name="processor", available=True, detail=f"{num_threads()} of {os.cpu_count()} cores usable by this process"
        ),
        Finding(
            name="CUDA device",
            available=has_cuda(),
            detail="visible to the driver" if has_cuda() else "none",
            remedy="" if has_cuda() else "not needed; with an NVIDIA GPU, install its driver",
        ),
        *(_cuda_build(library) for library in ("torch", "onnxruntime") if has_cuda() and is_installed(library)),
        *(_runtime(name, backend) for name, backend in BACKENDS.items()),
        _package("extra timm", ("timm",), "timm", install_command("timm"), "timm's backbones"),
        _package("extra heic", ("pillow-heif",), "pillow_heif", install_command("heic"), "HEIC and HEIF images"),
        _package(
            "extra signing",
            ("model-signing",),
            "model_signing",
            install_command("signing"),
            "signatures of bundles",
        ),
    ]


def _cuda_build(library: str) -> Finding:
    able = library_has_cuda(library)
    remedy = "" if able else f"install the GPU build of {library}"
    return Finding(name=f"{library} on CUDA", available=able, detail="usable" if able else "CPU build", remedy=remedy)


def _runtime(name: str, backend: Backend) -> Finding:
    return _package(f"runtime {name}", backend.distributions, backend.module, backend.install)


def _package(name: str, distributions: tuple[str, ...], module: str, remedy: str, purpose: str = "") -> Finding:
    carrier = first_distribution(distributions) if importlib.util.find_spec(module) else None
    found = " ".join(carrier) if carrier else None
    detail = found or purpose or "not installed"
    return Finding(name=name, available=found is not None, detail=detail, remedy="" if found else remedy)
