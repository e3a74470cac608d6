"""``write_gallery``: a collection as one HTML page, its pictures inside."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mio_export.console.progress import Progress
from mio_export.errors import MioError
from mio_export.files import write_text
from mio_export.searching.answers import Answer
from mio_export.searching.clusters import Structure, duplicate_groups, examine, outliers, spread_sample, walk
from mio_export.searching.gallery_page import NEAR_SHOWN, Findings, gallery_page, rows_shown
from mio_export.searching.originals import originals
from mio_export.searching.thumbnails import Wanted, picture_library
from mio_export.sources.local import file_on_disk
from mio_export.store import Embeddings, load_with_rows

_SAMPLE = 200
_OUTLIERS = 12
_MOST_PICTURES = 900


@dataclass(frozen=True, kw_only=True)
class GalleryResult:
    """What a gallery shows of a collection."""

    path: Path
    num_images: int
    """Images in the store that have an embedding."""
    num_examined: int
    """Of them, those whose neighbours were looked for, among all."""
    num_shown: int
    """Of those, the ones in the grid."""
    notes: tuple[str, ...]
    """Pictures that could not be shown and why, a line for each reason."""

    def summary(self) -> list[str]:
        """Return what was written, in words."""
        size = self.path.stat().st_size
        shown = f"{self.num_shown:,} of {self.num_images:,} images in its grid"
        return [f"{self.path}: {shown}, {size / 1e6:,.1f} MB", *(f"note: {note}" for note in self.notes)]


def write_gallery(
    path: str | Path,
    out: str | Path,
    *,
    answers: Sequence[Answer] = (),
    source: str | Path | Sequence[str | Path] | None = None,
    progress: Progress | None = None,
) -> GalleryResult:
    """Write a page that shows a collection: queries, near-duplicates, outliers and a grid to wander through.

    The page fetches nothing and is at most about 5 MB. In collections beyond 20,000 images, duplicates by look and
    outliers are sought for a sample, among all images; identical files are found in all.

    Args:
        path: the HTML file to write.
        out: a store's folder.
        answers: queries to show, as ``answer`` gives them for this store.
        source: what was embedded, for the pictures: a folder, or any source that ``mio embed`` takes, or several. What
            a key names outside it is not shown, nor a link out of it unless it leads to the bytes that were embedded.
            None: names take the place of pictures.
        progress: is told how far the work is.

    Raises:
        UsageError: there is no store, or ``source`` is no source.
        MioError: the store holds no embeddings.
    """
    path, (store, stored) = Path(path), load_with_rows(out)
    find = originals(source)
    if not store.keys:
        raise MioError(f"{out} holds no embeddings: all its files failed; why: mio inspect {out}")
    findings = _findings(store, [stored[key].sha256 for key in store.keys], answers)
    wanted = {f"q{number}": _query(a.query) for number, a in enumerate(answers) if not a.stored}
    wanted |= {str(row): find(stored[store.keys[row]]) for row in rows_shown(findings)}
    library = picture_library(wanted, progress or Progress())
    write_text(path, gallery_page(findings, library, title=Path(out).absolute().name))
    return GalleryResult(
        path=path,
        num_images=len(store.keys),
        num_examined=len(findings.structure.rows),
        num_shown=len(findings.sample),
        notes=tuple(library.notes()),
    )


def _query(path: str) -> Wanted:
    return Wanted(file=file_on_disk(os.fsencode(Path(path).absolute()), "/"), size=None)


def _findings(store: Embeddings, hashes: Sequence[str | None], answers: Sequence[Answer]) -> Findings:
    structure = examine(store.vectors)
    vectors = store.vectors[structure.rows]
    sample = _affordable(structure, spread_sample(vectors, _SAMPLE))
    return Findings(
        store=store,
        answers=tuple(answers),
        structure=structure,
        groups=tuple(duplicate_groups(structure, hashes)),
        outliers=tuple(outliers(structure, _OUTLIERS)),
        sample=tuple(sample[position] for position in walk(vectors[sample])),
    )


def _affordable(structure: Structure, sample: Sequence[int]) -> list[int]:
    """As much of a sample as has, with its neighbours, at most 900 pictures."""
    shown: set[int] = set()
    for number, position in enumerate(sample):
        shown |= {int(structure.rows[position]), *structure.neighbors[position, :NEAR_SHOWN].tolist()}
        if len(shown) > _MOST_PICTURES:
            return list(sample[:number])
    return list(sample)


__all__ = ["GalleryResult", "write_gallery"]
