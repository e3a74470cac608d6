"""The table of an evaluation: the trained encoder among its baselines, and what it gained on them."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mio_export.metrics import HEADLINE_K
from mio_export.pages import Cell, Row, render
from mio_export.train.run_report.curves import is_number

_BASELINES = ("raw pixels", "PCA", "untrained")
_KNN = f"kNN\u00a0(k={HEADLINE_K})"


def scores_table(scores: Mapping[str, Any], differences: Mapping[str, Any]) -> Markup:
    """Return the table as HTML: baselines, trained, its gains in points, then whatever else was scored.

    Args:
        scores: by row, as ``evaluation.json`` has them, ``trained`` among them; what a row lacks is a dash.
        differences: the gain in kNN on other rows with ``low`` and ``high``, the ends of its interval, if known.
    """
    rows = {name: _measures(values) for name, values in scores.items()}
    measures = list(rows["trained"])
    first = [name for name in _BASELINES if name in rows]
    rest = [name for name in rows if name not in (*first, "trained")]
    lines = [Row(name, [_percent(rows[name].get(measure)) for measure in measures]) for name in first]
    lines.append(Row("trained", [_percent(rows["trained"][measure]) for measure in measures], "trained"))
    for label, others in (("over untrained", ["untrained"]), ("over best baseline", first)):
        rivals = [{name: rows[name][m] for name in others if m in rows.get(name, {})} for m in measures]
        gains = [_gain(m, rows["trained"][m], values, differences) for m, values in zip(measures, rivals, strict=True)]
        lines.append(Row(label, gains, "gain"))
    lines += [Row(name, [_percent(rows[name].get(measure)) for measure in measures]) for name in rest]
    return render("scores.html", heads=measures, rows=lines)


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    """What there is of one way of embedding, under the names that the table shows."""
    cells = {
        _KNN: (row.get("knn") or {}).get(str(HEADLINE_K)),
        "linear": row.get("linear"),
        "SGD": row.get("sgd"),
        **{f"{shot}-shot": value for shot, value in (row.get("few_shot") or {}).items()},
        **{f"copy recall@{k}": value for k, value in (row.get("copy_recall") or {}).items()},
    }
    return {name: value for name, value in cells.items() if is_number(value)}


def _gain(measure: str, trained: float, rivals: Mapping[str, float], differences: Mapping[str, Any]) -> Cell:
    """The lead over the best of the rivals, green or red, with its interval if there is one."""
    if not rivals:
        return Cell("–")
    best = max(rivals, key=lambda name: rivals[name])
    gain = 100 * (trained - rivals[best])
    css = "up" if round(gain, 1) > 0 else "down" if round(gain, 1) < 0 else ""
    interval = differences.get(best) if measure == _KNN else None
    ends = f"{_points(100 * interval['low'])} to {_points(100 * interval['high'])}" if interval else ""
    return Cell(_points(gain), css, ends)


def _percent(share: float | None) -> Cell:
    return Cell("–" if share is None else f"{100 * share:.1f}")


def _points(gain: float) -> str:
    return f"{gain:+.1f}".replace("-", "−")


__all__ = ["scores_table"]
