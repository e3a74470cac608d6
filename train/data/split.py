"""What every format comes down to: images that have names and are not decoded yet."""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mio_export.preprocess import Pixels

Labels = npt.NDArray[np.int64]


class Part(Protocol):
    """Images of one part of a data set. Reading is safe from several threads at once."""

    @property
    def keys(self) -> Sequence[str]:
        """The name of each image, unique."""

    @property
    def labels(self) -> Labels | None:
        """Class of each image, shape (N,), from 0; None if there are none."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; empty without labels."""

    @property
    def fingerprint(self) -> str:
        """Hash of what is known without reading an image: where the files lie, their names, sizes, times of change."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | Pixels:
        """Return an image file's bytes, or uint8 pixels of shape (H, W, C) where the format holds bare pixels.

        Raises:
            OSError: it cannot be read; the message is the reason.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayPart:
    """Images that a format holds as bare pixels, all of one size."""

    keys: Sequence[str]
    images: Pixels
    """uint8, shape (N, H, W, C); may be a view of a file."""
    labels: Labels | None
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pixels:
        """Return the pixels of an image, shape (H, W, C)."""
        return np.ascontiguousarray(self.images[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class JoinedPart:
    """Several parts one after the other, without labels, since not all of them have any."""

    parts: tuple[Part, ...]

    @property
    def labels(self) -> None:
        """None."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty."""
        return ()

    @cached_property
    def keys(self) -> Sequence[str]:
        """The names in the parts, which must differ between them."""
        return [key for part in self.parts for key in part.keys]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the parts' fingerprints."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((len(part) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> bytes | Pixels:
        """Read from the part in which the image lies."""
        which = bisect.bisect_right(self._starts, index) - 1
        return self.parts[which].read(index - self._starts[which])


def fingerprint(folder: Path, entries: Iterable[tuple[str, int, int]]) -> str:
    """Hash a listing: the folder itself, and name, size in bytes and time of change in ns of what lies in it."""
    digest = hashlib.sha256(repr(str(folder.resolve())).encode())
    for name, size, mtime_ns in entries:
        digest.update(f"{name}\0{size}\0{mtime_ns}\n".encode())
    return digest.hexdigest()


def array_part(
    files: Sequence[Path], blocks: Sequence[Pixels], labels: Labels | None, class_names: tuple[str, ...]
) -> ArrayPart:
    """Return the images of one or more files, shape (N, H, W, C) each, as one part; the keys are ``file/number``."""
    keys = [
        f"{path.name.removesuffix('.gz')}/{number:05d}"
        for path, block in zip(files, blocks, strict=True)
        for number in range(len(block))
    ]
    stats = [(path.name, path.stat()) for path in files]
    return ArrayPart(
        keys=keys,
        images=blocks[0] if len(blocks) == 1 else np.concatenate(blocks),
        labels=labels,
        class_names=class_names,
        fingerprint=fingerprint(files[0].parent, ((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)),
    )


__all__ = ["ArrayPart", "JoinedPart", "Labels", "Part", "array_part", "fingerprint"]
