"""What each quantity of a run's metrics is, drawn over the epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mio_export.pages import Figure, Line, line_chart

_CURVES = {
    "loss": (
        "Loss",
        "Should fall, fast at first. Its height compares runs of one objective and one setting only, and a collapse may"
        " score well: read it together with the ranks.",
    ),
    "mutual_information": ("Mutual information of the views", "Estimated from the loss. Should rise."),
    "effective_rank": (
        "Effective rank",
        "How many directions the outputs spread over (RankMe), on training images without augmentation. It may settle"
        " below its start; a fall towards 1 is a collapse.",
    ),
    "spread": (
        "Spread",
        "How much the normalised outputs differ from image to image, 1 being all directions alike. Near 0, all images"
        " look alike to the encoder.",
    ),
    "alignment": (
        "Alignment",
        "How far an image's projection lies from that of a view of it. Should be low, but a collapse is lowest of all.",
    ),
    "uniformity": (
        "Uniformity",
        "How unevenly projections cover the sphere. Should fall; 0 is a collapse to one point.",
    ),
    "second_moment_lag": (
        "Lag of the second moment",
        "How far the moving average Λ is from its present value, relatively. Should fall below 0.2 and stay there.",
    ),
    "knn": ("kNN while training, %", "On training images, some against the others. Should rise, then level off."),
    "copy_recall": (
        "Copy recall while training, %",
        "On training images, without labels. Should rise, then level off.",
    ),
    "learning_rate": (
        "Learning rate",
        "A setting, not a result: it rises in the warm-up, then falls to 0 on a cosine.",
    ),
}
"""By key of ``metrics.jsonl``: title, unit included, and what good looks like; ``KEY_projections`` is a second line."""
_INFORMATION = {
    "mio": (
        "Mutual information, nats",
        "ln 2 − L/2, for τ⁺ = τ⁻ a lower bound (Jensen-Shannon) of what the two views tell of each other. Should rise"
        " from 0; 0.69 is the most.",
    ),
    "simclr": (
        "Mutual information, nats",
        "ln(2N − 1) − L, a lower bound (InfoNCE) of what the two views tell of each other. Should rise; for N images in"
        " a batch it cannot pass ln(2N − 1).",
    ),
    "spectral": (
        "Mutual information, χ²",
        "−L − 1, a lower bound of what the two views tell of each other. Should rise.",
    ),
    "minc": (
        "Mutual information, χ²",
        "−L − 1, an estimate, not a bound, of what the two views tell of each other. Should rise.",
    ),
}


def curve_figures(metrics: Sequence[Mapping[str, Any]], *, objective: str) -> list[Figure]:
    """Return a figure of every known quantity that the metrics hold.

    Args:
        metrics: a mapping for each epoch; what is unknown, missing, null or not finite is passed over.
        objective: decides what the mutual information is an estimate of.
    """
    curves = {**_CURVES, "mutual_information": _INFORMATION.get(objective, _CURVES["mutual_information"])}
    figures = (_curve(metrics, key, title, meaning) for key, (title, meaning) in curves.items())
    return [figure for figure in figures if figure]


def _curve(metrics: Sequence[Mapping[str, Any]], key: str, title: str, meaning: str) -> Figure | None:
    lines = []
    for name, column in (("features", key), ("projections", f"{key}_projections")):
        values = [(line["epoch"], line.get(column)) for line in metrics]
        points = [(epoch, value * (100 if "%" in title else 1)) for epoch, value in values if is_number(value)]
        lines += [Line(name=name, points=points)] if points else []
    if not lines:
        return None
    limits = metrics[0]["epoch"], metrics[-1]["epoch"]
    chart = line_chart(lines, title=f"{title}, by epoch", x_label="epoch", x_limits=limits)
    return Figure(picture=chart, meaning=meaning, title=title, keys=[line.name for line in lines])


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


__all__ = ["curve_figures", "is_number"]
