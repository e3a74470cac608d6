"""Any sources, one or several, as one listing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.sources.blob import Blob, local_blob
from mio_export.sources.folder import list_images
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, unreadable
from mio_export.sources.local import file_on_disk
from mio_export.sources.parquet import list_parquet
from mio_export.sources.paths_list import list_paths
from mio_export.sources.remote import is_url, list_remote_folder, open_url, url_name
from mio_export.sources.secrets import without_secrets
from mio_export.sources.tar import list_tar
from mio_export.sources.zip import list_zip

_ARCHIVES: dict[str, Callable[[Blob], Listing]] = {
    ".tar": list_tar,
    ".tar.gz": list_tar,
    ".tgz": list_tar,
    ".zip": list_zip,
    ".parquet": list_parquet,
}
_LISTS = (".txt", ".lst")
_ALLOWED = f"a folder, a list ({', '.join(_LISTS)}), an archive ({', '.join(_ARCHIVES)}), or a URL of one"


def list_sources(specs: Sequence[str | Path]) -> Listing:
    """List one source or several.

    A source is a folder, a list of paths (``.txt``, ``.lst``), a tar file (``.tar``, ``.tar.gz``, ``.tgz``), a zip file
    or a Parquet file; or such a thing behind a URL that fsspec can read, as text. Keys are relative to the source; with
    several, its base name and ``/`` come before them.

    Raises:
        UsageError: there is none, one is missing or of no such kind, or two have the same base name.
        MissingBackendError: a URL needs a package that is not installed; the message names it.
    """
    if not specs:
        raise UsageError(f"no source of images is given; name {_ALLOWED}")
    if len(specs) == 1:
        return _listed(specs[0])
    names = _distinct_names(specs)
    merged = Listing()
    for name, spec in zip(names, specs, strict=True):
        listing = _listed(spec)
        merged.files += [replace(file, key=f"{name}/{file.key}") for file in listing.files]
        merged.ignored += listing.ignored
        merged.unlisted += [f"{name}/{line}" for line in listing.unlisted]
        merged.circles += [f"{name}/{line}" for line in listing.circles]
        merged.replaced += listing.replaced
    merged.files.sort(key=lambda file: file.key.encode())
    return merged


def named(specs: Sequence[str | Path]) -> str:
    """Return sources in words, without what may be secret in a URL."""
    return ", ".join(without_secrets(str(spec)) if "://" in str(spec) else str(spec) for spec in specs)


def _listed(spec: str | Path) -> Listing:
    return _listed_url(spec) if isinstance(spec, str) and _is_remote(spec) else _listed_path(spec)


def _listed_path(spec: str | Path) -> Listing:
    path, shown = _path(spec), named([spec])  # a URL with a slip in it is taken for a path
    ending = _ending(path.name)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # too long a name, or in a folder that may not be searched
        raise UsageError(f"{shown} cannot be examined: {error.strerror or error}") from None
    if is_folder:
        return list_images(path)
    if not is_there:
        raise UsageError(f"{shown} is not a folder of images: it does not exist; a source is {_ALLOWED}")
    if ending is None:
        raise UsageError(f"{shown} is not a folder of images; a source is {_ALLOWED}")
    folder = str(path.parent)
    return _contents(ending, path.name, lambda: local_blob(str(path)), lambda line: file_on_disk(line, folder))


def _listed_url(url: str) -> Listing:
    remote = open_url(url)
    ending = _ending(remote.name)
    if remote.is_folder:
        return list_remote_folder(remote)
    if ending is None:
        raise UsageError(f"{without_secrets(url)} is not a folder of images; a source is {_ALLOWED}")
    return _contents(ending, remote.name, remote.blob, remote.find)


def _contents(ending: str, name: str, open: Callable[[], Blob], find: Callable[[bytes], SourceFile]) -> Listing:
    """List what a file holds; one that cannot be listed is a row with the reason."""
    size, mtime_ns = 0, 0
    try:
        blob = open()
        size, mtime_ns = blob.size, blob.mtime_ns
        listing = list_paths(blob, find) if ending in _LISTS else _ARCHIVES[ending](blob)
        blob.check()
        return listing
    except OSError as error:
        key, reason = key_of(name), without_secrets(error.strerror or str(error))
        row = unreadable(key, f"cannot be listed: {reason}", size=size, mtime_ns=mtime_ns)
        return Listing(files=[row], unlisted=[f"{key}: cannot be listed ({reason})"])


def _ending(name: str) -> str | None:
    return next((ending for ending in (*_LISTS, *_ARCHIVES) if name.lower().endswith(ending)), None)


def _distinct_names(specs: Sequence[str | Path]) -> list[str]:
    names = [_name(spec) for spec in specs]
    for index, name in enumerate(names):
        first = names.index(name)
        if first != index:
            raise UsageError(
                f"two sources are called {name!r} ({named([specs[first], specs[index]])}) and their keys would mix;"
                " rename one, or give them outputs of their own"
            )
    return names


def _name(spec: str | Path) -> str:
    if isinstance(spec, str) and _is_remote(spec):
        return key_of(url_name(spec))
    path = _path(spec)
    return key_of(path.name or path.resolve().name)


def _is_remote(spec: str) -> bool:
    return is_url(spec) and not spec.startswith("file://")


def _path(spec: str | Path) -> Path:
    return Path(spec.removeprefix("file://")) if isinstance(spec, str) else spec


__all__ = ["list_sources", "named"]
