"""Where images come from: a folder, listed completely, in one order, without following anything into a loop."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mio_export.errors import UsageError

T = TypeVar("T")

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".heics", ".heifs", ".hif"})
HEIF_HINT = "HEIC needs the extra: pip install 'mio-export[heic]'"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One discovered file."""

    key: str
    """Path relative to the source; unique, UTF-8, undecodable bytes and backslashes escaped with a backslash."""
    path: Path
    """Where to read it."""
    size: int
    """Size in bytes; of the link itself where its target is missing."""
    mtime_ns: int
    """Time of the last change, in nanoseconds; of the link itself where its target is missing."""
    problem: str | None = None
    """Why it cannot be read at all, if that is known already."""


@dataclass(kw_only=True)
class Listing:
    """What a folder holds."""

    files: list[SourceFile] = field(default_factory=list)
    """Every entry whose suffix is an image's, sorted bytewise by key."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix ("" for none)."""
    unlisted: list[str] = field(default_factory=list)
    """Folders that could not be listed, one line each; what they hold is unknown."""
    circles: list[str] = field(default_factory=list)
    """Links that lead back into the tree and were not followed, one line each."""

    def notes(self) -> list[str]:
        """Return what a person should know of what is not in ``files``, a line each."""
        lines = [*self.unlisted, *self.circles]
        heif = sum(count for suffix, count in self.ignored.items() if suffix in HEIF_SUFFIXES)
        if heif:
            lines.append(f"{heif:,} HEIC files left out: {HEIF_HINT}")
        others = {suffix or "no suffix": n for suffix, n in self.ignored.items() if suffix not in HEIF_SUFFIXES}
        if others:
            named = ", ".join(
                f"{suffix} ({n:,})" for suffix, n in sorted(others.items(), key=lambda item: (-item[1], item[0]))[:8]
            )
            lines.append(f"{sum(others.values()):,} files are not images and were left out: {named}")
        return lines


def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes that Pillow can read here, HEIC's among them if its extra is installed."""
    from PIL import Image

    from mio_export.preprocess import register_heif

    register_heif()
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def list_images(folder: Path) -> Listing:
    """List a folder and all folders below it, links to folders included.

    Raises:
        UsageError: ``folder`` is not a folder that can be listed.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder of images")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be listed: {error.strerror}") from None
    listing = Listing()
    _walk(os.fsencode(folder), b"", (), image_suffixes(), listing)
    listing.files.sort(key=lambda file: file.key.encode())
    return listing


def spread(items: Sequence[T], limit: int) -> list[T]:
    """Return at most ``limit`` items at even distances, in their order.

    Raises:
        UsageError: ``limit`` is below 1.
    """
    if limit < 1:
        raise UsageError(f"limit must be 1 or more, got {limit}")
    if len(items) <= limit:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * limit)] for index in range(limit)]


def read_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Return a regular file's bytes and its status at that moment; never waits on a pipe or a device.

    Raises:
        OSError: it cannot be opened, read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"not a regular file ({_kind(status.st_mode)})")
        return file.read(), status


def _walk(
    root: bytes, relative: bytes, ancestors: tuple[tuple[int, int], ...], suffixes: frozenset[str], listing: Listing
) -> None:
    folder = os.path.join(root, relative) if relative else root
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            listing.circles.append(f"{_key(relative)}: a link back into its own folder, not followed")
            return
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        listing.unlisted.append(f"{_key(relative)}: cannot be listed ({error.strerror})")
        return
    for entry in entries:
        path = os.path.join(relative, entry.name) if relative else entry.name
        if _is_folder(entry):
            _walk(root, path, (*ancestors, identity), suffixes, listing)
        else:
            _add(entry, path, suffixes, listing)


def _add(entry: os.DirEntry[bytes], relative: bytes, suffixes: frozenset[str], listing: Listing) -> None:
    suffix = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
    if suffix not in suffixes:
        listing.ignored[_key(os.fsencode(suffix))] += 1
        return
    size, mtime_ns, problem = _examined(entry)
    path = Path(os.fsdecode(entry.path))
    listing.files.append(SourceFile(key=_key(relative), path=path, size=size, mtime_ns=mtime_ns, problem=problem))


def _examined(entry: os.DirEntry[bytes]) -> tuple[int, int, str | None]:
    """Return size, time of change, and why the file cannot be read, if that is plain already."""
    try:
        status = entry.stat()
    except OSError as error:
        what = "broken link" if entry.is_symlink() else "cannot be examined"
        problem = f"{what} ({error.strerror})"
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # its folder may not be searched, or it is gone by now
            return 0, 0, problem
        return status.st_size, status.st_mtime_ns, problem
    regular = stat.S_ISREG(status.st_mode)
    return status.st_size, status.st_mtime_ns, None if regular else f"not a regular file ({_kind(status.st_mode)})"


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _key(relative: bytes) -> str:
    return relative.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "named pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFBLK: "block device",
        stat.S_IFCHR: "device",
        stat.S_IFDIR: "folder",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


__all__ = ["HEIF_HINT", "Listing", "SourceFile", "image_suffixes", "list_images", "read_file", "spread"]
