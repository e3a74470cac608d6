"""Pages from the templates beside this file: whatever is put into one is escaped, unless it is ``Markup``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture and how to read it."""

    picture: Markup
    meaning: str
    title: str = ""
    keys: Sequence[str] = ()
    """Names of its lines; shown if there are two or more."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    css: str = ""
    """Class of the text: ``up``, ``down`` or none."""
    note: str = ""
    """Shown small below the text."""


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    cells: Sequence[Cell]
    css: str = ""
    note: str = ""
    """Shown small below the name."""


def render(template: str, **values: object) -> Markup:
    """Fill in a template of ``templates/``; the same values give the same text.

    Raises:
        jinja2.UndefinedError: the template needs a value that is not given.
    """
    return Markup(environment().get_template(template).render(values))  # the template has escaped the values


@cache
def environment() -> "Environment":
    """Return the environment of the templates, which escapes values and refuses undefined ones."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["inlined"] = _inlined
    made.filters["breakable"] = _breakable
    return made


def _inlined(name: str) -> Markup:
    """A style sheet or script of this folder."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def _breakable(path: str) -> Markup:
    """A path whose line may be broken after its slashes."""
    return Markup("/<wbr>").join(path.split("/"))


__all__ = ["Cell", "Figure", "Row", "environment", "render"]
