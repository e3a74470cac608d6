"""Where the pictures of stored images come from: the sources that were given, and nothing outside them."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from mio_export.errors import UsageError
from mio_export.searching.thumbnails import OUTSIDE, Wanted
from mio_export.sources import SourceFile, list_sources
from mio_export.sources.keys import key_of
from mio_export.sources.local import OnDisk
from mio_export.store import Row

Find = Callable[[Row], Wanted]
"""Returns the picture of a stored image."""

_NOT_GIVEN = "no source folder was given (--source)"
_MISSING = "file missing from the source folder"
_RESIZED = "file of another size than when it was embedded"


def originals(sources: str | Path | Sequence[str | Path] | None) -> Find:
    """Return what finds the pictures of stored images in the sources that were embedded.

    Keys come from the store, and a store may be anybody's: a key opens nothing, it is looked up in the listing of the
    sources, as it is or, where it begins with the path of the source, without that. Of what is listed, a file outside
    the folder (of a list: the list's folder) does not count, unless a link in the folder leads to the very bytes that
    were embedded, whose sha256 the store has: so a folder of links shows its pictures, and a store of somebody else's
    shows nothing that its maker did not have.

    Raises:
        UsageError: one is no source.
        MissingBackendError: a URL needs a package that is not installed.
    """
    specs = [sources] if isinstance(sources, str | Path) else list(sources or ())
    if not specs:
        return lambda row: Wanted(file=None, size=row.size, problem=_NOT_GIVEN)
    try:
        files = {file.key: file for file in list_sources(specs).files}
    except UsageError as error:
        raise UsageError(f"{error}\n--source names the folder that was embedded, or the archive, list or URL") from None
    folder = key_of(str(Path(specs[0]).absolute())) + "/"  # a list may have named its files by absolute paths
    return lambda row: _wanted(files.get(row.key) or files.get(row.key.removeprefix(folder)), row)


def _wanted(file: SourceFile | None, row: Row) -> Wanted:
    if file is None or file.problem is not None:
        return Wanted(file=None, size=row.size, problem=_MISSING)
    sha256 = None
    if isinstance(file.place, OnDisk) and not _lies_in(file.place):
        if not _is_named_in(file.place):
            return Wanted(file=None, size=row.size, problem=OUTSIDE)
        sha256 = row.sha256 or ""
    if file.size > row.size:  # a large file is not read to find that it is not the one
        return Wanted(file=None, size=row.size, problem=_RESIZED)
    return Wanted(file=file, size=row.size, sha256=sha256)


def _lies_in(place: OnDisk) -> bool:
    """Whether a file lies below the folder of its source once every link is resolved."""
    try:
        folder = Path(place.folder).resolve()
        return (folder / place.relative).resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):  # a circle of links
        return False


def _is_named_in(place: OnDisk) -> bool:
    """Whether a file's path stays below the folder of its source, wherever links on it lead."""
    path = PurePath(place.relative)
    return not path.is_absolute() and ".." not in path.parts


__all__ = ["Find", "originals"]
