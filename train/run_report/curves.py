"""What each quantity of a run's metrics is, drawn over the epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from mio_export.pages import Figure, Line, line_chart
from mio_export.train.objectives.registry import OBJECTIVES, monitored_quantities

_LEARNING = {
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
}
_SCHEDULE = {
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
"""By key of ``metrics.jsonl``: title with unit, and what good looks like; ``KEY_projections`` is a second line."""


def curve_figures(metrics: Sequence[Mapping[str, Any]], *, objective: str) -> list[Figure]:
    """Return a figure of every known quantity that the metrics hold.

    Args:
        metrics: a mapping for each epoch; what is unknown, missing, null or not finite is passed over.
        objective: decides what the mutual information is an estimate of.
    """
    spec, curves = OBJECTIVES.get(objective), dict(_LEARNING)
    if spec is not None and (information := spec.build.information) is not None:
        curves["mutual_information"] = (information.title, information.meaning)
    curves |= {key: (quantity.title, quantity.meaning) for key, quantity in monitored_quantities().items()}
    curves |= _SCHEDULE
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
