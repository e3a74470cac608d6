"""A data set as training and evaluation see it, whatever its format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mio_export.errors import MioError
from mio_export.train.data.split import Part

Kind = Literal["folder", "tar", "cifar10", "cifar100", "stl10", "idx", "tiny-imagenet"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The parts of a data set."""

    kind: Kind
    """The format that was found."""
    train: Part
    """What an objective trains on; of STL-10 the unlabelled part too, and so without labels."""
    labelled: Part
    """The labelled training images, the bank of kNN and probes; ``train`` itself except for STL-10."""
    test: Part
    class_names: tuple[str, ...]
    """Names of the classes by number; empty without labels."""
    notes: tuple[str, ...] = ()
    """What a person should know, such as images that are in no part, a line each."""


def required(folder: Path, name: str) -> Path:
    """Return the path of a file that a format cannot do without.

    Raises:
        MioError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise MioError(f"{folder} has no file {name}; unpack the whole data set there")
    return path


def damaged(path: Path, reason: str) -> MioError:
    """Return the error for a file of a data set that is not what its format says."""
    return MioError(f"{path} is damaged or cut off ({reason}); fetch it again")


__all__ = ["Data", "Kind", "damaged", "required"]
