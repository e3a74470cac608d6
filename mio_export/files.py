"""Files and folders that appear whole or not at all, and their hashes."""

import ctypes
import errno
import filecmp
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mio_export.errors import UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MAX_NAME_BYTES = 255
_LEFTOVER_S = 24 * 60 * 60
"""Whoever wrote a staging name may still be at work, here or on another machine, until it is this old."""
_HOST = re.sub(r"[^A-Za-z0-9]+", "", socket.gethostname())[:24] or "host"
_STAGING = re.compile(r"\..+\.tmp-(?P<host>[A-Za-z0-9]+)-(?P<process>[0-9]+)-[0-9a-f]{8}", re.DOTALL)


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return where results that can be computed again may be kept between runs; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mio-export"


def behind_links(path: Path) -> Path:
    """Return the path that a link stands for, whether or not something is there; another path as it is.

    Raises:
        OSError: the links go in a circle.
    """
    if not path.is_symlink():
        return path
    real = Path(os.path.realpath(path))
    if real.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there is synced and renamed, or removed on an error.

    A link at ``path`` stays: what it stands for is written.
    """
    path = behind_links(path)
    temporary = _staging_name(path, "tmp")
    try:
        yield temporary
        sync(temporary)
        _clear_leftovers(temporary, path)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that takes its place at the end, or is removed on an error.

    A folder that already lies at ``path`` is exchanged in one step where the system can do so (Linux). A link at
    ``path`` stays: what it stands for is written. Several writers of one path do not disturb each other, and the last
    one to finish counts. What a killed process left behind is cleared away after a day.

    Args:
        path: where the folder goes.
        replace: whether a folder that holds something may be replaced.

    Raises:
        UsageError: ``path`` is ``.`` or ends in ``..``, or at the end something lies there that may not be replaced.
    """
    path = behind_links(path)
    if path.name in ("", ".."):
        raise UsageError(f"{path} cannot be replaced: it does not say the folder's own name; give that, as in ../NAME")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _staging_name(path, "tmp")
    temporary.mkdir()
    try:
        _clear_leftovers(temporary, path)
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if replace:
            _take_place(temporary, path)
        else:
            _take_free_place(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def same_files(first: Path, second: Path) -> bool:
    """Return whether two folders hold the same files with the same bytes."""
    names, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (first, second)
    )
    return names == others and all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _staging_name(path: Path, kind: str) -> Path:
    """Return a name beside ``path`` that no other process, here or on another machine, chooses."""
    end = f".{kind}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    name = os.fsencode(path.name)[: _MAX_NAME_BYTES - len(end) - 1].decode("utf-8", "ignore")
    return path.with_name(f".{name}{end}")


def _clear_leftovers(own: Path, path: Path) -> None:
    """Remove what processes killed more than a day ago left beside ``path``.

    The age is measured by the disk's own clock, which gave ``own`` its time just now.
    """
    now = own.stat().st_mtime
    older_names = re.compile(re.escape(f".{path.name}.tmp") + r"(?:-[0-9]+)?")  # as earlier versions named them
    with os.scandir(path.parent) as entries:
        found = [entry for entry in entries if _STAGING.fullmatch(entry.name) or older_names.fullmatch(entry.name)]
    for entry in found:
        left = path.parent / entry.name
        if left == own or _is_running(entry.name) or now - _newest_change(left) < _LEFTOVER_S:
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):  # another process was faster, or it is not ours to remove
                left.unlink()


def _is_running(name: str) -> bool:
    """Whether the process that chose a staging name is known to run on this machine."""
    found = _STAGING.fullmatch(name)
    if found is None or found["host"] != _HOST:
        return False
    try:
        os.kill(int(found["process"]), 0)
    except PermissionError:
        return True
    except (OverflowError, ProcessLookupError):
        return False
    return True


def _newest_change(path: Path) -> float:
    """Return when a path, or for a folder anything in it, was last changed; now if that cannot be said."""
    try:
        status = path.lstat()
        within = path.rglob("*") if stat.S_ISDIR(status.st_mode) else ()
        return max([status.st_mtime, *(inner.lstat().st_mtime for inner in within)])
    except OSError:
        return float("inf")  # it vanished, or may not be read


def _take_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; an old folder there ends up at ``new``."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        old = _staging_name(path, "old")
        path.rename(old)
        new.rename(path)
        old.rename(new)


def _take_free_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``, unless something lies there."""
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise UsageError(f"{path} exists by now; choose another -o") from None


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (renameat2); False where that does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


__all__ = [
    "behind_links",
    "cache_folder",
    "same_files",
    "sha256_file",
    "staged_file",
    "staged_folder",
    "sync",
    "write_text",
]
