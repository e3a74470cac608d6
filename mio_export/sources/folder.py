"""A folder, listed completely, in one order, every folder once."""

# works on bytes paths, which pathlib lacks

import os
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.image_formats.supported import image_suffixes
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing
from mio_export.sources.local import file_on_disk


def list_images(folder: Path) -> Listing:
    """List a folder and all folders below it, and those that links lead to, each once.

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
    _Walk(os.fsencode(folder), listing).run()
    for found in (listing.unlisted, listing.circles):
        found.sort()
    listing.files.sort(key=lambda file: file.key.encode())
    return listing


_Identity = tuple[int, int]
"""Device and inode of a folder, which all paths to it share."""


@dataclass(frozen=True, slots=True)
class _Folder:
    relative: bytes
    around: "_Folder | None"
    """The folder that it lies in, or that the link to it lies in."""
    identity: _Identity


class _Walk:
    """Lists the folders in the tree itself first, then those that links lead to, in the order of the links' paths.

    A folder that links lead to is listed once, under the first of its paths, however many there are: n folders of two
    links each are n folders, not 2^n.
    """

    def __init__(self, root: bytes, listing: Listing) -> None:
        self._root, self._listing, self._suffixes = root, listing, image_suffixes()
        self._root_text = os.fsdecode(root)  # one text for all files
        self._seen: dict[_Identity, bytes] = {}
        self._links: list[tuple[bytes, _Folder]] = []
        """A heap by path; each with the folder that it lies in."""

    def run(self) -> None:
        """List everything."""
        self._descend(b"", None, is_linked=False)
        while self._links:
            relative, around = heappop(self._links)
            self._descend(relative, around, is_linked=True)

    def _descend(self, relative: bytes, around: _Folder | None, *, is_linked: bool) -> None:
        """List a folder and the real folders in it, without recursion: they may lie thousands deep."""
        stack = [(relative, around)]
        while stack:
            path, above = stack.pop()
            try:
                status = os.stat(os.path.join(self._root, path))
                folder = _Folder(path, above, (status.st_dev, status.st_ino))
                if not self._is_listed(folder, is_linked=is_linked):
                    stack += self._scan(folder)
            except OSError as error:
                self._listing.unlisted.append(f"{key_of(path)}: cannot be listed ({error.strerror or error})")

    def _is_listed(self, folder: _Folder, *, is_linked: bool) -> bool:
        """Whether a folder is listed already, and say so; real ones may share a number where numbers are few."""
        first = self._seen.setdefault(folder.identity, folder.relative)
        if first is folder.relative:
            return False
        name = key_of(folder.relative)
        if _lies_in_itself(folder):
            self._listing.circles.append(f"{name}: a link back into its own folder, not followed")
        elif is_linked:
            self._listing.circles.append(f"{name}: listed already as {key_of(first) or '.'}, not followed")
        else:
            return False
        return True

    def _scan(self, folder: _Folder) -> list[tuple[bytes, _Folder]]:
        """Take in the files of a folder, and return the real folders in it."""
        folders = []
        prefix = folder.relative + b"/" if folder.relative else b""
        with os.scandir(os.path.join(self._root, folder.relative)) as scan:
            for entry in scan:
                path = prefix + entry.name
                if not _is_folder(entry):
                    _add(entry, self._root_text, path, self._suffixes, self._listing)
                elif entry.is_symlink():
                    heappush(self._links, (path, folder))
                else:
                    folders.append((path, folder))
        return folders


def _lies_in_itself(folder: _Folder) -> bool:
    around = folder.around
    while around is not None and around.identity != folder.identity:
        around = around.around
    return around is not None


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
