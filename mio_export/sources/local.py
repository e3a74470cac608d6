"""One file on this machine's disk."""

# works on bytes paths and descriptors, which pathlib lacks

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mio_export.sources.keys import key_of
from mio_export.sources.limited import read_up_to
from mio_export.sources.listing import SourceFile, check_size


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A file."""

    folder: str
    """Shared by all files of a source."""
    relative: str
    """Path from there; where nothing in it is escaped, the very text of the key."""

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return a regular file's bytes and the time of its last change, in nanoseconds.

        Raises:
            OSError: it cannot be opened, read, is not a regular file, or has more than ``max_bytes``.
        """
        data, status = read_file(os.path.join(self.folder, self.relative), max_bytes)
        return data, status.st_mtime_ns


def read_file(path: str | Path, max_bytes: int | None = None) -> tuple[bytes, os.stat_result]:
    """Return a regular file's bytes and its status at that moment; never waits on a pipe or a device.

    Args:
        path: of the file.
        max_bytes: the most that are held in memory; None: no limit.

    Raises:
        OSError: it cannot be opened, read, is not a regular file, or has more than ``max_bytes``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"not a regular file ({_kind(status.st_mode)})")
        if max_bytes is None:
            return file.read(), status
        check_size(status.st_size, max_bytes)
        data = file.read(status.st_size + 1)
        if len(data) > status.st_size:  # it grows
            data += read_up_to(file, max_bytes + 1 - min(len(data), max_bytes))
            check_size(len(data), max_bytes)
        return data, status


def file_on_disk(relative: bytes, folder: str) -> SourceFile:
    """Return the row of a file below a folder, with the reason if it is plain already that it cannot be read."""
    key, path = key_of(relative), os.fsdecode(relative)
    size, mtime_ns, problem = _examined(os.path.join(folder, path))
    place = OnDisk(folder, key if key == path else path)  # one text for both: there may be millions
    return SourceFile(key=key, place=place, size=size, mtime_ns=mtime_ns, problem=problem)


def _examined(path: str) -> tuple[int, int, str | None]:
    try:
        status = os.stat(path)
    except OSError as error:
        what = "broken link" if os.path.islink(path) else "cannot be examined"
        problem = f"{what} ({error.strerror})"
        try:
            status = os.lstat(path)
        except OSError:  # its folder may not be searched, or it is gone by now
            return 0, 0, problem
        return status.st_size, status.st_mtime_ns, problem
    except ValueError as error:  # a null byte in a list
        return 0, 0, f"not a path ({error})"
    regular = stat.S_ISREG(status.st_mode)
    return status.st_size, status.st_mtime_ns, None if regular else f"not a regular file ({_kind(status.st_mode)})"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "named pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFBLK: "block device",
        stat.S_IFCHR: "device",
        stat.S_IFDIR: "folder",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


__all__ = ["OnDisk", "file_on_disk", "read_file"]
