"""Fashion-MNIST, MNIST and their kin: IDX files, plain or as .gz."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from mio_export.errors import MioError
from mio_export.preprocess import Pixels
from mio_export.train.data.dataset import Data, damaged
from mio_export.train.data.split import ArrayPart, array_part

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_UINT8 = 8
_NUM_CLASSES = 10


def open_idx(folder: Path) -> Data:
    """Read ``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte`` and their labels.

    The files of all these sets have the same names, so the classes are called Fashion-MNIST's only if the folder's
    name says so, and by their numbers otherwise. A plain file is preferred to its ``.gz``.

    Source: the IDX format of http://yann.lecun.com/exdb/mnist/; Xiao, Rasul, Vollgraf, Fashion-MNIST, 2017,
    https://github.com/zalandoresearch/fashion-mnist

    Raises:
        MioError: a file is missing or damaged.
    """
    train, test = (_part(folder, part) for part in ("train", "t10k"))
    return Data(kind="idx", train=train, labelled=train, test=test, class_names=train.class_names)


def _part(folder: Path, part: str) -> ArrayPart:
    path, labels_path = _file(folder, f"{part}-images-idx3-ubyte"), _file(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(path, ndim=3), read_idx(labels_path, ndim=1).astype(np.int64)
    if len(images) != len(labels):
        raise damaged(labels_path, f"{len(labels):,} labels for {len(images):,} images")
    if not images.size:
        raise damaged(path, "it holds no images")
    return array_part([path], [images[..., np.newaxis]], labels, _class_names(folder, int(labels.max()) + 1))


def read_idx(path: Path, *, ndim: int) -> Pixels:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file, a gzip file if its name ends in ``.gz``.
        ndim: how many dimensions it must have.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        MioError: it is cut off, too long or something else.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:4] != bytes([0, 0, _UINT8, ndim]):
                raise damaged(path, f"no header of {ndim}-dimensional bytes")
            shape = tuple(int(extent) for extent in np.frombuffer(header, ">u4", offset=4))
            expected = int(np.prod(shape, dtype=object))
            values = file.read(expected + 1)  # one more, to see that nothing follows
    except (EOFError, zlib.error, gzip.BadGzipFile, MemoryError, OverflowError) as error:  # the last: an absurd shape
        raise damaged(path, str(error) or type(error).__name__) from None
    if len(values) != expected:
        more = "more" if len(values) > expected else f"{len(values):,}"
        raise damaged(path, f"{expected:,} bytes announced, {more} found")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MioError(f"{folder} has no file {name} or {name}.gz; put the whole data set there")


def _class_names(folder: Path, num_classes: int) -> tuple[str, ...]:
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "raw" else folder.name
    if num_classes <= _NUM_CLASSES and "fashionmnist" in re.sub("[^a-z]", "", name.lower()):
        return _FASHION
    return tuple(str(number) for number in range(max(num_classes, _NUM_CLASSES)))


__all__ = ["open_idx", "read_idx"]
