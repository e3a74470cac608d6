"""A folder of image files; class folders give labels, ``train/`` and ``test/`` the parts."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from mio_export.errors import MioError
from mio_export.sources import Listing, SourceFile, list_images
from mio_export.train.data.dataset import Data
from mio_export.train.data.split import Labels, fingerprint

HELD_OUT_NAMES = ("test", "val", "valid", "validation")
UNLABELLED_NAMES = ("unlabelled", "unlabeled")
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

    ``train/`` and ``test/`` (or ``val/``) inside it are taken as they are; otherwise a fifth of the files, of
    ``train/`` if there is one, is held out, chosen by a hash of their names. Class folders below give labels; files
    that lie flat give none. ``unlabelled/`` beside class folders or parts is no class, and left out.

    Args:
        folder: where the images lie.
        listing: its listing, if there is one already.

    Raises:
        UsageError: it is no folder.
        MioError: it holds no images, or none for one of the two parts.
    """
    listing = listing or list_images(folder)
    layout = _layout(listing.files)
    files = [file for file in listing.files if layout.is_used(file)]
    train = [file for file in files if not layout.is_test(file)]
    test = [file for file in files if layout.is_test(file)]
    if not train or not test:
        message = f"{folder} holds {len(listing.files)} images, too few to train and test on"
        raise MioError("\n".join([message, *listing.notes()]))
    trained, tested = labelled_parts(folder, train, test, layout.class_of)
    return Data(
        kind="folder",
        train=trained,
        labelled=trained,
        test=tested,
        class_names=trained.class_names,
        notes=(*listing.notes(), *layout.notes(files, num_outside=len(listing.files) - len(files))),
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What the folders in a data set's folder stand for."""

    train: str | None
    """Folder of the training part; None: there are no parts, class folders lie at the top."""
    held_out: str | None
    """Folder of the test part; None: a fifth is held out."""
    unlabelled: bool = False
    """Whether a folder of that name is left out because others hold classes."""

    def is_used(self, file: SourceFile) -> bool:
        if self.train is not None and (_top(file) or "") not in (self.train, self.held_out):
            return False
        return not (self.unlabelled and (self.class_of(file) or "").lower() in UNLABELLED_NAMES)

    def is_test(self, file: SourceFile) -> bool:
        return is_held_out(file.key) if self.held_out is None else _top(file) == self.held_out

    def class_of(self, file: SourceFile) -> str | None:
        """Return the class folder of a file; None if it lies flat."""
        folders = PurePosixPath(file.key).parts[:-1][0 if self.train is None else 1 :]
        return folders[0] if folders else None

    def notes(self, files: Sequence[SourceFile], *, num_outside: int) -> list[str]:
        """Return what of it is not plain, a line each."""
        lines = []
        parts = " and ".join(f"{name}/" for name in (self.train, self.held_out) if name)
        if self.train is not None and self.held_out is None:
            lines.append(f"{parts} has no test/ or val/ beside it: a fifth of its images is held out to test on")
        if num_outside:
            what = f"outside {parts}" if self.train is not None else "in unlabelled folders"
            lines.append(f"{num_outside:,} images {what} were left out")
        classes = Counter(map(self.class_of, files))
        if None in classes and len(classes) > 1:
            lines.append(f"{classes[None]:,} of {len(files):,} images lie in no class folder; no label is used")
        if None not in classes and len(classes) == 1:
            lines.append(
                f"all images lie in one folder, {next(iter(classes))}/, and one class is none: no label is used"
            )
        return lines


def _layout(files: Sequence[SourceFile]) -> _Layout:
    """Find the parts by the names of the folders at the top.

    A folder ``train`` without a test part beside it may be a class of vehicles. It is the training part if it has
    folders of its own, or nothing labelled beside it.
    """
    tops = {_top(file) for file in files}
    held_out = next((name for name in HELD_OUT_NAMES if name in tops), None)
    if "train" in tops and (held_out is not None or _is_part("train", files)):
        layout = _Layout(train="train", held_out=held_out)
    else:  # of a set with parts, the test part alone may be here
        layout = _Layout(train=held_out if len(tops) == 1 else None, held_out=None)
    classes = {layout.class_of(file) for file in files if layout.is_used(file)}
    labelled = {name for name in classes if name is None or name.lower() not in UNLABELLED_NAMES}
    return replace(layout, unlabelled=bool(labelled) and None not in labelled)


def _is_part(name: str, files: Sequence[SourceFile]) -> bool:
    own = [file for file in files if _top(file) == name]
    beside = {(_top(file) or "").lower() for file in files} - {name}
    return any(file.key.count("/") > 1 for file in own) or beside <= {*UNLABELLED_NAMES, ""}


def _top(file: SourceFile) -> str | None:
    """The folder at the top that a file lies in; None if it lies in none."""
    top, slash, _ = file.key.partition("/")
    return top if slash else None


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


__all__ = ["HELD_OUT_NAMES", "FolderPart", "is_held_out", "labelled_parts", "open_folder"]
