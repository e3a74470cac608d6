"""What an fsspec file system says of a file, and what it raises, in one language."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from mio_export.sources.listing import known_ns
from mio_export.sources.secrets import without_secrets

_LONGEST_REASON = 200
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What file systems call the time of the last change; one that they all have is not agreed on."""
_TAGS = ("Last-Modified", "ETag", "etag", "Content-MD5", "md5Hash", "crc32c", "generation", "VersionId", "ino")
"""What else differs where a file was replaced, as far as a file system says it."""
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss"})
"""Listed flat in a few requests, each of which fails as a whole; and a read gives one version of a file, never two."""
WEB = frozenset({"http", "https"})
T = TypeVar("T")


def looked_up(filesystem: Any, path: str) -> Mapping[str, Any]:
    """Return a description as it is now, not as a listing had it that the file system still remembers.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """

    def look() -> Mapping[str, Any]:
        filesystem.invalidate_cache(path)
        info: Mapping[str, Any] = filesystem.info(path)
        return info

    return asked(look)


def kind_of(info: Mapping[str, Any]) -> str:
    """Return ``file``, ``directory``, ``link`` or whatever else it is called."""
    return str(info.get("type", "file"))


def size_of(info: Mapping[str, Any]) -> int | None:
    """Return the length in bytes; None where it does not say."""
    try:
        return max(0, int(info["size"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def version_of(info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what tells a version of a file from another; weak tags may differ from server to server."""
    tags = (f"{name} {info[name]}" for name in _TAGS if info.get(name) is not None)
    return f"{size_of(info)} {_time(info)}", *(tag for tag in tags if " W/" not in tag)


def _time(info: Mapping[str, Any]) -> Any:
    return next((info[name] for name in _TIMES if info.get(name) is not None), None)


def mtime_of(info: Mapping[str, Any]) -> int:
    """Return a time as an integer, however the file system writes it; 0 if it does not say."""
    value = _time(info)
    try:
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(value, datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return known_ns(int(value * 1_000_000) * 1000) if isinstance(value, int | float) else 0
    except (ValueError, OverflowError):  # no date, or none that Python can count
        return 0


def protocols(filesystem: Any) -> frozenset[str]:
    """Return the names that a file system's URLs begin with."""
    protocol = getattr(filesystem, "protocol", ())
    return frozenset((protocol,) if isinstance(protocol, str) else protocol)


def asked(call: Callable[[], T]) -> T:
    """Return what a file system gives.

    Raises:
        OSError: whatever it raised, without what may be secret; the exception itself, which may hold it, is dropped.
    """
    try:
        return call()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
        reason = reason_of(error)
    raise OSError(reason)


def reason_of(error: Exception) -> str:
    """Return what went wrong in one line of UTF-8, without what may be secret."""
    text = str(getattr(error, "strerror", None) or error or type(error).__name__)
    if isinstance(error, FileNotFoundError) and not error.strerror:  # fsspec gives the path and no more,
        text = str(error.__cause__ or "No such file or directory")  # for a server that refuses or is down, too
    text = without_secrets(" ".join(text.split()))[:_LONGEST_REASON]
    return text.encode(errors="backslashreplace").decode()  # a file's name may hold what is no UTF-8


__all__ = [
    "OBJECT_STORES",
    "WEB",
    "asked",
    "kind_of",
    "looked_up",
    "mtime_of",
    "protocols",
    "reason_of",
    "size_of",
    "version_of",
]
