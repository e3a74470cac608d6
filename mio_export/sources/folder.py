"""A folder, listed completely, in one order, without following anything into a loop."""

# works on bytes paths, which pathlib lacks

import os
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.formats import image_suffixes
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing
from mio_export.sources.on_disk import file_on_disk


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
    _walk(str(folder), b"", (), image_suffixes(), listing)
    listing.files.sort(key=lambda file: file.key.encode())
    return listing


def _walk(
    root: str, relative: bytes, ancestors: tuple[tuple[int, int], ...], suffixes: frozenset[str], listing: Listing
) -> None:
    folder = os.path.join(os.fsencode(root), relative)
    try:
        status = os.stat(folder)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            listing.circles.append(f"{key_of(relative)}: a link back into its own folder, not followed")
            return
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        listing.unlisted.append(f"{key_of(relative)}: cannot be listed ({error.strerror})")
        return
    prefix = relative + b"/" if relative else b""
    while entries:  # of a million entries in one folder, those that are done with are let go
        entry = entries.pop()
        path = prefix + entry.name
        if _is_folder(entry):
            _walk(root, path, (*ancestors, identity), suffixes, listing)
        else:
            _add(entry, root, path, suffixes, listing)


def _add(entry: os.DirEntry[bytes], root: str, relative: bytes, suffixes: frozenset[str], listing: Listing) -> None:
    suffix = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
    if suffix in suffixes:
        listing.files.append(file_on_disk(relative, root))
    else:
        listing.ignored[key_of(suffix)] += 1


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


__all__ = ["list_images"]
