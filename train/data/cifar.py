"""CIFAR-10 and CIFAR-100 in their Python version: pickled batches, read without letting the pickle run anything."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mio_export.errors import GateError, one_line
from mio_export.preprocess import Pixels
from mio_export.train.data.dataset import Data, damaged, required
from mio_export.train.data.split import ArrayPart, Labels, array_part

_SHAPE = (3, 32, 32)
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""All that a pickled array needs; what a batch names beyond it is refused."""


def open_cifar10(folder: Path) -> Data:
    """Read ``data_batch_1`` to ``data_batch_5``, ``test_batch`` and ``batches.meta``.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html

    Raises:
        MioError: a file is missing or damaged.
        GateError: a pickle holds something else than an array.
    """
    class_names = _class_names(required(folder, "batches.meta"), "label_names")
    train = _part(folder, [f"data_batch_{number}" for number in range(1, 6)], "labels", class_names)
    test = _part(folder, ["test_batch"], "labels", class_names)
    return Data(kind="cifar10", train=train, labelled=train, test=test, class_names=class_names)


def open_cifar100(folder: Path) -> Data:
    """Read ``train``, ``test`` and ``meta``, with the 100 fine labels; source and errors as for CIFAR-10."""
    class_names = _class_names(required(folder, "meta"), "fine_label_names")
    train, test = (_part(folder, [name], "fine_labels", class_names) for name in ("train", "test"))
    return Data(kind="cifar100", train=train, labelled=train, test=test, class_names=class_names)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise GateError(f"its pickle asks for {module}.{name}, and a CIFAR batch holds arrays only")
        return _ALLOWED[module, name]


def _part(folder: Path, names: list[str], labels_key: str, class_names: tuple[str, ...]) -> ArrayPart:
    files = [required(folder, name) for name in names]
    batches = [_batch(path, labels_key, len(class_names)) for path in files]
    labels = np.concatenate([labels for _, labels in batches])
    return array_part(files, [images for images, _ in batches], labels, class_names)


def _batch(path: Path, labels_key: str, num_classes: int) -> tuple[Pixels, Labels]:
    """Return images, shape (N, 32, 32, 3), and their labels."""
    values = _unpickled(path)
    rows, labels = values.get("data"), values.get(labels_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3 * 32 * 32,):
        raise damaged(path, "no uint8 rows of 3,072 values under 'data'")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise damaged(path, f"no list of numbers under {labels_key!r}")
    if len(labels) != len(rows):
        raise damaged(path, f"{len(rows):,} images and {len(labels):,} labels")
    if not all(0 <= label < num_classes for label in labels):
        raise damaged(path, f"a label outside 0 to {num_classes - 1}")
    return rows.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _class_names(path: Path, key: str) -> tuple[str, ...]:
    names = _unpickled(path).get(key)
    if not isinstance(names, list) or not names:
        raise damaged(path, f"no list of names under {key!r}")
    return tuple(_text(name) for name in names)


def _unpickled(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        values = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except GateError as error:
        raise GateError(f"{path} is refused: {error}") from None
    except Exception as error:  # noqa: BLE001 - an unpickler raises whatever a broken file leads it to
        raise damaged(path, f"{type(error).__name__}: {one_line(error, 100)}") from None
    if not isinstance(values, dict):
        raise damaged(path, "its pickle is no dictionary")
    return {_text(key): value for key, value in values.items()}


def _text(value: Any) -> str:
    """Python 2 wrote its strings as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


__all__ = ["open_cifar10", "open_cifar100"]
