"""Lack of memory: how libraries say it, and how much is left."""

import errno
import os
import re
from pathlib import Path

_SAYS_SO = re.compile(
    r"out of memory|outofmemory|not enough memory|insufficient memory|bad_alloc|bad allocation|memory allocation"
    r"|decoder error -9"  # Pillow's, of TIFF
    r"|(can't|cannot|could not|failed to|unable to) allocate|alloc_failed",
    re.IGNORECASE,
)
_GROUPS = Path("/sys/fs/cgroup")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, in the words of whatever library raised it."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return _SAYS_SO.search(f"{type(error).__name__}: {error}") is not None


def free_bytes() -> int | None:
    """Return how much memory this process can still take, in bytes; None if the system does not say."""
    known = [free for free in (_of_machine(), _of_group(), _of_process()) if free is not None]
    return min(known, default=None)


def held_bytes() -> int:
    """Return the size of this process's address space, which ``ulimit -v`` limits.

    Raises:
        OSError: the system does not say.
    """
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_group() -> int | None:
    """Return what a container's limit leaves; its file cache counts as free."""
    try:
        path = next(
            line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
        ).lstrip("/")
        folder = next(place for place in (_GROUPS / path, _GROUPS) if (place / "memory.max").exists())
        limit = int((folder / "memory.max").read_text())  # "max" is no number
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(statistics.get("inactive_file", 0)))
    except (OSError, StopIteration, ValueError):
        return None


def _of_process() -> int | None:
    """Return what ``ulimit -v`` leaves."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return None if limit == resource.RLIM_INFINITY else max(0, limit - held_bytes())
    except (ImportError, OSError):
        return None


__all__ = ["free_bytes", "held_bytes", "lacks_memory"]
