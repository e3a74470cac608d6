"""A folder of image files; class folders give labels, ``train/`` and ``test/`` the parts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from mio_export.errors import MioError
from mio_export.sources import Listing, SourceFile, list_images
from mio_export.train.data.dataset import Data
from mio_export.train.data.part import Labels, fingerprint

HELD_OUT_NAMES = ("test", "val", "valid", "validation")
_HELD_OUT_OF = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderPart:
    """Image files."""

    folder: Path
    files: Sequence[SourceFile]
    labels: Labels | None
    class_names: tuple[str, ...]

    @cached_property
    def keys(self) -> Sequence[str]:
        """Paths relative to the folder."""
        return [file.key for file in self.files]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of paths, sizes and times of change."""
        return fingerprint(self.folder, ((file.key, file.size, file.mtime_ns) for file in self.files))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """Return a file's bytes.

        Raises:
            OSError: it cannot be read, or is not a regular file.
        """
        return self.files[index].read()[0]


def open_folder(folder: Path, listing: Listing | None = None) -> Data:
    """Divide a folder's images into training and test files.

    ``train/`` and ``test/`` (or ``val/``) inside it are taken as they are; otherwise a fifth of the files, chosen by a
    hash of their names, is held out. Class folders below give labels; files that lie flat give none.

    Args:
        folder: where the images lie.
        listing: its listing, if there is one already.

    Raises:
        UsageError: it is no folder.
        MioError: it holds no images, or none for one of the two parts.
    """
    listing = listing or list_images(folder)
    tops = {PurePosixPath(file.key).parts[0] for file in listing.files if "/" in file.key}
    held_out = next((name for name in HELD_OUT_NAMES if name in tops), None)
    prefixed = "train" in tops and held_out is not None
    if prefixed:
        train = [file for file in listing.files if file.key.startswith("train/")]
        test = [file for file in listing.files if file.key.startswith(f"{held_out}/")]
    else:
        train = [file for file in listing.files if not is_held_out(file.key)]
        test = [file for file in listing.files if is_held_out(file.key)]
    if not train or not test:
        message = f"{folder} holds {len(listing.files)} images, too few to train and test on"
        raise MioError("\n".join([message, *listing.notes()]))
    num_outside = len(listing.files) - len(train) - len(test)
    outside = [f"{num_outside:,} images outside train/ and {held_out}/ were left out"] if num_outside else []
    trained, tested = labelled_parts(folder, train, test, lambda file: _class_name(file.key, prefixed))
    return Data(
        kind="folder",
        train=trained,
        labelled=trained,
        test=tested,
        class_names=trained.class_names,
        notes=(*listing.notes(), *outside),
    )


def labelled_parts(
    folder: Path, train: Sequence[SourceFile], test: Sequence[SourceFile], class_of: Callable[[SourceFile], str | None]
) -> tuple[FolderPart, FolderPart]:
    """Return both parts, with labels if every file has a class and there are two classes or more."""
    names = {class_of(file) for file in (*train, *test)}
    class_names = tuple(sorted(name for name in names if name)) if None not in names and len(names) > 1 else ()
    numbers = {name: number for number, name in enumerate(class_names)}

    def part(files: Sequence[SourceFile]) -> FolderPart:
        labels = np.array([numbers[class_of(file) or ""] for file in files], dtype=np.int64) if numbers else None
        return FolderPart(folder=folder, files=files, labels=labels, class_names=class_names)

    return part(train), part(test)


def is_held_out(key: str) -> bool:
    """Whether an image belongs to the fifth that is held out where a data set brings no test part."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % _HELD_OUT_OF == 0


def _class_name(key: str, prefixed: bool) -> str | None:
    """The class folder of a file, below ``train`` or ``test`` if there are such; None if it lies flat."""
    folders = PurePosixPath(key).parts[:-1][1 if prefixed else 0 :]
    return folders[0] if folders else None


__all__ = ["HELD_OUT_NAMES", "FolderPart", "is_held_out", "labelled_parts", "open_folder"]
