"""What a source holds: a row for every image, and a line about everything else."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mio_export.formats import HEIF_HINT, HEIF_SUFFIXES


class Place(Protocol):
    """Where the bytes of one image lie; many threads may read at once."""

    def read(self) -> tuple[bytes, int]:
        """Return all bytes and the time of their last change, in nanoseconds.

        Raises:
            OSError: they cannot be read.
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
    """Size in bytes; of what is there if it is a link without a target, or cut off."""
    mtime_ns: int
    """Time of the last change, in nanoseconds since 1970; 0 where the source does not say."""
    problem: str | None = None
    """Why it cannot be read at all, if that is known already."""

    def read(self) -> tuple[bytes, int]:
        """Return all bytes and the time of their last change at that moment; threads may call it at once.

        Raises:
            OSError: they cannot be read.
        """
        if self.problem is not None or self.place is None:
            raise OSError(self.problem or "there is nothing to read")
        return self.place.read()


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
    """Links that lead back into the tree and were not followed, one line each."""
    replaced: Counter[str] = field(default_factory=Counter)
    """Number of entries that a later one of the same key replaced, by source."""

    def notes(self) -> list[str]:
        """Return what a person should know of what is not in ``files``, a line each."""
        lines = [*self.unlisted, *self.circles]
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


def in_order(files: Mapping[str, SourceFile]) -> list[SourceFile]:
    """Return files by key, sorted bytewise."""
    return [files[key] for key in sorted(files, key=str.encode)]


def unreadable(key: str, reason: str, *, size: int = 0, mtime_ns: int = 0) -> SourceFile:
    """Return the row of an image that cannot be read."""
    return SourceFile(key=key, place=None, size=size, mtime_ns=mtime_ns, problem=reason)


__all__ = ["Listing", "Place", "SourceFile", "in_order", "unreadable"]
