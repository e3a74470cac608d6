"""Tiny-ImageNet as it is distributed: class folders to train on, one folder and a table to validate on."""

from pathlib import Path, PurePosixPath

from mio_export.errors import MioError
from mio_export.sources import SourceFile, list_images
from mio_export.train.data.dataset import Data, damaged, required
from mio_export.train.data.folder import FolderPart, labelled_parts

_ANNOTATIONS = "val_annotations.txt"


def open_tiny_imagenet(folder: Path) -> Data:
    """Read ``train/CLASS/images/`` and ``val/images/`` with ``val/val_annotations.txt``.

    Also taken are validation images that were sorted into class folders. ``test/`` has no labels and is left out. The
    classes are called by ``words.txt`` if it is there, and by the WordNet numbers of ``wnids.txt`` otherwise.

    Source: http://cs231n.stanford.edu/tiny-imagenet-200.zip

    Raises:
        MioError: a file is missing or damaged, or a part has no images.
    """
    wnids = set(required(folder, "wnids.txt").read_text(encoding="utf-8", errors="replace").split())
    annotations = _annotations(folder)
    listing = list_images(folder)
    listing.ignored.pop(".txt", None)  # boxes and tables of the set itself
    parts: dict[str, list[SourceFile]] = {"train": [], "val": []}
    unknown = []

    def wnid(file: SourceFile) -> str | None:
        path = PurePosixPath(file.key)
        return next((name for name in path.parts[1:-1] if name in wnids), annotations.get(path.name))

    for file in listing.files:
        part = parts.get(PurePosixPath(file.key).parts[0])
        if part is not None and wnid(file) in wnids:
            part.append(file)
        else:
            unknown.append(file.key)
    if not all(parts.values()):
        raise MioError(f"{folder} holds no labelled images in train/ or in val/; unpack the whole data set there")
    train, test = labelled_parts(folder, parts["train"], parts["val"], wnid)
    names = _names(folder, train.class_names)
    train, test = (
        FolderPart(folder=folder, files=part.files, labels=part.labels, class_names=names) for part in (train, test)
    )
    notes = [f"{len(unknown):,} images without a label were left out, such as {unknown[0]}"] if unknown else []
    return Data(
        kind="tiny-imagenet",
        train=train,
        labelled=train,
        test=test,
        class_names=names,
        notes=(*listing.notes(), *notes),
    )


def _annotations(folder: Path) -> dict[str, str]:
    """Return the class of each validation image; none if the images were sorted into class folders."""
    path = folder / "val" / _ANNOTATIONS
    if not path.is_file():
        return {}
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    if any(len(line) < 2 for line in lines):
        raise damaged(path, "a line without a class")
    return {line[0]: line[1] for line in lines}


def _names(folder: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of each class, or the numbers if there are no words, or words that do not tell them apart."""
    path = folder / "words.txt"
    if not path.is_file():
        return wnids
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    words = {wnid: text.strip() for wnid, _, text in lines}
    names = tuple(words.get(wnid) or wnid for wnid in wnids)
    return names if len(set(names)) == len(names) else wnids


__all__ = ["open_tiny_imagenet"]
