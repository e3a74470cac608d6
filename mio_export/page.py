"""The look of a report: an HTML page with its style inside, light and dark, for screens of any width and for paper."""

from collections.abc import Iterable, Sequence
from html import escape


def html_page(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """Return a whole page that fetches nothing; empty sections are left out, ``style`` is more CSS."""
    return _PAGE.format(title=escape(title), style=_STYLE + style, body="\n".join(filter(None, sections)))


def section(title: str, body: str) -> str:
    """Return a section; ``body`` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def figure(picture: str, meaning: str, *, title: str = "", keys: Sequence[str] = ()) -> str:
    """Return a figure with a sentence on how to read it; ``picture`` is HTML, two or more ``keys`` name its lines."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    names = "".join(f'<span class="key line-{number}">{escape(key)}</span>' for number, key in enumerate(keys))
    legend = f"<p>{names}</p>" if len(keys) > 1 else ""
    head = f'<div class="head">{heading}{legend}</div>' if heading or legend else ""
    return f"<figure>{head}{picture}<figcaption>{escape(meaning)}</figcaption></figure>"


_STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #1b1f24; --soft: #5f6873; --rule: #e3e6ea; --a: #1f5fbf;
  --b: #c2560c; --c: #8a929c; --up: #1a7f37; --down: #b42318; --alarm: #fdf0ee; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #15181c; --ink: #e4e7eb;
  --soft: #98a1ac; --rule: #2b3038; --a: #79aefc; --b: #f0a05a; --c: #77808b; --up: #5bc47a; --down: #ff8b80;
  --alarm: #33201e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 2rem; max-width: 50rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header p, figcaption, .note, .head, footer, small { color: var(--soft); font-size: .875rem; }
h1 { margin: .1rem 0 .3rem; font-size: clamp(1.5rem, 6vw, 1.9rem); line-height: 1.2; letter-spacing: -.015em; }
h1 span { color: var(--c); font-weight: 400; }
h2 { margin: 3rem 0 1rem; padding-top: .8rem; border-top: 1px solid var(--rule); font-size: 1.2rem; }
h3 { margin: 0; color: var(--ink); font-size: .95rem; } small { font-weight: 400; }
p { margin: .5rem 0; } header p, .head p { margin: 0; }
.alarm { margin-top: 1.5rem; padding: .4rem 1rem; border-left: 4px solid var(--down); background: var(--alarm); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; font-weight: 400; }
tr > :first-child { padding-left: 0; } tr > :last-child { padding-right: 0; }
.scores { width: 100%; } .scores thead { color: var(--soft); font-size: .875rem; vertical-align: bottom; }
.scores td, .scores thead th { text-align: right; } .trained > * { font-weight: 600; }
.gain > * { border: 0; padding-block: .2rem 0; vertical-align: top; }
.gain th { padding-left: 1rem; color: var(--soft); }
.gain small { display: block; white-space: nowrap; } .gain + tr:not(.gain) > * { border-top: 1px solid var(--rule); }
.up { color: var(--up); } .down { color: var(--down); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 2.2rem 2.5rem; }
figure { margin: 0; break-inside: avoid; } figcaption { margin-top: .4rem; }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: baseline; }
.key { margin-right: .9rem; } .key::before { content: ""; display: inline-block; width: 1.2rem; margin-right: .35rem;
  vertical-align: .25em; border-top: 2px var(--dash) var(--tone); }
svg, img { display: block; max-width: 100%; } svg { width: 100%; margin-top: .3rem; overflow: visible; }
text { font-size: 11px; fill: var(--soft); } .axis { stroke: var(--rule); }
.line { fill: none; stroke: var(--tone); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.dot, .value { fill: var(--tone); } .value { font-size: 12px; font-weight: 600; }
.line-0 { --tone: var(--a); --dash: solid; } .line-1 { --tone: var(--b); --dash: dashed; stroke-dasharray: 6 4; }
.line-2 { --tone: var(--c); --dash: dotted; stroke-dasharray: 1 4; }
.bar { fill: var(--a); } .mark { stroke: var(--b); stroke-width: 1.6; stroke-dasharray: 5 3; }
.mark-name { fill: var(--b); font-weight: 600; } .scores small { color: var(--soft); white-space: nowrap; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 2.5rem;
  margin: .8rem 0 2.2rem; } .note + h3 { margin-top: 1.5rem; }
.near { display: grid; grid-template-columns: 3.9rem minmax(0, 3.8rem) repeat(4, minmax(0, 3.2rem)); gap: .3rem;
  align-items: center; }
.near svg { margin: 0; border-radius: 3px; } .near small { color: var(--soft); line-height: 1.2; }
.near .query { padding-right: .6rem; }
.near .new { outline: 2px dashed var(--down); outline-offset: -1px; position: relative; }
.new i { position: absolute; right: 0; bottom: 0; padding: 0 .25rem; background: var(--down); color: var(--paper);
  font: 600 .65rem/1.3 system-ui, sans-serif; }
.library { position: absolute; width: 0; height: 0; }
summary { cursor: pointer; } footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--rule); }
footer th, footer td { padding-block: .2rem; overflow-wrap: anywhere; }
@media (min-width: 46rem) { .beside figure { display: grid; grid-template-columns: 1fr 1fr; column-gap: 2.5rem; }
  .beside .head { grid-column: span 2; } .beside figcaption { margin-top: 0; } }
@media (max-width: 32rem) { .scores { font-size: .875rem; } th, td { padding: .4rem .3rem; } }
@media print { body { padding: 0; max-width: none; font-size: 11pt; } h2 { margin-top: 2rem; break-after: avoid; }
  details::details-content { content-visibility: visible; height: auto; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


__all__ = ["figure", "html_page", "section"]
