"""A text file that lists images, one path a line."""

import re
from collections.abc import Callable

from mio_export.image_formats.supported import image_suffixes
from mio_export.sources.blob import Blob, read_whole
from mio_export.sources.keys import key_of
from mio_export.sources.listing import Listing, SourceFile, in_order, unreadable
from mio_export.sources.secrets import without_secrets
from mio_export.sources.suffixes import suffix_of

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ADDRESS = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://")
_NOT_FOLLOWED = "a URL; a list names files by their paths from its own folder"


def list_paths(blob: Blob, find: Callable[[bytes], SourceFile]) -> Listing:
    """List the images that a text file names; blank lines and lines that begin with ``#`` are passed over.

    Args:
        blob: the list; lines end with a line feed, or a carriage return and one.
        find: returns the row of a path, which is its key too; one that is missing has a row as well.

    Raises:
        OSError: the list cannot be read.
    """
    lines = read_whole(blob, 0, blob.size).removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    listing, suffixes = Listing(), image_suffixes()
    files: dict[str, SourceFile] = {}
    for line in (line.removesuffix(b"\r") for line in lines):
        if not line.strip() or line.startswith(b"#"):
            continue
        path = line.removeprefix(b"./")
        if is_address := _ADDRESS.match(path):
            path = without_secrets(path.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        suffix = suffix_of(key_of(path))
        if suffix not in suffixes:
            listing.ignored[suffix] += 1
        elif key_of(path) in files:
            listing.replaced[key_of(blob.name)] += 1
        else:
            files[key_of(path)] = unreadable(key_of(path), _NOT_FOLLOWED) if is_address else find(path)
    listing.files = in_order(files)
    return listing


__all__ = ["list_paths"]
