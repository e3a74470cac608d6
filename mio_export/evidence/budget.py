"""How far an artifact may lie from the encoder: derived from the encoder's own rounding, never set by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mio_export.bundle import REQUIREMENTS, Precision
from mio_export.schema import strict

_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of one rounding to each precision."""
_FLOAT32_FACTOR = 8.0
_WORST_ROW_FACTOR = 2.0


@strict
@dataclass(frozen=True, kw_only=True)
class Budget:
    """The bounds that one artifact is held to, at every batch size."""

    max_rms_error: float | None
    """Largest root mean square over the rows of ‖artifact − reference‖ / ‖reference‖; None: not bounded."""
    max_row_error: float | None
    """Largest ‖artifact − reference‖ / ‖reference‖ of any row; None: not bounded."""
    min_cosine: float
    """Smallest cosine of any row with its reference."""
    p1_cosine: float
    """Smallest first percentile of the rows' cosines."""
    mean_cosine: float
    """Smallest mean of the rows' cosines."""
    max_norm_drift: float
    """Largest |‖artifact‖ / ‖reference‖ − 1| of any row."""
    top1: float
    """Smallest share of rows whose nearest neighbour is the same."""
    recall_at_10: float
    """Smallest mean share of each row's ten nearest neighbours that are the same."""
    max_knn_change: float
    """Largest change of kNN accuracy where the images have labels."""
    source: str
    """Where these bounds come from."""


_ROWS_AND_RETRIEVAL: Mapping[str, Mapping[str, float]] = {
    "fp32": {"min": 0.999999, "p1": 0.999999, "mean": 0.999999, "norm": 1e-3, "top1": 0.99, "recall": 0.99, "knn": 0.0},
    "fp16": {"min": 0.9999, "p1": 0.9999, "mean": 0.99995, "norm": 0.01, "top1": 0.95, "recall": 0.97, "knn": 0.02},
    "bf16": {"min": 0.998, "p1": 0.999, "mean": 0.9995, "norm": 0.05, "top1": 0.90, "recall": 0.95, "knn": 0.02},
    "int8": {"min": 0.90, "p1": 0.95, "mean": 0.98, "norm": 0.15, "top1": 0.80, "recall": 0.90, "knn": 0.03},
}


def budget_for(
    precision: Precision, *, own_rms_error: float, own_row_error: float, required: Mapping[str, float] | None = None
) -> Budget:
    """Return the bounds of a precision for one encoder.

    fp32 may err 8 times as much as the encoder in float32 does against itself in float64: another order of summation,
    no more. In fp16 and bf16 every rounding is 2^13 or 2^16 times as large, and so, to first order, is the error of the
    whole; both only round what is stored and still add in float32, so there is no factor on top. int8 has no such law:
    its rows and its neighbours are held to bounds that retrieval can live with.

    Source: the rule of ``torch._dynamo.utils.same`` (an error against float64 within a small multiple of float32's
    own), carried over to other precisions by their unit roundoff.

    Args:
        precision: of the artifact.
        own_rms_error: root mean square over rows of the float32 encoder's relative error against float64.
        own_row_error: its largest.
        required: bounds by the names of ``--require``; the tighter of both counts.
    """
    rows = _ROWS_AND_RETRIEVAL[precision]
    budget = Budget(
        max_rms_error=None,
        max_row_error=None,
        min_cosine=rows["min"],
        p1_cosine=rows["p1"],
        mean_cosine=rows["mean"],
        max_norm_drift=rows["norm"],
        top1=rows["top1"],
        recall_at_10=rows["recall"],
        max_knn_change=rows["knn"],
        source="int8: bounds on rows and retrieval; no error model relates int8 to float32",
    )
    if precision != "int8":
        float32 = _ROUNDOFF["fp32"]
        factor = _ROUNDOFF[precision] / float32 if precision != "fp32" else _FLOAT32_FACTOR
        rms = factor * max(own_rms_error, float32)
        worst = _WORST_ROW_FACTOR * factor * max(own_row_error, float32)
        source = f"{factor:,.0f} x the float32 encoder's own error against float64 ({own_rms_error:.1e} rms)"
        budget = replace(budget, max_rms_error=rms, max_row_error=worst, source=f"{precision}: {source}")
    return _tightened(budget, required or {})


def _tightened(budget: Budget, required: Mapping[str, float]) -> Budget:
    for name, value in required.items():
        field = REQUIREMENTS[name]
        tighter = min if field.startswith("max_") else max
        held = getattr(budget, field)
        changed: dict[str, Any] = {field: value if held is None else tighter(held, value)}
        budget = replace(budget, **changed)
    return budget
