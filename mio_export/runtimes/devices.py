"""What this machine lets a backend use: processor cores and CUDA devices."""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mio_export.errors import MissingBackendError, UsageError
from mio_export.extras import is_installed

_limit: float = math.inf
_DEVICES = {
    "onnxruntime": ("cpu", "cuda", "tensorrt"),
    "openvino": ("cpu",),
    "tensorrt": ("cuda",),
    "torch": ("cpu", "cuda"),
}


def num_threads() -> int:
    """Return how many threads this process may really use, by its affinity, its cgroup's quota and its own limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = int(min(cores, _limit))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def limit_threads(most: int) -> None:
    """Let this process use at most so many threads, as it shares the machine with others that do the same work."""
    global _limit
    _limit = most


def has_cuda() -> bool:
    """Whether the CUDA driver is installed and sees a GPU; asks the driver itself, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def library_has_cuda(library: str) -> bool:
    """Whether this machine's build of a library (see ``resolve_device``) can use the GPU that the driver sees."""
    if not has_cuda() or library == "openvino":
        return False
    if library == "tensorrt":
        return True
    if not is_installed(library):
        return False
    if library == "torch":
        import torch

        return torch.cuda.is_available()
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def devices_of(library: str) -> tuple[str, ...]:
    """Return where a library (see ``resolve_device``) can run artifacts, here or elsewhere."""
    return _DEVICES[library]


def resolve_device(device: str, *, library: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu``, and check the others.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, or for ONNX Runtime ``tensorrt``, its TensorRT provider.
        library: what will compute, ``torch``, ``onnxruntime``, ``openvino`` or ``tensorrt``.

    Raises:
        UsageError: the name is none of these.
        MissingBackendError: CUDA is asked for and there is none, or the library cannot use it.
    """
    allowed = ("auto", "cpu", "cuda", *(("tensorrt",) if library == "onnxruntime" else ()))
    if device not in allowed:
        raise UsageError(f"device must be {', '.join(allowed)}, got {device!r}")
    if device == "cpu" or (device == "auto" and not library_has_cuda(library)):
        return "cpu"
    if not has_cuda():
        raise MissingBackendError("no CUDA device is visible here; use --device cpu")
    if not library_has_cuda(library):
        raise MissingBackendError(
            f"this build of {library} cannot use CUDA; install the GPU build, or use --device cpu"
        )
    return "cuda" if device == "auto" else device


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and give the caller's number back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def exact_float32(device: str) -> Iterator[None]:
    """Make torch compute in full float32, deterministically: no autocast, no TF32, no choice of algorithm by speed.

    Args:
        device: the type of the device that computes, ``cpu`` or ``cuda``.
    """
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device, enabled=False),
            # TF32 keeps 10 bits of mantissa
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
