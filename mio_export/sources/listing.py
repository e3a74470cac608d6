"""What a source holds: a row for every image, and a line about everything else."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mio_export.image_formats.supported import HEIF_HINT, HEIF_SUFFIXES

_LATEST_NS = 2**63 - 1
"""11 April 2262: the last moment that a store's column of 64-bit nanoseconds can hold."""
_LARGEST_BYTES = 2**63 - 1
_LISTED_LINKS = 8


class Place(Protocol):
    """Where the bytes of one image lie; many threads may read at once."""

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return all bytes and the time of their last change, in nanoseconds.

        Args:
            max_bytes: the most that are held in memory; None: no limit.

        Raises:
            OSError: they cannot be read, or are more than ``max_bytes``.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One image: a file, a member of an archive, or a row."""

    key: str
    """Name relative to the source; unique, UTF-8, undecodable bytes and backslashes escaped with a backslash."""
    place: Place | None
    """Where to read it; None where there is nothing to read, and ``problem`` says why."""
    size: int
    """Size in bytes; of what is there if it is a link without a target, or cut off; at most 2^63 - 1."""
    mtime_ns: int
    """Time of the last change, in nanoseconds since 1970, as ``known_ns`` has it."""
    problem: str | None = None
    """Why it cannot be read at all, if that is known already."""

    def __post_init__(self) -> None:
        if not 0 <= self.mtime_ns <= _LATEST_NS:
            object.__setattr__(self, "mtime_ns", 0)
        if not 0 <= self.size <= _LARGEST_BYTES:
            object.__setattr__(self, "size", max(0, min(self.size, _LARGEST_BYTES)))

    def read(self, max_bytes: int | None = None) -> tuple[bytes, int]:
        """Return all bytes and the time of their last change at that moment; threads may call it at once.

        Args:
            max_bytes: the most that are held in memory, whatever an archive or a server claims; None: no limit.

        Raises:
            OSError: they cannot be read, or are more than ``max_bytes``.
        """
        if self.problem is not None or self.place is None:
            raise OSError(self.problem or "there is nothing to read")
        data, mtime_ns = self.place.read(max_bytes)
        return data, known_ns(mtime_ns)


def known_ns(mtime_ns: int) -> int:
    """Return a time in nanoseconds since 1970, or 0 for "not known".

    Times before 1970 and after 11 April 2262, as wrong clocks and damaged headers give them, count as not known: every
    source gives the same, a store's 64-bit column holds it, and a file with such a time is not taken for changed.
    """
    return mtime_ns if 0 <= mtime_ns <= _LATEST_NS else 0


def check_size(size: int, max_bytes: int | None) -> None:
    """Refuse a file that is too large to be read.

    Raises:
        OSError: ``size`` is more than ``max_bytes``.
    """
    if max_bytes is not None and size > max_bytes:
        raise OSError(f"has {size:,} bytes, more than the limit of {max_bytes:,} (--max-file-bytes)")


@dataclass(kw_only=True)
class Listing:
    """What a source holds."""

    files: list[SourceFile] = field(default_factory=list)
    """Every image, readable or not, sorted bytewise by key."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of other files by suffix ("" for none)."""
    unlisted: list[str] = field(default_factory=list)
    """Folders and archives that could not be listed to their end, one line each; what they hold is unknown."""
    circles: list[str] = field(default_factory=list)
    """Links to folders that were not followed, as those are listed already or lie around them, one line each."""
    replaced: Counter[str] = field(default_factory=Counter)
    """Number of entries that a later one of the same key replaced, by source."""

    def notes(self) -> list[str]:
        """Return what a person should know of what is not in ``files``, a line each."""
        lines = [*self.unlisted, *self._links()]
        for name, count in self.replaced.items():
            lines.append(f"{name} holds {count:,} entries whose key comes again; the last of each counts")
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

    def _links(self) -> list[str]:
        if len(self.circles) <= _LISTED_LINKS:
            return self.circles
        names = "; ".join(self.circles[:2])
        return [f"{len(self.circles):,} links to folders were not followed, such as {names}"]


def in_order(files: Mapping[str, SourceFile]) -> list[SourceFile]:
    """Return files by key, sorted bytewise."""
    return [files[key] for key in sorted(files, key=str.encode)]


def unreadable(key: str, reason: str, *, size: int = 0, mtime_ns: int = 0) -> SourceFile:
    """Return the row of an image that cannot be read; a reason that quotes what lies in an archive stays one line."""
    return SourceFile(key=key, place=None, size=size, mtime_ns=mtime_ns, problem=" ".join(reason.split()))


__all__ = ["Listing", "Place", "SourceFile", "check_size", "in_order", "known_ns", "unreadable"]
