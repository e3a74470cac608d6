"""STL-10 in its binary version, with the unlabelled images that it was made for."""

from pathlib import Path

import numpy as np

from mio_export.preprocess import Pixels
from mio_export.train.data.dataset import Data, damaged, required
from mio_export.train.data.split import ArrayPart, JoinedPart, Labels, Part, array_part

_SHAPE = (3, 96, 96)
_NUM_CLASSES = 10
_UNLABELLED = "unlabeled_X.bin"


def open_stl10(folder: Path) -> Data:
    """Read ``train_X.bin``, ``test_X.bin``, their labels, and ``unlabeled_X.bin`` if it is there.

    Source: Coates, Lee, Ng, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011;
    https://cs.stanford.edu/~acoates/stl10/

    Raises:
        MioError: a file is missing or damaged.
    """
    class_names = _class_names(folder)
    labelled, test = (_labelled(folder, part, class_names) for part in ("train", "test"))
    train: Part = labelled
    note = f"{_UNLABELLED} is not there: training on the {len(labelled):,} labelled images only"
    if (folder / _UNLABELLED).is_file():
        path = folder / _UNLABELLED
        unlabelled = array_part([path], [_images(path)], None, ())
        train = JoinedPart(parts=(unlabelled, labelled))
        note = f"training on {len(unlabelled):,} unlabelled and {len(labelled):,} labelled images"
    return Data(kind="stl10", train=train, labelled=labelled, test=test, class_names=class_names, notes=(note,))


def _labelled(folder: Path, part: str, class_names: tuple[str, ...]) -> ArrayPart:
    path, labels_path = (required(folder, f"{part}_{which}.bin") for which in "Xy")
    images, labels = _images(path), _labels(labels_path)
    if len(images) != len(labels):
        raise damaged(labels_path, f"{len(labels):,} labels for {len(images):,} images")
    return array_part([path], [images], labels, class_names)


def _images(path: Path) -> Pixels:
    """Return the images, shape (N, 96, 96, 3), as a view of the file: it holds planes column by column."""
    image_bytes = int(np.prod(_SHAPE))
    size = path.stat().st_size
    if size == 0 or size % image_bytes:
        raise damaged(path, f"{size:,} bytes are not a number of images of {image_bytes:,} bytes")
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *_SHAPE).transpose(0, 3, 2, 1)


def _labels(path: Path) -> Labels:
    labels = np.fromfile(path, np.uint8).astype(np.int64)
    if not ((labels >= 1) & (labels <= _NUM_CLASSES)).all():
        raise damaged(path, f"a label outside 1 to {_NUM_CLASSES}")
    return labels - 1


def _class_names(folder: Path) -> tuple[str, ...]:
    path = required(folder, "class_names.txt")
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != _NUM_CLASSES:
        raise damaged(path, f"{len(names)} names for {_NUM_CLASSES} classes")
    return names


__all__ = ["open_stl10"]
