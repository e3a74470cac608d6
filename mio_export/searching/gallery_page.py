"""What a gallery shows: what was found in a collection, and a grid whose images open their neighbours."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

from mio_export.pages import render
from mio_export.searching.answers import Answer
from mio_export.searching.clusters import DuplicateGroup, Structure
from mio_export.searching.thumbnails import Library
from mio_export.store import Embeddings

NEAR_SHOWN = 6
_ANSWER_SHOWN = 20
_GROUPS = 12
_MEMBERS = 8
_BESIDE_OUTLIER = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What a gallery shows; "position" counts in ``structure.rows``, "row" in ``store.keys``."""

    store: Embeddings
    answers: tuple[Answer, ...]
    structure: Structure
    groups: tuple[DuplicateGroup, ...]
    outliers: tuple[tuple[int, float], ...]
    """Position and mean cosine to its neighbours, the lowest first."""
    sample: tuple[int, ...]
    """Positions, in the order of the grid."""

    def groups_shown(self, *, identical: bool) -> list[DuplicateGroup]:
        """Return the first groups of one kind."""
        return [group for group in self.groups if group.identical == identical][:_GROUPS]

    def near(self, position: int, count: int) -> list[tuple[int, float]]:
        """Return the rows nearest to a position, and their cosines."""
        pairs = zip(self.structure.neighbors[position], self.structure.cosines[position], strict=True)
        return [(int(row), min(float(cosine), 1.0)) for row, cosine in pairs][:count]

    def row(self, position: int) -> int:
        """Return a position's row."""
        return int(self.structure.rows[position])


def rows_shown(findings: Findings) -> list[int]:
    """Return every row whose picture is on the page, the most important first."""
    row_of = {key: row for row, key in enumerate(findings.store.keys)}
    rows: list[int] = []
    for answer in findings.answers:
        rows += [row_of[answer.query]] if answer.stored else []
        rows += [row_of[neighbor.key] for neighbor in answer.neighbors[:_ANSWER_SHOWN]]
    for identical in (True, False):
        rows += [row for group in findings.groups_shown(identical=identical) for row in group.rows[:_MEMBERS]]
    for position, _ in findings.outliers:
        rows += [findings.row(position), *(row for row, _ in findings.near(position, _BESIDE_OUTLIER))]
    rows += map(findings.row, findings.sample)
    rows += [row for position in findings.sample for row, _ in findings.near(position, NEAR_SHOWN)]
    return list(dict.fromkeys(rows))


@dataclass(frozen=True)
class _Tile:
    """A picture with its caption; those in the grid open their neighbours wherever they stand."""

    name: str
    key: str
    caption: str = ""
    css: str = ""
    opens: bool = False


@dataclass(frozen=True)
class _Strip:
    """Pictures side by side."""

    caption: str
    tiles: list[_Tile]


def gallery_page(findings: Findings, library: Library, *, title: str) -> str:
    """Return the page as HTML that fetches nothing; without scripts too, an image of the grid opens its neighbours.

    Args:
        findings: what to show.
        library: the pictures, named by row, and ``q0`` and so on for image files among the answers.
        title: name of the collection.
    """
    tiles, info = _Tiles(findings), findings.store.info
    return render(
        "gallery.html",
        title=f"{title} · gallery",
        name=title,
        facts=[*_facts(findings), *library.notes()],
        answers=list(_answers(findings, tiles)),
        grid_meaning=_grid_meaning(findings),
        grid=[tiles.stored(findings.row(position)) for position in findings.sample],
        duplicates=_duplicates(findings, tiles),
        outliers=list(_outliers(findings, tiles)),
        panels=list(_panels(findings, tiles)),
        made=[
            ("space", info.space),
            (info.artifact_file, info.artifact_sha256),
            ("written by", f"mio-export {version('mio-export')}"),
        ],
        thumbnails=library.thumbnails,
        problems=library.problems,
    )


class _Tiles:
    """Makes the tiles of rows."""

    def __init__(self, findings: Findings) -> None:
        self._keys = findings.store.keys
        self._open = {findings.row(position) for position in findings.sample}

    def stored(self, row: int, caption: str = "", css: str = "") -> _Tile:
        return _Tile(str(row), self._keys[row], caption, css, opens=row in self._open)

    def near(self, pairs: Iterable[tuple[int, float]]) -> list[_Tile]:
        return [self.stored(row, _cosine(cosine)) for row, cosine in pairs]


def _cosine(cosine: float) -> str:
    return f"{cosine:.4f}"


def _facts(findings: Findings) -> list[str]:
    info, count = findings.store.info, len(findings.store.keys)
    examined, shown = len(findings.structure.rows), len(findings.sample)
    facts = [
        f"{info.bundle} · {info.embedding_dim:,} dimensions · {info.runtime} {info.precision} on {info.device}",
        f"{count:,} images, {shown:,} of them in the grid" if shown < count else f"{count:,} images, all shown",
    ]
    if examined < count:
        facts.append(
            f"Sampled: near-duplicates and outliers were sought for {examined:,} images at even distances, among all"
            f" {count:,}; identical files in all"
        )
    return facts


def _answers(findings: Findings, tiles: _Tiles) -> Iterable[_Strip]:
    row_of = {key: row for row, key in enumerate(findings.store.keys)}
    for number, answer in enumerate(findings.answers):
        if answer.stored:
            own = tiles.stored(row_of[answer.query], "query", "query")
        else:
            own = _Tile(f"q{number}", answer.query, "query", "query")
        near = [(row_of[neighbor.key], neighbor.cosine) for neighbor in answer.neighbors[:_ANSWER_SHOWN]]
        yield _Strip(answer.query, [own, *tiles.near(near)])


def _grid_meaning(findings: Findings) -> str:
    count, shown = len(findings.store.keys), len(findings.sample)
    if shown == count:
        return "Every image"
    return f"{shown:,} of {count:,} images, spread over the collection, of equal ones one"


def _duplicates(findings: Findings, tiles: _Tiles) -> list[dict[str, object]]:
    near = (
        f"Cosine {findings.structure.near_cosine:.6f} or more: 1 − cosine is at most a twentieth of what it usually is"
        " for the tenth neighbour in this collection. The number is the lowest cosine that joins the group."
    )
    kinds = [("Identical files", "The same bytes (sha256).", True), ("Near-duplicates", near, False)]
    return [
        {
            "title": title,
            "meaning": meaning,
            "counted": _counted(findings, identical=identical),
            "boxes": [_group(group, tiles) for group in findings.groups_shown(identical=identical)],
        }
        for title, meaning, identical in kinds
    ]


def _counted(findings: Findings, *, identical: bool) -> str:
    total = sum(group.identical == identical for group in findings.groups)
    shown = len(findings.groups_shown(identical=identical))
    counted = f"{total:,} groups" if total != 1 else "1 group"
    return (counted + (f", the first {shown:,} shown" if shown < total else "")) if total else "none"


def _group(group: DuplicateGroup, tiles: _Tiles) -> _Strip:
    number = len(group.rows)
    text = f"{number:,} identical files" if group.identical else f"{number:,} images, cosine {group.cosine:.6f}"
    more = f", {number - _MEMBERS:,} not shown" if number > _MEMBERS else ""
    return _Strip(text + more, [tiles.stored(row) for row in group.rows[:_MEMBERS]])


def _outliers(findings: Findings, tiles: _Tiles) -> Iterable[_Strip]:
    for position, mean in findings.outliers:
        own = tiles.stored(findings.row(position), css="query")
        near = tiles.near(findings.near(position, _BESIDE_OUTLIER))
        yield _Strip(f"mean cosine {_cosine(mean)}", [own, *near])


def _panels(findings: Findings, tiles: _Tiles) -> Iterable[_Strip]:
    for position in findings.sample:
        own = tiles.stored(findings.row(position), css="query")
        yield _Strip(own.key, [own, *tiles.near(findings.near(position, NEAR_SHOWN))])


__all__ = ["NEAR_SHOWN", "Findings", "gallery_page", "rows_shown"]
