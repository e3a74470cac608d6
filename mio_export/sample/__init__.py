"""The embedded sample: 5,000 training and 1,000 test images of Fashion-MNIST, ten classes, as PNGs.

Made by ``scripts/make_sample.py``; MIT licence, see ``LICENSE`` beside this file.
"""

import tarfile
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.files import staged_folder
from mio_export.sources import evenly_spaced

_ARCHIVE = "fashion_mnist.tar.xz"
NUM_IMAGES = {"train": 5_000, "test": 1_000}


def extract_sample(folder: Path) -> None:
    """Write the sample as ``folder/train/<class>/<n>.png`` and ``folder/test/…``; does nothing if it lies there.

    Raises:
        UsageError: something else lies there.
    """
    if folder.is_dir() and any(folder.iterdir()):
        with _archive() as archive:
            expected = {member.name for member in archive.getmembers()}
        if {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} != expected:
            raise UsageError(f"{folder} exists and is not the sample; choose another folder")
        return
    with staged_folder(folder) as temporary, _archive() as archive:
        archive.extractall(temporary, filter="data")


def read_sample(split: str = "test", *, limit: int | None = None) -> Iterator[bytes]:
    """Yield the PNG files of a split, spread evenly over the classes if there is a limit."""
    with _archive() as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(f"{split}/")]
        for member in members if limit is None else evenly_spaced(members, limit):
            file = archive.extractfile(member)
            assert file is not None  # every member is a regular file
            yield file.read()


def _archive() -> tarfile.TarFile:
    with as_file(files(__name__) / _ARCHIVE) as path:
        return tarfile.open(path)


__all__ = ["NUM_IMAGES", "extract_sample", "read_sample"]
