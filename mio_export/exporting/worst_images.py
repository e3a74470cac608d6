"""The images that an artifact gets most wrong, with their nearest neighbours before and after, as HTML."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mio_export.chart import number_label
from mio_export.metrics import l2_normalized
from mio_export.preprocess import Pixels

Matrix = npt.NDArray[np.floating[Any]]
_WORST = 6
_NEIGHBORS = 4
_SIDE = 64
_MOST_THUMBNAILS = 30
_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class WorstImage:
    """One image, how wrong its embedding is, and what lies near it."""

    row: int
    relative_error: float
    """‖candidate − reference‖ / ‖reference‖; infinite for an embedding that is not finite."""
    before: tuple[int, ...]
    """Its nearest other rows by the reference, the nearest first."""
    after: tuple[int, ...]
    """The same by the candidate; empty if its embedding is not finite."""
    changed: frozenset[int]
    """Those of ``after`` that are not near by the reference, equal cosines (within 1e-6) allowed for."""


def relative_errors(reference: Matrix, candidate: Matrix) -> npt.NDArray[np.float64]:
    """Return ‖candidate − reference‖ / ‖reference‖ of each row, float64, shape (N,); infinite where there is none."""
    reference = reference.astype(np.float64)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(reference, axis=1)
        errors: npt.NDArray[np.float64] = np.linalg.norm(candidate.astype(np.float64) - reference, axis=1) / norms
    return np.where(np.isfinite(errors), errors, np.inf)


def worst_images(reference: Matrix, candidate: Matrix) -> list[WorstImage]:
    """Return the up to six rows with the largest relative errors, the worst first.

    There are fewer where they and their neighbours would be more than thirty images.

    Args:
        reference: the encoder's embeddings, shape (N, D), N at least 1.
        candidate: the artifact's, of the same shape.
    """
    errors = relative_errors(reference, candidate)
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(candidate), axis=1)
    truth = l2_normalized(reference.astype(np.float64))
    found = l2_normalized(np.where(finite[:, None], candidate, 0).astype(np.float64))
    worst: list[WorstImage] = []
    for row in map(int, np.argsort(-errors, kind="stable")[:_WORST]):
        image = _neighborhood(row, float(errors[row]), truth, found, finite)
        if len(shown_rows([*worst, image])) > _MOST_THUMBNAILS:
            break
        worst.append(image)
    return worst


def _neighborhood(row: int, error: float, truth: Matrix, found: Matrix, finite: npt.NDArray[np.bool_]) -> WorstImage:
    before_cosines = truth @ truth[row]
    after_cosines = np.where(finite, found @ found[row], -np.inf)
    before = _nearest(before_cosines, row)
    after = _nearest(after_cosines, row) if finite[row] else ()
    least = before_cosines[before[-1]] - _TIE if before else 0.0
    changed = frozenset(other for other in after if before_cosines[other] < least)
    return WorstImage(row=row, relative_error=error, before=before, after=after, changed=changed)


def _nearest(cosines: Matrix, row: int) -> tuple[int, ...]:
    order = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
    return tuple(other for other in order[:_NEIGHBORS] if np.isfinite(cosines[other]))


def shown_rows(images: Iterable[WorstImage]) -> set[int]:
    """Return every row that is shown for some images."""
    return {row for image in images for row in (image.row, *image.before, *image.after)}


def thumbnail_library(pixels: Pixels, rows: Iterable[int]) -> str:
    """Return an invisible SVG that holds a thumbnail of each row, for ``<use>`` elsewhere on the page: each once.

    Args:
        pixels: uint8, shape (N, H, W, C), C 1 or 3.
        rows: which to hold.
    """
    defined = "".join(_thumbnail(pixels[row], row) for row in sorted(rows))
    return f'<svg class="library" aria-hidden="true"><defs>{defined}</defs></svg>' if defined else ""


def _thumbnail(pixels: Pixels, row: int) -> str:
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    crisp = ' style="image-rendering:pixelated"' if max(picture.size) < _SIDE else ""
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind, data = min((_encoded(picture, kind) for kind in ("PNG", "JPEG")), key=lambda pair: len(pair[1]))
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return f'<image id="i{row}" width="{_SIDE}" height="{_SIDE}" href="{source}"{crisp}/>'


def _encoded(picture: Image.Image, kind: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, **({"quality": 80} if kind == "JPEG" else {}))
    return kind, buffer.getvalue()


def worst_figures(images: Sequence[WorstImage]) -> str:
    """Return the images as HTML: each above its neighbours, those that changed marked with a word and a dashed rim."""
    return f'<div class="worst">{"".join(map(_worst_figure, images))}</div>'


def _worst_figure(image: WorstImage) -> str:
    error = number_label(image.relative_error) if np.isfinite(image.relative_error) else "not finite"
    before = [_cell(row) for row in image.before]
    after = [_cell(row, css="new" if row in image.changed else "") for row in image.after] or ["<small>none</small>"]
    rows = [
        ["<small>encoder</small>", _cell(image.row, css="query"), *before],
        ["<small>artifact</small>", "<span></span>", *after],
    ]
    cells = "".join("".join([*row, "<span></span>" * (2 + _NEIGHBORS - len(row))]) for row in rows)
    changed = f"{len(image.changed)} of {len(image.after)} neighbours new" if image.changed else "neighbours kept"
    caption = f"image {image.row}, relative error {error}, {changed if image.after else 'no neighbours'}"
    return f'<figure><div class="near">{cells}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _cell(row: int, *, css: str = "") -> str:
    """A thumbnail; ``query`` is the image itself, ``new`` a neighbour that was not near before."""
    label = f"image {row}, new among the nearest" if css == "new" else f"image {row}"
    picture = f'<svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{label}"><use href="#i{row}"/></svg>'
    return f'<span class="{css}">{picture}{"<i>new</i>" if css == "new" else ""}</span>'


__all__ = ["WorstImage", "relative_errors", "shown_rows", "thumbnail_library", "worst_figures", "worst_images"]
