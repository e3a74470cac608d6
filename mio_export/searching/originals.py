"""Where the pictures of stored images come from: the sources that were given, and nothing outside them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.searching.thumbnails import Wanted, path_of
from mio_export.sources import SourceFile, list_sources
from mio_export.sources.on_disk import OnDisk, file_on_disk

Find = Callable[[str, int], Wanted]
"""Returns the picture of a stored image from its key and the bytes that it had."""

_NOT_GIVEN = "no source folder was given (--source)"
_MISSING = "file missing from the source folder"
_OUTSIDE = "file lies outside the source (a path with .., an absolute one, or a link that leaves it)"
_RESIZED = "file of another size than when it was embedded"


def originals(sources: str | Path | Sequence[str | Path] | None) -> Find:
    """Return what finds the pictures of stored images in the sources that were embedded.

    Keys come from the store, and a store may be anybody's: what a key or a link leads to counts only if it lies, all
    links resolved, below the folder that was given (of a list: below the list's folder).

    Raises:
        UsageError: one is no source.
        MissingBackendError: a URL needs a package that is not installed.
    """
    specs = [sources] if isinstance(sources, str | Path) else list(sources or ())
    if not specs:
        return lambda key, size: Wanted(file=None, size=size, problem=_NOT_GIVEN)
    if len(specs) == 1 and Path(specs[0]).is_dir():  # a folder of a million files is not listed for a few hundred
        folder = Path(specs[0]).absolute()
        return lambda key, size: _wanted(file_on_disk(os.fsencode(path_of(folder, key)), str(folder)), size)
    try:
        files = {file.key: file for file in list_sources(specs).files}
    except UsageError as error:
        raise UsageError(f"{error}\n--source names the folder that was embedded, or the archive, list or URL") from None
    return lambda key, size: _wanted(files.get(key), size)


def _wanted(file: SourceFile | None, size: int) -> Wanted:
    if file is None or file.problem is not None:
        return Wanted(file=None, size=size, problem=_MISSING)
    if isinstance(file.place, OnDisk) and not _lies_in(file.place):
        return Wanted(file=None, size=size, problem=_OUTSIDE)
    if file.size > size:  # a large file is not read to find that it is not the one
        return Wanted(file=None, size=size, problem=_RESIZED)
    return Wanted(file=file, size=size)


def _lies_in(place: OnDisk) -> bool:
    """Whether a file lies below the folder of its source once every link is resolved."""
    try:
        folder = Path(place.folder).resolve()
        return (folder / place.relative).resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):  # a circle of links
        return False


__all__ = ["Find", "originals"]
