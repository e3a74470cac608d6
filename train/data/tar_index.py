"""Where each image of a tar file lies in it, and which label goes with it."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mio_export.errors import MioError
from mio_export.sources import image_suffixes
from mio_export.sources.keys import key_of
from mio_export.sources.tar_entries import DAMAGES, tar_entries
from mio_export.train.data.dataset import damaged

_LARGEST_LABEL_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One image in a tar file."""

    key: str
    """Name of the shard and of the member in it."""
    sample: str
    """What its name and its label's have in common."""
    shard: Path
    offset: int
    """Where the image file begins, in bytes."""
    size: int
    """Length of the image file in bytes."""
    problem: str | None
    """Why it cannot be read at all, if that is known already."""
    label: str | None = None
    """What ``.cls``, or ``label`` in ``.json``, says; None if there is neither."""


def index_tar(path: Path, *, name: str) -> tuple[list[Member], Counter[str]]:
    """List the images of a tar file, in its order, and count what is neither an image nor a label by its suffix.

    A member's suffix begins at the first dot of its name, as webdataset has it: ``0.seg.png`` is a mask that belongs to
    ``0.jpg``, and no image of its own.

    Args:
        path: an uncompressed tar file.
        name: what to call it in the keys.

    Raises:
        MioError: it is no uncompressed tar file, is cut off or damaged, or holds one name twice.
    """
    suffixes = image_suffixes()
    images: list[Member] = []
    ignored: Counter[str] = Counter()
    labels: dict[str, str | None] = {}
    with path.open("rb") as file:
        for header in _headers(path, file):
            sample, suffix = _parted(header.name)
            if suffix in suffixes:
                images.append(_member(path, name, header, sample))
            elif suffix not in (".cls", ".json"):
                ignored[key_of(suffix)] += 1
            elif suffix == ".cls" or labels.get(sample) is None:
                labels[sample] = _label(file, header, suffix)
    _check_unique(path, images)
    return [replace(image, label=labels.get(image.sample)) for image in images], ignored


def _headers(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield all entries but folders, and make sure that the archive was whole."""
    try:
        yield from tar_entries(file)
    except DAMAGES as error:
        raise damaged(path, f"not a whole uncompressed tar file: {error}") from None


def _parted(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", f".{extension.lower()}" if extension else ""


def _label(file: BinaryIO, member: tarfile.TarInfo, suffix: str) -> str | None:
    """Return the label in a ``.cls`` or ``.json``; None if there is none that can be read."""
    if not member.isreg() or member.size > _LARGEST_LABEL_BYTES:
        return None
    data = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        if suffix == ".cls":
            return data.decode().strip() or None
        values = json.loads(data)
    except (ValueError, RecursionError):
        return None
    label = values.get("label") if isinstance(values, dict) else None
    return str(label) if isinstance(label, int | str) else None


def _member(path: Path, name: str, header: tarfile.TarInfo, sample: str) -> Member:
    return Member(
        key=f"{name}/{key_of(header.name)}",
        sample=sample,
        shard=path,
        offset=header.offset_data,
        size=header.size,
        problem=_problem(header),
    )


def _problem(member: tarfile.TarInfo) -> str | None:
    if member.issparse():
        return "stored as a sparse file, which is not read in place"
    return None if member.isreg() else "not a regular file in the tar (a link or a device)"


def _check_unique(path: Path, members: list[Member]) -> None:
    seen: set[str] = set()
    for member in members:
        if member.key in seen:
            raise MioError(f"{path} holds {member.key!r} twice; write it again with one name for each image")
        seen.add(member.key)


__all__ = ["Member", "index_tar"]
