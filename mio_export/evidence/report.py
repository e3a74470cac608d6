"""A parity report: what was compared with what, held to which budget, with which result."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from mio_export.bundle import Verdict
from mio_export.errors import GateError
from mio_export.evidence.budget import Budget
from mio_export.schema import finite, json_text, parse_json, strict

SCHEMA_VERSION = 1
_MAX_BYTES = 16 * 1024**2


@strict
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One device at one batch size, against the reference; every error over all rows."""

    device: str
    batch_size: int
    num_rows: int
    max_abs_error: float
    mean_abs_error: float
    max_relative_error: float
    """Largest ‖candidate − reference‖ / ‖reference‖ of a row."""
    rms_relative_error: float
    """Root mean square of the same over the rows."""
    min_cosine: float
    p1_cosine: float
    """First percentile of the rows' cosines."""
    mean_cosine: float
    max_norm_drift: float
    """Largest |‖candidate‖ / ‖reference‖ − 1| of a row."""
    top1_agreement: float
    """Share of rows whose nearest other row is the same."""
    recall_at_10_agreement: float
    """Mean share of each row's ten nearest other rows that are the same."""
    knn_change: float | None
    """Change of the leave-one-out kNN accuracy; None without labels."""
    worst_row: int
    """Index of the row with the largest relative error."""
    problems: tuple[str, ...]
    """Why it fails; empty if it passes."""


@strict
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that a verdict rests on, by its sha256."""

    artifact_sha256: str
    companions: Mapping[str, str]
    """Files beside the artifact and their sha256."""
    weights_sha256: str
    images_sha256: str
    """Of shape and pixels of the images."""
    images: str
    """What they are, for people."""
    golden_sha256: str
    """Of the golden images' pixels."""


@strict
@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was compared with what, held to which budget, with which result; the whole of ``parity/*.json``."""

    schema_version: int = SCHEMA_VERSION
    artifact: str
    format: str
    precision: str
    runtime: str
    devices: tuple[str, ...]
    """Where it was run."""
    options: Mapping[str, str]
    """Options that the runtime was opened with."""
    budget: Budget
    requirements: Mapping[str, float]
    """What was asked for beyond the precision's own budget."""
    own_rms_error: float
    """Root mean square over rows of the float32 encoder's relative error against float64."""
    own_row_error: float | None = None
    """Its largest row; None in reports that are older than this field."""
    comparisons: tuple[Comparison, ...]
    golden: Mapping[str, float]
    """Relative error of each golden image."""
    shapes: Mapping[str, str]
    """What became of shapes beyond the contract: ``accepted`` or ``rejected``."""
    stages: tuple[Mapping[str, Any], ...]
    """What each stage of the export did to the error, in order."""
    evidence: Evidence
    versions: Mapping[str, str]
    """Versions of the libraries that the verdict rests on."""
    problems: tuple[str, ...]
    """Why it fails; empty if it passes."""
    unproven: str | None
    """Why it could not be run here; None if it was."""

    @property
    def verdict(self) -> Verdict:
        """``proved`` only if something was compared and everything held."""
        if self.unproven is not None and not self.problems:
            return "unproven"
        return "proved" if self.comparisons and not self.problems else "refused"

    @property
    def passed(self) -> bool:
        """Whether it was run and everything held."""
        return self.verdict == "proved"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, the verdict included."""
        values = asdict(self)
        return {"schema_version": values.pop("schema_version"), "verdict": self.verdict, **values}

    def to_json(self) -> str:
        """Return the text of its file, where NaN and infinity are null."""
        return json_text(finite(self.to_dict()))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report strictly: unknown and missing keys are errors, so is a verdict that its contents contradict.

        Reports of before there was a ``schema_version`` are version 1.

        Raises:
            GateError: the file is no parity report, or contradicts itself.
            MioError: it was written by a newer mio-export.
        """
        if path.stat().st_size > _MAX_BYTES:
            raise GateError(f"{path} is no parity report: it has {path.stat().st_size:,} bytes")
        try:
            values = json.loads(path.read_bytes(), parse_constant=_no_number)
            stated = values.pop("verdict")
            text = json.dumps({"schema_version": SCHEMA_VERSION, **_with_infinity(values)}).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise GateError(f"{path} is no parity report") from None
        report = parse_json(text, cls, where=path, newest=SCHEMA_VERSION)
        if stated != report.verdict:
            raise GateError(f"{path} says {stated!r} of itself, its contents say {report.verdict!r}")
        return report


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes that an artifact is proved at: both ends of the declared range, and two inside."""
    return tuple(sorted({1, min(2, max_batch), min(17, max_batch), max_batch}))


def beyond_budget(values: Mapping[str, Any], budget: Budget) -> list[str]:
    """Return which bounds a comparison breaks, the most telling first; one with NaN always breaks some.

    Args:
        values: the fields of ``Comparison`` by name; ``problems`` is not looked at.
        budget: the bounds.
    """
    row = f"row {values['worst_row']}"
    checks: list[tuple[str, float, float | None, str]] = [
        ("max_relative_error", -1, budget.max_row_error, f"{row}: relative error {{:.1e}} is above {{:.1e}}"),
        ("rms_relative_error", -1, budget.max_rms_error, "relative error {:.1e} (rms over rows) is above {:.1e}"),
        ("min_cosine", 1, budget.min_cosine, f"{row}: cosine {{:.7f}} is below {{}}"),
        ("p1_cosine", 1, budget.p1_cosine, "first percentile of cosines {:.7f} is below {}"),
        ("mean_cosine", 1, budget.mean_cosine, "mean cosine {:.7f} is below {}"),
        ("max_norm_drift", -1, budget.max_norm_drift, "norm drift {:.1e} is above {}"),
        ("top1_agreement", 1, budget.top1, "nearest neighbours agree for {:.1%} of the rows, must be {:.0%}"),
        ("recall_at_10_agreement", 1, budget.recall_at_10, "recall@10 {:.1%} is below {:.0%}"),
    ]
    problems = [
        text.format(values[name], bound)
        for name, sign, bound, text in checks
        if bound is not None and not sign * values[name] >= sign * bound
    ]
    return problems + _beyond_knn(values, budget)


def _beyond_knn(values: Mapping[str, Any], budget: Budget) -> list[str]:
    """One image may always change: among few images, one is already more than any threshold."""
    change = values["knn_change"]
    allowed = max(budget.max_knn_change, 1 / values["num_rows"])
    if change is None or abs(change) <= allowed + 1e-12:
        return []
    return [f"kNN accuracy changes by {change:+.1%}, at most {allowed:.1%} is allowed"]


def _with_infinity(values: dict[str, Any]) -> dict[str, Any]:
    """Put infinity where JSON, which lacks it, has null: in the numbers of what failed."""
    numbers = [field.name for field in fields(Comparison) if field.type is float]
    comparisons = [_filled(comparison, numbers) for comparison in values["comparisons"]]
    golden = _filled(values["golden"], values["golden"])
    return {**_filled(values, ["own_rms_error"]), "comparisons": comparisons, "golden": golden}


def _filled(values: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {**values, **{name: math.inf for name in names if name in values and values[name] is None}}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


__all__ = ["Comparison", "Evidence", "ParityReport", "batch_sizes", "beyond_budget"]
