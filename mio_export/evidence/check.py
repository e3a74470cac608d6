"""Whether the parity reports of an artifact fit the manifest beside them: milliseconds, no library that computes."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from mio_export.bundle import Artifact, Bundle, Manifest, Precision, runtime_of
from mio_export.errors import MioError
from mio_export.evidence.budget import Budget, budget_for
from mio_export.evidence.report import Comparison, ParityReport, batch_sizes, beyond_budget
from mio_export.files import sha256_file

DEVICES = ("cpu", "cuda", "tensorrt")
"""Where an artifact can be proved."""
GOLDEN_NAMES = (
    "colour",
    "grey",
    "transparent",
    "CMYK",
    "EXIF-rotated",
    "EXIF-mirrored",
    "16-bit",
    "palette",
    "wide",
    "tall",
)
"""Names of the golden images."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def artifact_problems(bundle: Bundle, artifact: Artifact) -> list[str]:
    """Compare every report of an artifact with its row in the manifest; return a line for each thing that differs.

    A proved row needs a proved report for each device that it names. Numbers are held to the budget again, and the
    budget to the law of its precision.
    """
    name = f"{artifact.file} ({artifact.format} {artifact.precision})"
    problems: list[str] = []
    devices: list[str] = []
    for evidence in artifact.parity.evidence:
        try:
            report = _read(bundle.path, evidence.report, evidence.report_sha256)
        except MioError as error:
            problems.append(str(error).replace(f"{bundle.path}/", ""))
            continue
        devices += report.devices
        found = [*_verdict_problems(report, artifact), *report_problems(report, artifact, bundle.manifest)]
        problems += [f"{name}: {evidence.report} {problem}" for problem in found]
    nowhere = artifact.parity.verdict == "proved" and not artifact.parity.devices
    if not problems and (nowhere or not set(artifact.parity.devices) <= set(devices)):
        claimed = ", ".join(artifact.parity.devices) or "no device"
        problems.append(
            f"{name}: the manifest says that it ran on {claimed}; its reports are of {', '.join(devices) or 'none'}"
        )
    return problems


def report_problems(report: ParityReport, artifact: Artifact, manifest: Manifest) -> list[str]:
    """Compare a report with the artifact and the bundle that it should be of; return a line for each difference."""
    evidence = report.evidence
    pairs = (
        ("artifact", report.artifact, artifact.file),
        ("format", report.format, artifact.format),
        ("precision", report.precision, artifact.precision),
        ("runtime", report.runtime, runtime_of(artifact.format)),
        ("options", dict(report.options), dict(artifact.options)),
        ("requirements", dict(report.requirements), dict(manifest.requirements)),
        ("sha256 of the artifact", evidence.artifact_sha256, artifact.sha256),
        ("sha256 of the files beside it", dict(evidence.companions), dict(artifact.companions)),
        ("sha256 of the weights", evidence.weights_sha256, manifest.weights_sha256),
    )
    problems = [
        f"is of another bundle or artifact: {what} {_short(found)}, the manifest says {_short(expected)}"
        for what, found, expected in pairs
        if found != expected
    ]
    if report.verdict == "proved" and not problems:
        problems += [*_budget_problems(report, manifest), *_run_problems(report, manifest)]
    return problems


def _read(folder: Path, name: str, sha256: str) -> ParityReport:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MioError(f"{name}: lies outside the bundle")
    if not path.is_file():
        raise MioError(f"{name}: missing")
    if (found := sha256_file(path)) != sha256:
        raise MioError(f"{name}: sha256 is {found[:12]}…, the manifest says {sha256[:12]}…")
    return ParityReport.load(path)


def _verdict_problems(report: ParityReport, artifact: Artifact) -> Iterator[str]:
    """A manifest may claim less than a report proves, never more."""
    claimed = artifact.parity.verdict
    if report.verdict != claimed and not (claimed == "unproven" and report.verdict == "proved"):
        why = f" ({report.problems[0]})" if report.problems else ""
        yield f"says {report.verdict}{why}, the manifest says {artifact.parity.verdict}"


def _budget_problems(report: ParityReport, manifest: Manifest) -> Iterator[str]:
    """Hold the budget to the law of its precision."""
    expected = budget_for(
        cast(Precision, report.precision),  # that of the artifact, which was compared
        own_rms_error=report.own_rms_error,
        own_row_error=report.own_row_error or 0.0,
        required=manifest.requirements,
    )
    found, allowed = asdict(report.budget), asdict(expected)
    if report.own_row_error is None:  # an older report: its worst row lies between the mean and the mean x sqrt(rows)
        row, allowed["max_row_error"] = found["max_row_error"], found["max_row_error"]
        largest = _largest_row_budget(report, manifest)
        if (row is None) != (largest is None) or (row is not None and largest is not None and not 0 < row <= largest):
            yield f"was held to another budget than its precision has: max_row_error {row}, at most {largest}"
    for name, value in allowed.items():
        if found[name] != value:
            yield f"was held to another budget than its precision has: {name} {found[name]}, not {value}"


def _largest_row_budget(report: ParityReport, manifest: Manifest) -> float | None:
    rows = max(comparison.num_rows for comparison in report.comparisons) + len(GOLDEN_NAMES)
    return budget_for(
        cast(Precision, report.precision),  # that of the artifact, which was compared
        own_rms_error=report.own_rms_error,
        own_row_error=report.own_rms_error * math.sqrt(rows) * (1 + 1e-9),
        required=manifest.requirements,
    ).max_row_error


def _run_problems(report: ParityReport, manifest: Manifest) -> Iterator[str]:
    """Look at what was run: every batch size on every device, the golden images, shapes beyond the contract."""
    if not report.devices or not set(report.devices) <= set(DEVICES) or len(set(report.devices)) < len(report.devices):
        yield f"names the devices {', '.join(report.devices) or 'none'}; allowed: {', '.join(DEVICES)}"
    expected = batch_sizes(manifest.max_batch)
    for device in report.devices:
        found = tuple(c.batch_size for c in report.comparisons if c.device == device)
        if found != expected:
            batches = f"{', '.join(map(str, found)) or 'no batch'}; max_batch {manifest.max_batch} of the manifest"
            yield f"compared on {device} at {batches} needs {', '.join(map(str, expected))}"
    for comparison in report.comparisons:
        where = f"batch {comparison.batch_size} on {comparison.device}"
        if comparison.device not in report.devices:
            yield f"{where}: not one of its devices"
        yield from (f"{where}: {problem}" for problem in _comparison_problems(comparison, report.budget))
    yield from _golden_problems(report)
    height, _, channels = manifest.preprocess.shape
    for name in (f"height {height + 8}", f"{channels + 1} channels"):
        if report.shapes.get(name) != "rejected":
            yield f"does not say that images of {name} are rejected"
    if not _SHA256.fullmatch(report.evidence.images_sha256):
        yield f"names no images: images_sha256 is {report.evidence.images_sha256!r}"


def _comparison_problems(comparison: Comparison, budget: Budget) -> Iterator[str]:
    if comparison.num_rows < 1:
        yield "nothing was compared"
        return
    yield from (*comparison.problems, *beyond_budget(asdict(comparison), budget))
    low, high = comparison.rms_relative_error, comparison.max_relative_error * (1 + 1e-9)
    cosines = (comparison.min_cosine, comparison.p1_cosine, comparison.mean_cosine)
    shares = (comparison.top1_agreement, comparison.recall_at_10_agreement)
    errors = (comparison.mean_abs_error, comparison.max_abs_error, comparison.max_norm_drift, low)
    possible = min(errors) >= 0 and low <= high and cosines[0] <= min(cosines) and max(cosines) <= 1 + 1e-9
    if not possible or not all(0 <= share <= 1 for share in shares):
        yield "holds numbers that no comparison gives"


def _golden_problems(report: ParityReport) -> Iterator[str]:
    if set(report.golden) != set(GOLDEN_NAMES):
        yield f"is of the golden images {', '.join(sorted(report.golden)) or 'none'}, not of all {len(GOLDEN_NAMES)}"
    bound = report.budget.max_row_error
    for name, error in report.golden.items():
        if not 0 <= error < math.inf or (bound is not None and error > bound):
            yield f"golden image {name}: relative error {error:.1e}" + (f" is above {bound:.1e}" if bound else "")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if _SHA256.fullmatch(text) else text[:80] or "none"


__all__ = ["DEVICES", "GOLDEN_NAMES", "artifact_problems", "report_problems"]
