"""Which format lies in a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mio_export.errors import UsageError
from mio_export.sources import list_images
from mio_export.train.data.cifar import open_cifar10, open_cifar100
from mio_export.train.data.dataset import Data
from mio_export.train.data.folder import open_folder
from mio_export.train.data.idx import open_idx
from mio_export.train.data.shards import find_shards, open_shards
from mio_export.train.data.stl10 import open_stl10
from mio_export.train.data.tiny_imagenet import open_tiny_imagenet


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a data set is recognised and read."""

    open: Callable[[Path], Data]
    marks: tuple[str, ...]
    """Patterns of files in the set's own folder, each of which must be met."""
    below: tuple[str, ...]
    """Where the set's own folder lies below torchvision's root."""


FORMATS = (
    Format(open=open_cifar10, marks=("data_batch_*",), below=("cifar-10-batches-py",)),
    Format(open=open_cifar100, marks=("train", "test", "meta"), below=("cifar-100-python",)),
    Format(open=open_stl10, marks=("train_X.bin",), below=("stl10_binary",)),
    Format(open=open_idx, marks=("train-images-idx3-ubyte*",), below=("FashionMNIST/raw", "MNIST/raw")),
    Format(open=open_tiny_imagenet, marks=("wnids.txt",), below=("tiny-imagenet-200",)),
)


def open_data(path: str | Path) -> Data:
    """Find out what lies in a folder and list its images; bare pixels are read, image files not yet.

    CIFAR-10 and -100, STL-10, the IDX files of Fashion-MNIST and MNIST, and Tiny-ImageNet are known by their files, in
    their own folder or in torchvision's root above it. Otherwise it is a folder of image files, class folders giving
    labels, or of tar shards if there are no image files.

    Raises:
        UsageError: it is no folder, or holds several of these sets.
        MioError: a file is missing or damaged, or there are too few images.
        GateError: a pickle holds something else than arrays.
    """
    folder = Path(path)
    found = [(form, place) for form in FORMATS for place in _places(form, folder)]
    if len(found) > 1:
        places = ", ".join(str(place.relative_to(folder)) for _, place in found)
        raise UsageError(f"{folder} holds several data sets ({places}); name one of these folders")
    if found:
        form, place = found[0]
        return form.open(place)
    listing = list_images(folder)
    if not listing.files and find_shards(folder):
        return open_shards(folder)
    return open_folder(folder, listing)


def _places(form: Format, folder: Path) -> list[Path]:
    if all(any(path.is_file() for path in folder.glob(mark)) for mark in form.marks):
        return [folder]
    return [folder / name for name in form.below if (folder / name).is_dir()]


__all__ = ["open_data"]
