"""Images for training and evaluation, decoded once and held in memory as uint8."""

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mio_export.errors import MioError, UsageError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.progress import Progress
from mio_export.runtimes.devices import num_threads
from mio_export.sources import SourceFile, list_images, read_file, spread

_HELD_OUT_NAMES = ("test", "val", "valid", "validation")
_HELD_OUT_OF = 5
_PROBED = 200
_BLOCK_BYTES = 16_000_000
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Decoded images in the order of their keys."""

    pixels: Pixels
    """uint8, shape (N, H, W, C)."""
    labels: npt.NDArray[np.int64] | None
    """Class of each image, shape (N,); None if the images lie in no class folders."""
    class_names: tuple[str, ...]
    sha256: str
    """Hash of the keys and bytes of all files, unreadable ones included."""
    failures: tuple[str, ...]
    """Files that could not be read, ``key: reason``."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The files of a data folder, divided into training and test files."""

    train: tuple[SourceFile, ...]
    test: tuple[SourceFile, ...]
    class_names: tuple[str, ...]
    """Names of the class folders, sorted; empty if there are none."""
    prefixed: bool
    """Whether the folder brings its own ``train/`` and ``test/``."""
    notes: tuple[str, ...]
    """What a person should know of files that are in neither part, a line each."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a look at some of a folder's images suggests."""

    image_size: int
    """Median shorter side in pixels, at most 224."""
    channels: Literal[1, 3]
    """1 if all of them are grey, else 3."""


def split_folder(folder: Path) -> Split:
    """Divide a folder's images into training and test files.

    ``train/`` and ``test/`` (or ``val/``) inside it are taken as they are; otherwise a fifth of the files, chosen by a
    hash of their names, is held out. Class folders below give labels; files that lie flat give none.

    Raises:
        UsageError: it is no folder.
        MioError: it holds no images, or none for one of the two parts.
    """
    listing = list_images(folder)
    tops = {PurePosixPath(file.key).parts[0] for file in listing.files if "/" in file.key}
    held_out = next((name for name in _HELD_OUT_NAMES if name in tops), None)
    prefixed = "train" in tops and held_out is not None
    if prefixed:
        train = [file for file in listing.files if file.key.startswith("train/")]
        test = [file for file in listing.files if file.key.startswith(f"{held_out}/")]
    else:
        train = [file for file in listing.files if not _is_held_out(file.key)]
        test = [file for file in listing.files if _is_held_out(file.key)]
    if not train or not test:
        message = f"{folder} holds {len(listing.files)} images, too few to train and test on"
        raise MioError("\n".join([message, *listing.notes()]))
    names = {_class_name(file.key, prefixed) for file in (*train, *test)}
    class_names = tuple(sorted(name for name in names if name)) if None not in names and len(names) > 1 else ()
    num_outside = len(listing.files) - len(train) - len(test)
    outside = [f"{num_outside:,} images outside train/ and {held_out}/ were left out"] if num_outside else []
    return Split(
        train=tuple(train),
        test=tuple(test),
        class_names=class_names,
        prefixed=prefixed,
        notes=(*listing.notes(), *outside),
    )


def probe_geometry(files: Sequence[SourceFile]) -> Geometry:
    """Look at up to 200 files, evenly spread, without decoding them.

    Raises:
        MioError: none of them is an image.
    """
    sides, modes = [], set()
    for file in spread([file for file in files if file.problem is None], _PROBED):
        try:
            with Image.open(io.BytesIO(read_file(file.path)[0])) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except Exception:  # noqa: BLE001 - decoding names every unreadable file; this is only a look
            continue
    if not sides:
        raise MioError("none of the training images can be read")
    return Geometry(image_size=min(224, max(8, int(np.median(sides)))), channels=1 if modes <= _GREY_MODES else 3)


def load_images(files: Sequence[SourceFile], split: Split, preprocess: Preprocess, progress: Progress) -> ImageSet:
    """Decode files into memory; what cannot be read is left out and named, never replaced.

    Raises:
        MioError: no file can be read, or the images do not fit into memory.
    """
    _check_memory(len(files), preprocess)
    pixels: list[Pixels] = []
    labels, failures = [], []
    digest = hashlib.sha256()
    with ThreadPoolExecutor(num_threads()) as pool, progress.task("decoding", len(files)) as task:
        for file, (data_sha256, image, reason) in zip(
            files, pool.map(lambda f: _decode(f, preprocess), files), strict=True
        ):
            digest.update(f"{file.key}\0{data_sha256}\n".encode())
            if image is None:
                failures.append(f"{file.key}: {reason}")
            else:
                pixels.append(image)
                labels.append(_label(file, split))
            task.advance()
    if not pixels:
        raise MioError(f"none of {len(files):,} images can be read; the first: {failures[0]}")
    return ImageSet(
        pixels=np.stack(pixels),
        labels=np.array(labels, dtype=np.int64) if split.class_names else None,
        class_names=split.class_names,
        sha256=digest.hexdigest(),
        failures=tuple(failures),
    )


def mean_and_std(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, pixels counted in [0, 1]."""
    counts = np.zeros((images.pixels.shape[-1], 256), dtype=np.int64)
    for block in np.array_split(images.pixels, max(1, images.pixels.nbytes // _BLOCK_BYTES)):
        counts += [np.bincount(block[..., channel].reshape(-1), minlength=256) for channel in range(len(counts))]
    levels = np.arange(256) / 255
    means = [float((count * levels).sum() / count.sum()) for count in counts]
    deviations = [
        float(np.sqrt((count * (levels - mean) ** 2).sum() / count.sum()))
        for count, mean in zip(counts, means, strict=True)
    ]
    return tuple(round(mean, 6) for mean in means), tuple(max(round(value, 6), 1e-3) for value in deviations)


def _is_held_out(key: str) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % _HELD_OUT_OF == 0


def _class_name(key: str, prefixed: bool) -> str | None:
    """The class folder of a file, below ``train`` or ``test`` if there are such; None if it lies flat."""
    folders = PurePosixPath(key).parts[:-1][1 if prefixed else 0 :]
    return folders[0] if folders else None


def _label(file: SourceFile, split: Split) -> int:
    name = _class_name(file.key, split.prefixed)
    return split.class_names.index(name) if split.class_names and name is not None else -1


def _decode(file: SourceFile, preprocess: Preprocess) -> tuple[str, Pixels | None, str]:
    """Return the sha256 of the file's bytes, its pixels, and why there are none."""
    if file.problem:
        return "", None, file.problem
    try:
        data, _ = read_file(file.path)
    except OSError as error:
        return "", None, str(error.strerror or error)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return sha256, preprocess.decode(data), ""
    except DecodeError as error:
        return sha256, None, str(error)


def _check_memory(num_images: int, preprocess: Preprocess) -> None:
    """Refuse a set that would fill the memory, before it does."""
    needed = num_images * int(np.prod(preprocess.shape))
    available = _available_bytes()
    if available is not None and needed > 0.5 * available:
        raise UsageError(
            f"{num_images:,} images of {preprocess.image_size} px need {needed / 1e9:.1f} GB in memory,"
            f" {available / 1e9:.1f} GB are free; choose a smaller image_size or fewer images"
        )


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
