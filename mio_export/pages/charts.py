"""Line charts and histograms as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 194
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 306, 8, 168
_LABEL_HEIGHT = 13
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    """What the key calls it; not shown if it is the only line."""
    points: Sequence[tuple[float, float]]
    """Finite x and y, x rising; at least one."""


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """A linear map from values to SVG units."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line], *, title: str, x_label: str, x_limits: tuple[float, float], log: bool = False
) -> Markup:
    """Draw lines over one pair of axes as an SVG element without colours of its own.

    A style sheet colours the classes ``axis``, ``tick`` and ``line-0``, ``line-1``, … The last value of each line is
    marked and written beside it, unless the y axis is logarithmic: there the values span decades, and the last is the
    least of them.

    Args:
        lines: what to draw.
        title: what a screen reader says of it.
        x_label: quantity of the x axis.
        x_limits: least and greatest x to show, so that charts side by side can share them.
        log: whether the y axis is logarithmic; every y must then be above 0.
    """
    values = [value for line in lines for _, value in line.points]
    x, y = _x_axis(*x_limits), _log_axis(values) if log else _y_axis(values)
    parts = [*_axes(x, y), _text(_LEFT - 8, _BOTTOM + 21, x_label, anchor="end")]
    ends = []
    for number, line in enumerate(lines):
        drawn = [(x.at(a), y.at(math.log10(b) if log else b)) for a, b in line.points]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in drawn)
        parts.append(Markup('<path class="line line-{}" d="M{}"/>').format(number, path))
        ends.append((*drawn[-1], number, number_label(line.points[-1][1])))
    return _svg(title, [*parts, *([] if log else _last_values(ends))])


def log_histogram(
    values: Sequence[float], *, title: str, limits: tuple[int, int], mark: tuple[float, str] | None
) -> Markup:
    """Draw how many values lie in each quarter of a decade, as an SVG element without colours of its own.

    A style sheet colours the classes ``axis``, ``tick``, ``bar`` and ``mark``. What lies outside the limits, 0 among
    it, is counted at the end that it lies beyond.

    Args:
        values: finite and not negative.
        title: what a screen reader says of it.
        limits: decimal exponents of the least and greatest value to show, so that charts side by side can share them.
        mark: a value above 0 to draw a line at, and what it is called.
    """
    bins = 4 * (limits[1] - limits[0])
    counts = [0] * bins
    for value in values:
        place = 4 * (math.log10(value) - limits[0]) if value > 0 else 0
        counts[min(max(math.floor(place), 0), bins - 1)] += 1
    decades = [(n, "10" + str(n).translate(_SUPERSCRIPTS) if n else "1") for n in range(limits[0], limits[1] + 1)]
    x = _Axis(low=limits[0], high=limits[1], ticks=decades, start=_LEFT, end=_WIDTH - 8)
    y = _y_axis([0, max(*counts, 4)])
    parts = _axes(x, y)
    width = (x.end - x.start) / bins
    for place, count in enumerate(counts):
        if count:
            left, top = x.start + place * width, y.at(count)
            bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>')
            parts.append(bar.format(left + 0.5, top, width - 1, _BOTTOM - top))
    return _svg(title, [*parts, *([_marked(x, *mark)] if mark else [])])


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return svg.format(_WIDTH, _HEIGHT, title, Markup().join(parts))


def _axes(x: _Axis, y: _Axis) -> list[Markup]:
    """Ticks of both and the lines across."""
    across = Markup('<path class="axis" d="M{} {:.1f}H{}"/>')
    return [
        *[_text(_LEFT - 8, y.at(value) + 4, label, anchor="end") for value, label in y.ticks],
        *[across.format(_LEFT, y.at(value), x.end) for value, _ in y.ticks],
        *[_text(x.at(value), _BOTTOM + 21, label, anchor="middle") for value, label in x.ticks],
    ]


def _marked(x: _Axis, value: float, name: str) -> Markup:
    """A dashed vertical line with its name on the side that has room."""
    at = min(max(x.at(math.log10(value)), x.start), x.end)
    left = at > (x.start + x.end) / 2
    label = _text(at + (-5 if left else 5), _TOP + 8, name, anchor="end" if left else "start", css="mark-name")
    return Markup('<path class="mark" d="M{:.1f} {}V{}"/>{}').format(at, _TOP, _BOTTOM, label)


def number_label(value: float) -> str:
    """Return a number as short as it can be read: three digits, or two with an exponent."""
    if 0 < abs(value) < 1e-3:
        return _typeset(f"{value:.1e}")
    return _typeset(f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}")


def _x_axis(low: float, high: float) -> _Axis:
    """Whole numbers; a single one lies in the middle."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = int(max(1, _step(high - low, 6)))
    numbers = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    return _Axis(low=low, high=high, ticks=[(n, f"{n:,}") for n in numbers], start=_LEFT, end=_RIGHT)


def _y_axis(values: Sequence[float]) -> _Axis:
    """From a round number to a round number; a constant lies in the middle."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    step = _step(high - low, 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    form = f".{max(0, -math.floor(math.log10(step)))}f" if 1e-4 <= step < 1e6 else ".3g"
    ticks = [(n * step, _typeset(f"{n * step:{form}}")) for n in range(first, last + 1)]
    return _Axis(low=first * step, high=last * step, ticks=ticks, start=_BOTTOM, end=_TOP)


def _log_axis(values: Sequence[float]) -> _Axis:
    """Whole decades; positions are log10 of the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    low = min(low, high - 1)
    ticks = [(n, "10" + str(n).translate(_SUPERSCRIPTS) if n else "1") for n in range(low, high + 1)]
    return _Axis(low=low, high=high, ticks=ticks, start=_BOTTOM, end=_TOP)


def _step(span: float, count: int) -> float:
    """The least of 1, 2, 5, 10, 20, … that divides a span into at most ``count`` parts."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span * (1 - 1e-9))


def _last_values(ends: Sequence[tuple[float, float, int, str]]) -> list[Markup]:
    """A dot at each line's end and its value to the right, moved down where two values would overlap."""
    dot = Markup('<circle class="dot line-{}" cx="{:.1f}" cy="{:.1f}" r="3"/>')
    parts, free = [], -math.inf
    for x, y, number, label in sorted(ends, key=lambda end: end[1]):
        free = max(y + 4, free)
        parts.append(dot.format(number, x, y))
        parts.append(_text(x + 7, free, label, css=f"value line-{number}"))
        free += _LABEL_HEIGHT
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "tick") -> Markup:
    element = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return element.format(css, x, y, anchor, text)


def _typeset(text: str) -> str:
    """Give a number a real minus sign, and an exponent without padding."""
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


__all__ = ["Line", "line_chart", "log_histogram", "number_label"]
