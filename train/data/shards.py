"""Tar shards in webdataset's layout: ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``, indexed once and read in place."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mio_export.errors import MioError
from mio_export.sources import Listing
from mio_export.train.data.dataset import Data
from mio_export.train.data.folder import HELD_OUT_NAMES, is_held_out
from mio_export.train.data.split import Labels, fingerprint
from mio_export.train.data.tar_index import Member, index_tar

_LISTED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class TarPart:
    """Images inside tar files."""

    members: Sequence[Member]
    labels: Labels | None
    class_names: tuple[str, ...]
    keys: Sequence[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> bytes:
        """Return an image file's bytes.

        Raises:
            OSError: they cannot be read.
        """
        member = self.members[index]
        if member.problem:
            raise OSError(member.problem)
        descriptor = os.open(member.shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, member.size, member.offset)
        finally:
            os.close(descriptor)
        if len(data) != member.size:
            raise OSError(f"{member.shard.name} ends within it")
        return data


def find_shards(folder: Path) -> bool:
    """Whether tar files lie in a folder, or in its ``train/``."""
    return bool(_tars(folder) or _tars(folder / "train"))


def open_shards(folder: Path) -> Data:
    """Read ``train/*.tar`` or ``*train*.tar``, and ``val`` or ``test`` likewise.

    Without shards to test on, a fifth of all images is held out, chosen by a hash of their keys. Labels are used if
    every image has one.

    Source: the layout of https://github.com/webdataset/webdataset

    Raises:
        MioError: a shard is damaged, or a part has no images.
    """
    train_shards, test_shards = _parted(folder)
    listing = Listing()
    train = _members(train_shards, folder, listing)
    if test_shards:
        test = _members(test_shards, folder, listing)
    else:
        train, test = ([member for member in train if is_held_out(member.key) is held] for held in (False, True))
    if not train or not test:
        names = ", ".join(path.name for path in (*train_shards, *test_shards)[:_LISTED])
        message = (
            f"{folder} holds {len(train) + len(test)} images in its tar files ({names}), too few to train and test on"
        )
        raise MioError("\n".join([message, *listing.notes()]))
    numbers, class_names, notes = _classes((*train, *test))
    root = folder.resolve()
    trained, tested = (_part(root, members, numbers, class_names) for members in (train, test))
    return Data(
        kind="tar",
        train=trained,
        labelled=trained,
        test=tested,
        class_names=class_names,
        notes=(*listing.notes(), *notes, *_outside(folder, (*train_shards, *test_shards))),
    )


def _parted(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the shards to train on and those to test on; all and none if their names do not say."""
    train = _tars(folder / "train") or [path for path in _tars(folder) if "train" in path.name.lower()]
    for name in HELD_OUT_NAMES:
        word = re.compile(rf"(?<![a-z]){name}(?![a-z])")  # not the "val" of "interval"
        test = _tars(folder / name) or [path for path in _tars(folder) if word.search(path.name.lower())]
        test = [path for path in test if path not in train]
        if train and test:
            return train, test
    return train or _tars(folder), []


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if path.is_file())


def _outside(folder: Path, used: Sequence[Path]) -> tuple[str, ...]:
    """Name the shards that are in neither part."""
    others = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tar") if path not in set(used))
    return (f"{len(others):,} tar files in neither part were left out, such as {others[0]}",) if others else ()


def _members(shards: Sequence[Path], folder: Path, listing: Listing) -> list[Member]:
    """Return the images of all shards; what else they hold is counted in the listing."""
    members = []
    for path in shards:
        images, ignored = index_tar(path, name=path.relative_to(folder).as_posix())
        members += images
        listing.ignored += ignored
    return members


def _classes(members: Sequence[Member]) -> tuple[dict[str | None, int], tuple[str, ...], tuple[str, ...]]:
    """Number the classes, those that are numbers in their order; without labels on all images there are none."""
    names = {member.label for member in members}
    if None in names:
        missing = [member.key for member in members if member.label is None]
        note = f"{len(missing):,} of {len(members):,} images have no label, such as {missing[0]}; no label is used"
        return {}, (), () if len(missing) == len(members) else (note,)
    ordered = sorted((name for name in names if name is not None), key=_order)
    if len(ordered) < 2:
        return {}, (), ()
    return {name: number for number, name in enumerate(ordered)}, tuple(ordered), ()


def _order(name: str) -> tuple[bool, int, str]:
    is_number = name.isascii() and name.isdigit() and len(name) < 20
    return (not is_number, int(name) if is_number else 0, name)


def _part(
    root: Path, members: Sequence[Member], numbers: dict[str | None, int], class_names: tuple[str, ...]
) -> TarPart:
    labels = np.array([numbers[member.label] for member in members], dtype=np.int64) if numbers else None
    return TarPart(
        members=members,
        labels=labels,
        class_names=class_names,
        keys=[member.key for member in members],
        fingerprint=fingerprint(root, _entries(members)),
    )


def _entries(members: Iterable[Member]) -> Iterator[tuple[str, int, int]]:
    """Each image with its size and the time of its shard's last change."""
    times: dict[Path, int] = {}
    for member in members:
        if member.shard not in times:
            times[member.shard] = member.shard.stat().st_mtime_ns
        yield f"{member.key}@{member.offset}", member.size, times[member.shard]


__all__ = ["TarPart", "find_shards", "open_shards"]
