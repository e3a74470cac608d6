"""Small pictures of stored images, read from the folder that was embedded, each once on the page."""

import base64
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from mio_export.preprocess import DecodeError, Preprocess
from mio_export.progress import Progress
from mio_export.runtimes.devices import num_threads
from mio_export.sources import SourceFile

SIDE = 96
_DECODE = Preprocess(image_size=SIDE, interpolation="lanczos")
_MOST_BYTES = 4_000_000
OUTSIDE = "file lies outside the source (a path with .., an absolute one, or a link to other bytes than were embedded)"
_ESCAPED = re.compile(rb"\\(\\|x[0-9a-f]{2})")


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

    html: str
    """An invisible SVG with an ``<image id="i-NAME">`` of 96 x 96 for each picture."""
    problems: Mapping[str, str]
    """Why there is no picture of a name."""

    def notes(self) -> list[str]:
        """Return what is not shown and why, a line for each reason."""
        counts = Counter(self.problems.values())
        return [
            f"{count:,} {'picture' if count == 1 else 'pictures'} not shown: {reason}"
            for reason, count in sorted(counts.items())
        ]


def path_of(source: Path, key: str) -> Path:
    """Return the file below ``source`` that a store's key names; the inverse of ``SourceFile.key``."""
    name = _ESCAPED.sub(lambda found: _unescaped(found[1]), key.encode())
    return source / os.fsdecode(name)


def _unescaped(code: bytes) -> bytes:
    return code if code == b"\\" else bytes([int(code[1:], 16)])


def picture_library(wanted: Mapping[str, Wanted], progress: Progress) -> Library:
    """Read pictures in threads, the middle square of each, 96 px.

    What lies beyond 4 MB of pictures is left out, the last named first.

    Args:
        wanted: by the name that the page has for it.
        progress: is told how far the work is.
    """
    pieces: list[str] = []
    problems: dict[str, str] = {}
    room = _MOST_BYTES
    with ThreadPoolExecutor(num_threads()) as pool, progress.task("thumbnails", len(wanted)) as task:
        for name, (jpeg, problem) in zip(wanted, pool.map(_read, wanted.values()), strict=True):
            data = base64.b64encode(jpeg).decode()
            if problem or len(data) > room:
                problems[name] = problem or "there is no room left on the page"
            else:
                room -= len(data)
                pieces.append(_image(name, data))
            task.advance()
    defined = f"<defs>{''.join(pieces)}</defs>" if pieces else ""
    return Library(html=f'<svg class="library" aria-hidden="true">{defined}</svg>', problems=problems)


def _read(wanted: Wanted) -> tuple[bytes, str]:
    """Return a JPEG, or why there is none."""
    if wanted.file is None:
        return b"", wanted.problem
    try:
        data, _ = wanted.file.read()
        if wanted.size not in (None, len(data)):
            return b"", "file of another size than when it was embedded"
        if wanted.sha256 not in (None, hashlib.sha256(data).hexdigest()):
            return b"", OUTSIDE
        buffer = io.BytesIO()
        Image.fromarray(_DECODE.decode(data)).save(buffer, "JPEG", quality=72, optimize=True)
    except OSError:
        return b"", "file missing from the source folder"
    except DecodeError:
        return b"", "file cannot be decoded"
    return buffer.getvalue(), ""


def _image(name: str, data: str) -> str:
    return f'<image id="i-{name}" width="{SIDE}" height="{SIDE}" href="data:image/jpeg;base64,{data}"/>'


def picture(name: str, key: str, library: Library, *, label: bool = True) -> str:
    """Return a picture as HTML, or a placeholder that shows the file's name; ``label`` names it for screen readers."""
    reader = f'role="img" aria-label="{escape(key)}"' if label else 'aria-hidden="true"'
    if name in library.problems:
        reason = library.problems[name]
        return f'<span class="gone" {reader} title="{escape(reason)}">{escape(key.rpartition("/")[2])}</span>'
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" {reader}><use href="#i-{name}"/></svg>'


__all__ = ["OUTSIDE", "SIDE", "Library", "Wanted", "path_of", "picture", "picture_library"]
