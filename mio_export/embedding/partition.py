"""A collection cut into parts, so that several machines embed it, each into a store of its own."""

import hashlib
import re
from collections.abc import Sequence

from mio_export.errors import UsageError
from mio_export.sources import SourceFile
from mio_export.store import Part


def part_of(text: str, files: Sequence[SourceFile]) -> Part:
    """Read ``I/N`` as a part of a collection.

    Raises:
        UsageError: it is no such thing.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise UsageError(f"--shard is I/N, I from 1 to N, such as 1/4; got {text!r}")
    listing = hashlib.sha256()
    for file in files:
        listing.update(f"{file.key}\0".encode())
    return Part(index=index, count=count, num_files=len(files), listing_sha256=listing.hexdigest())


def files_of(part: Part | None, files: Sequence[SourceFile], shard_size: int) -> Sequence[SourceFile]:
    """Return a part's files: whole shards of the collection, in turn."""
    if part is None:
        return files
    starts = range((part.index - 1) * shard_size, len(files), part.count * shard_size)
    return [file for start in starts for file in files[start : start + shard_size]]


def num_files_of(part: Part, shard_size: int) -> int:
    """Return how many files a part has."""
    starts = range((part.index - 1) * shard_size, part.num_files, part.count * shard_size)
    return sum(min(shard_size, part.num_files - start) for start in starts)
