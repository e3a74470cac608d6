"""Small pictures of stored images, read from the source that was embedded."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mio_export.console.progress import Progress
from mio_export.pages import Thumbnail, thumbnail
from mio_export.preprocess import DecodeError, Preprocess
from mio_export.runtimes.devices import num_threads
from mio_export.sources import SourceFile

_SIDE = 96
_DECODE = Preprocess(image_size=_SIDE, interpolation="lanczos")
_MOST_BYTES = 4_000_000
OUTSIDE = "file lies outside the source (a path with .., an absolute one, or a link to other bytes than were embedded)"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A picture to show."""

    file: SourceFile | None
    """Where it lies; None if it is not there, and ``problem`` says why."""
    size: int | None
    """Bytes that the file had when it was embedded; None: any."""
    sha256: str | None = None
    """Of the bytes that it had, where it is shown only if it has them still; None: any."""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Library:
    """The pictures that a page shows."""

    thumbnails: Mapping[str, Thumbnail]
    """Of 96 x 96, by name."""
    problems: Mapping[str, str]
    """Why there is no picture of a name."""

    def notes(self) -> list[str]:
        """Return what is not shown and why, a line for each reason."""
        counts = Counter(self.problems.values())
        return [
            f"{count:,} {'picture' if count == 1 else 'pictures'} not shown: {reason}"
            for reason, count in sorted(counts.items())
        ]


def picture_library(wanted: Mapping[str, Wanted], progress: Progress) -> Library:
    """Read pictures in threads, the middle square of each, 96 px.

    What lies beyond 4 MB of pictures is left out, the last named first.

    Args:
        wanted: by the name that the page has for it.
        progress: is told how far the work is.
    """
    thumbnails: dict[str, Thumbnail] = {}
    problems: dict[str, str] = {}
    room = _MOST_BYTES
    with ThreadPoolExecutor(num_threads()) as pool, progress.task("thumbnails", len(wanted)) as task:
        for name, read in zip(wanted, pool.map(_read, wanted.values()), strict=True):
            if isinstance(read, str):
                problems[name] = read
            elif len(read.url) > room:
                problems[name] = "there is no room left on the page"
            else:
                room -= len(read.url)
                thumbnails[name] = read
            task.advance()
    return Library(thumbnails=thumbnails, problems=problems)


def _read(wanted: Wanted) -> Thumbnail | str:
    """Return a picture, or why there is none."""
    if wanted.file is None:
        return wanted.problem
    try:
        data, _ = wanted.file.read()
        if wanted.size not in (None, len(data)):
            return "file of another size than when it was embedded"
        if wanted.sha256 not in (None, hashlib.sha256(data).hexdigest()):
            return OUTSIDE
        return thumbnail(_DECODE.decode(data), _SIDE)
    except OSError:
        return "file missing from the source folder"
    except DecodeError:
        return "file cannot be decoded"


__all__ = ["OUTSIDE", "Library", "Wanted", "picture_library"]
