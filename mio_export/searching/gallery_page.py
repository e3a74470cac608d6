"""The gallery as HTML: what was found in a collection, and a grid whose images open their neighbours."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version

from mio_export.page import html_page, section
from mio_export.searching.answers import Answer
from mio_export.searching.gallery_style import SCRIPT, STYLE
from mio_export.searching.structure import DuplicateGroup, Structure
from mio_export.searching.thumbnails import Library, picture
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


def gallery_page(findings: Findings, library: Library, *, title: str) -> str:
    """Return the page as HTML that fetches nothing; without scripts too, an image of the grid opens its neighbours.

    Args:
        findings: what to show.
        library: the pictures, named by row, and ``q0`` and so on for image files among the answers.
        title: name of the collection.
    """
    tiles = _Tiles(findings, library)
    sections = [
        _header(findings, library, title),
        _answers(findings, tiles),
        _grid(findings, tiles),
        _duplicates(findings, tiles),
        _outliers(findings, tiles),
        _footer(findings),
        _panels(findings, tiles),
        library.html,
        f"<script>{SCRIPT}</script>",
    ]
    return html_page(f"{title} · gallery", sections, style=STYLE)


class _Tiles:
    """Pictures with their captions; those in the grid link to their neighbours wherever they stand."""

    def __init__(self, findings: Findings, library: Library) -> None:
        self._keys = findings.store.keys
        self._library = library
        self._open = {findings.row(position) for position in findings.sample}

    def stored(self, row: int, caption: str = "", *, css: str = "") -> str:
        return self._tile(str(row), self._keys[row], caption, css, opens=row in self._open)

    def query(self, name: str, path: str) -> str:
        return self._tile(name, path, "query", "query", opens=False)

    def bare(self, row: int) -> str:
        key = escape(self._keys[row])
        inside = picture(str(row), self._keys[row], self._library, label=False)
        return f'<li><a href="#n{row}" aria-label="{key}: show its nearest" title="{key}">{inside}</a></li>'

    def _tile(self, name: str, key: str, caption: str, css: str, *, opens: bool) -> str:
        inside = picture(name, key, self._library, label=False)
        if opens:
            inside = f'<a href="#n{name}" aria-label="{escape(key)}: show its nearest">{inside}</a>'
        strong = f"<b>{escape(caption)}</b>" if caption else ""
        hidden = ' aria-hidden="true"' if opens else ""  # the link says it
        mark = f' class="{css}"' if css else ""
        return f'<li{mark} title="{escape(key)}">{inside}{strong}<small{hidden}>{_breakable(key)}</small></li>'


def _breakable(key: str) -> str:
    """A key that may be broken after its slashes."""
    return escape(key).replace("/", "/<wbr>")


def _strip(tiles: Iterable[str]) -> str:
    return f'<ol class="strip" role="list">{"".join(tiles)}</ol>'


def _cosine(cosine: float) -> str:
    return f"{cosine:.4f}"


def _header(findings: Findings, library: Library, title: str) -> str:
    info, count = findings.store.info, len(findings.store.keys)
    facts = f"{info.bundle} · {info.embedding_dim:,} dimensions · {info.runtime} {info.precision} on {info.device}"
    examined, shown = len(findings.structure.rows), len(findings.sample)
    lines = [f"{count:,} images, {shown:,} of them in the grid" if shown < count else f"{count:,} images, all shown"]
    if examined < count:
        lines.append(
            f"Sampled: near-duplicates and outliers were sought for {examined:,} images at even distances, among all"
            f" {count:,}; identical files in all"
        )
    links = [("queries", "Queries")] if findings.answers else []
    links += [("collection", "Collection"), ("duplicates", "Duplicates"), ("outliers", "Outliers")]
    nav = "".join(f'<a href="#{name}">{text}</a>' for name, text in links)
    return (
        f"<header><p>Gallery</p><h1>{escape(title)}</h1><p>{escape(facts)}</p>"
        f"{''.join(f'<p>{escape(line)}</p>' for line in [*lines, *library.notes()])}<nav>{nav}</nav></header>"
    )


def _named(name: str, title: str, body: str) -> str:
    return f'<div id="{name}">{section(title, body)}</div>'


def _answers(findings: Findings, tiles: _Tiles) -> str:
    if not findings.answers:
        return ""
    row_of = {key: row for row, key in enumerate(findings.store.keys)}
    strips = []
    for number, answer in enumerate(findings.answers):
        own = tiles.stored(row_of[answer.query], "query", css="query") if answer.stored else ""
        own = own or tiles.query(f"q{number}", answer.query)
        near = [tiles.stored(row_of[n.key], _cosine(n.cosine)) for n in answer.neighbors[:_ANSWER_SHOWN]]
        strips.append(f"<h3>{escape(answer.query)}</h3>{_strip([own, *near])}")
    return _named("queries", "Queries", _note("Each beside its nearest images, by cosine.") + "".join(strips))


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _grid(findings: Findings, tiles: _Tiles) -> str:
    count, shown = len(findings.store.keys), len(findings.sample)
    what = (
        "Every image"
        if shown == count
        else f"{shown:,} of {count:,} images, spread over the collection, of equal ones one"
    )
    note = _note(f"{what}; similar ones stand together. Choose one to see the images nearest to it.")
    cells = "".join(tiles.bare(findings.row(position)) for position in findings.sample)
    return _named("collection", "Collection", f'{note}<ul class="tiles" role="list">{cells}</ul>')


def _duplicates(findings: Findings, tiles: _Tiles) -> str:
    near = findings.structure.near_cosine
    parts = [
        *_groups("Identical files", "The same bytes (sha256).", findings, tiles, identical=True),
        *_groups(
            "Near-duplicates",
            f"Cosine {near:.6f} or more: 1 − cosine is at most a twentieth of what it usually is for the tenth"
            " neighbour in this collection. The number is the lowest cosine that joins the group.",
            findings,
            tiles,
            identical=False,
        ),
    ]
    return _named("duplicates", "Duplicates", "".join(parts))


def _groups(title: str, meaning: str, findings: Findings, tiles: _Tiles, *, identical: bool) -> list[str]:
    total = sum(group.identical == identical for group in findings.groups)
    shown = findings.groups_shown(identical=identical)
    counted = f"{total:,} groups" if total != 1 else "1 group"
    counted += f", the first {len(shown):,} shown" if len(shown) < total else ""
    boxes = "".join(_group(group, tiles) for group in shown)
    heading = f"<h3>{title} <small>{counted if total else 'none'}</small></h3>"
    return [heading, _note(meaning), f'<div class="groups">{boxes}</div>' if boxes else ""]


def _group(group: DuplicateGroup, tiles: _Tiles) -> str:
    number = len(group.rows)
    text = f"{number:,} identical files" if group.identical else f"{number:,} images, cosine {group.cosine:.6f}"
    more = f", {number - _MEMBERS:,} not shown" if number > _MEMBERS else ""
    strip = _strip(tiles.stored(row) for row in group.rows[:_MEMBERS])
    return f"<figure>{strip}<figcaption>{text}{more}</figcaption></figure>"


def _outliers(findings: Findings, tiles: _Tiles) -> str:
    if not findings.outliers:
        return ""
    note = _note("Least like their ten nearest images, by mean cosine; each beside the three nearest.")
    boxes = []
    for position, mean in findings.outliers:
        own = tiles.stored(findings.row(position), css="query")
        near = [tiles.stored(row, _cosine(cosine)) for row, cosine in findings.near(position, _BESIDE_OUTLIER)]
        boxes.append(f"<figure>{_strip([own, *near])}<figcaption>mean cosine {_cosine(mean)}</figcaption></figure>")
    return _named("outliers", "Outliers", f'{note}<div class="groups">{"".join(boxes)}</div>')


def _panels(findings: Findings, tiles: _Tiles) -> str:
    return "".join(_panel(findings, tiles, position) for position in findings.sample)


def _panel(findings: Findings, tiles: _Tiles, position: int) -> str:
    row = findings.row(position)
    key = findings.store.keys[row]
    near = [tiles.stored(other, _cosine(cosine)) for other, cosine in findings.near(position, NEAR_SHOWN)]
    own = tiles.stored(row, css="query")
    return (
        f'<section class="panel" id="n{row}" tabindex="-1" aria-label="Nearest to {escape(key)}"><div>'
        f'<h3>Nearest to {_breakable(key)}</h3><a href="#closed" aria-label="Close">×</a></div>'
        f"{_strip([own, *near])}</section>"
    )


def _footer(findings: Findings) -> str:
    info = findings.store.info
    rows: Sequence[tuple[str, str]] = (
        ("space", info.space),
        (info.artifact_file, info.artifact_sha256),
        ("written by", f"mio-export {version('mio-export')}"),
    )
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<footer><table>{cells}</table></footer>"


__all__ = ["NEAR_SHOWN", "Findings", "gallery_page", "rows_shown"]
