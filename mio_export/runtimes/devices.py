"""What this machine lets a backend use: processor cores and CUDA devices."""

import ctypes
import math
import os
from pathlib import Path

from mio_export.errors import MissingBackendError, UsageError


def num_threads() -> int:
    """Return how many threads this process may really use, by its affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def has_cuda() -> bool:
    """Whether the CUDA driver is installed and sees a GPU; asks the driver itself, without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def resolve_device(device: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu``, and check the others.

    Raises:
        UsageError: the name is not auto, cpu or cuda.
        MissingBackendError: CUDA is asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not has_cuda():
        raise MissingBackendError("no CUDA device is visible here; use --device cpu")
    if device == "auto":
        return "cuda" if has_cuda() else "cpu"
    return device
