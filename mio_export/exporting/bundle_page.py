"""The report of a bundle: one HTML page that shows what each artifact was proved to be, and on which images it errs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mio_export.bundle import WEIGHTS, Manifest
from mio_export.chart import log_histogram, number_label
from mio_export.errors import UsageError
from mio_export.exporting.worst_images import (
    relative_errors,
    shown_rows,
    thumbnail_library,
    worst_figures,
    worst_images,
)
from mio_export.page import figure, html_page, section
from mio_export.preprocess import Pixels

Matrix = npt.NDArray[np.floating[Any]]
_VERDICTS = {"proved": ("up", "✓"), "unproven": ("", "?"), "refused": ("down", "✕")}
_PARITY_MEANING = (
    "Each at its worst batch size, its budget below; ✕ marks what breaks it. Errors are relative: ‖artifact − encoder‖"
    " / ‖encoder‖, as root mean square over all rows and of the worst. Top-1 and recall@10 are the"
    " shares of nearest and of ten nearest neighbours that stay the same."
)
_ERROR_MEANING = (
    "Number of images by relative error, ‖artifact − encoder‖ / ‖encoder‖. The first bin holds smaller errors too."
)
_WORST_MEANING = (
    "The images with the largest errors, each beside its four nearest neighbours: by the encoder in float64 above, by"
    " the artifact below. A dashed rim and “new” mark a neighbour that the encoder does not put among the nearest four."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArtifactProof:
    """What is known of one artifact."""

    format: str
    precision: str
    verdict: Literal["proved", "unproven", "refused"]
    reason: str
    """Why it is refused or unproven; empty if it is proved."""
    report: Mapping[str, Any]
    """What ``ParityReport.to_dict`` gives, or its JSON; may lack fields if it is unproven."""
    embeddings: Matrix | None
    """What it gave for the images, shape (N, D); None if it did not run."""

    @property
    def name(self) -> str:
        """Format and precision."""
        return f"{self.format} {self.precision}"


class _Column(NamedTuple):
    """A measure of the parity table."""

    title: str
    key: str
    worst: Any
    """``min`` or ``max``."""
    budget: str
    """Field of the budget; empty if it has none."""
    form: str


_COLUMNS = (
    _Column("min cosine", "min_cosine", min, "min_cosine", ".7f"),
    _Column("rms error", "rms_relative_error", max, "max_rms_error", ""),
    _Column("worst row", "max_relative_error", max, "max_row_error", ""),
    _Column("top-1", "top1_agreement", min, "top1", ".1%"),
    _Column("recall@10", "recall_at_10_agreement", min, "recall_at_10", ".1%"),
)


def bundle_page(
    manifest: Manifest,
    proofs: Sequence[ArtifactProof],
    *,
    pixels: Pixels,
    reference: Matrix,
    sizes: Mapping[str, int],
    speeds: Mapping[tuple[str, str], float],
) -> str:
    """Return the report of a bundle as HTML that fetches nothing and runs nothing; the same values, the same text.

    Args:
        manifest: the bundle's.
        proofs: what is known of each artifact, refused ones among them.
        pixels: the images that they were compared on, uint8, shape (N, H, W, C), N at least 1.
        reference: the encoder's embeddings of them, float64, shape (N, D).
        sizes: bytes by file name.
        speeds: images/s by format and precision, the encoder itself being ``("torch", "fp32")``; may be empty.

    Raises:
        UsageError: there are not as many images as embeddings, or none.
    """
    if reference.ndim != 2 or not len(reference) or len(pixels) != len(reference):
        raise UsageError(
            f"images and reference embeddings must be equally many, at least 1; got {len(pixels)} and {len(reference)}"
        )
    worst = {
        number: worst_images(reference, proof.embeddings)
        for number, proof in enumerate(proofs)
        if proof.embeddings is not None and proof.embeddings.shape == reference.shape
    }
    shown = shown_rows(image for images in worst.values() for image in images)
    sections = [
        _header(manifest, proofs, len(pixels)),
        _parity(proofs),
        _errors(proofs, reference),
        _worst({proofs[number].name: worst_figures(images) for number, images in worst.items()}),
        _costs(manifest, proofs, sizes, speeds),
        _footer(manifest, proofs),
        thumbnail_library(pixels, shown),
    ]
    return html_page(f"{manifest.name} · bundle report", sections)


def _header(manifest: Manifest, proofs: Sequence[ArtifactProof], num_images: int) -> str:
    height, width, channels = manifest.preprocess.shape
    facts = [
        manifest.encoder.backbone,
        f"{manifest.encoder.embedding_dim:,} dimensions" + (", L2-normalised" if manifest.encoder.normalize else ""),
        f"images of {width} × {height} px, {'grey' if channels == 1 else 'colour'}",
        f"space {manifest.space[:12]}",
    ]
    counts = [(name, sum(proof.verdict == name for proof in proofs)) for name in _VERDICTS]
    tally = ", ".join(f"{count} {name}" for name, count in counts if count) or "no artifacts"
    tally += f", on {num_images:,} images" if proofs else ""
    return (
        f"<header><p>Bundle report</p><h1>{escape(manifest.name)}</h1>"
        f"<p>{escape(' · '.join(facts))}</p><p>{escape(tally).capitalize()}</p></header>"
    )


def _parity(proofs: Sequence[ArtifactProof]) -> str:
    if not proofs:
        return ""
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in ("verdict", *(c.title for c in _COLUMNS)))
    rows = "".join(map(_parity_row, proofs))
    reasons = "".join(
        f"<p><strong>{escape(proof.name)}</strong> is {proof.verdict}: {escape(proof.reason)}</p>"
        for proof in proofs
        if proof.reason
    )
    table = f'<table class="scores"><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return section("Parity", f'<div class="wide">{table}</div><p class="note">{escape(_PARITY_MEANING)}</p>{reasons}')


def _parity_row(proof: ArtifactProof) -> str:
    css, mark = _VERDICTS[proof.verdict]
    cells = "".join(f"<td>{_measure(proof.report, column)}</td>" for column in _COLUMNS)
    verdict = f'<td><span class="{css}">{mark}\u00a0{proof.verdict}</span></td>'
    return f'<tr><th scope="row">{escape(proof.name)}</th>{verdict}{cells}</tr>'


def _measure(report: Mapping[str, Any], column: _Column) -> str:
    """The worst over the batch sizes, with its budget; a dash if nothing was compared."""
    found = [comparison.get(column.key) for comparison in report.get("comparisons") or ()]
    numbers = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    if not numbers or len(numbers) < len(found):
        return "–"
    value = column.worst(numbers)
    bound = (report.get("budget") or {}).get(column.budget)
    if not isinstance(bound, int | float):
        return _number(value, column)
    least = column.worst is min
    broken = value < bound if least else value > bound
    limit = f"≥ {f'{bound:.0%}' if '%' in column.form else f'{bound:.6g}'}" if least else f"≤ {bound:.2g}"
    text = f'<span class="down">✕\u00a0{_number(value, column)}</span>' if broken else _number(value, column)
    return f"{text}<br><small>{limit}</small>"


def _number(value: float, column: _Column) -> str:
    return f"{value:{column.form}}" if column.form else number_label(value)


def _errors(proofs: Sequence[ArtifactProof], reference: Matrix) -> str:
    """A histogram for each artifact that gave embeddings, all over the same decades."""
    errors = {
        number: relative_errors(reference, proof.embeddings)
        for number, proof in enumerate(proofs)
        if proof.embeddings is not None and proof.embeddings.shape == reference.shape
    }
    if not errors:
        return ""
    budgets = {n: (proofs[n].report.get("budget") or {}).get("max_row_error") for n in errors}
    limits = _decades([*np.concatenate(list(errors.values())).tolist(), *filter(None, budgets.values())])
    figures = "".join(
        _histogram(proofs[number].name, values, budgets[number], limits) for number, values in errors.items()
    )
    return section("Errors", f'<p class="note">{escape(_ERROR_MEANING)}</p><div class="grid">{figures}</div>')


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Decimal exponents that hold every value above 0, at most twelve decades below the greatest."""
    exponents = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    high = math.floor(max(exponents)) + 1
    return max(min(math.floor(min(exponents)), high - 2), high - 12), high


def _histogram(name: str, errors: npt.NDArray[np.float64], budget: float | None, limits: tuple[int, int]) -> str:
    finite = errors[np.isfinite(errors)]
    mark = (budget, f"budget {budget:.2g}") if budget else None
    picture = log_histogram(finite.tolist(), title=f"Relative errors of {name}", limits=limits, mark=mark)
    lost = len(errors) - len(finite)
    beyond = int((finite > budget).sum()) if budget else 0
    notes = [f"{beyond:,} of {len(errors):,} lie beyond the budget."] if budget else []
    notes += [f"{lost:,} of {len(errors):,} are NaN or infinite and not drawn."] if lost else []
    return figure(picture, " ".join(notes), title=name)


def _worst(figures: Mapping[str, str]) -> str:
    body = "".join(f"<h3>{escape(name)}</h3>{html}" for name, html in figures.items())
    return section("Worst images", f'<p class="note">{escape(_WORST_MEANING)}</p>{body}') if body else ""


def _costs(
    manifest: Manifest,
    proofs: Sequence[ArtifactProof],
    sizes: Mapping[str, int],
    speeds: Mapping[tuple[str, str], float],
) -> str:
    """File, size and speed of the encoder and each artifact, beside the encoder's."""
    files = {(artifact.format, artifact.precision): artifact.file for artifact in manifest.artifacts}
    kinds = {(proof.format, proof.precision): str(proof.report.get("artifact", "")) for proof in proofs} | files
    rows = [("encoder, PyTorch", WEIGHTS, ("torch", "fp32"))]
    rows += [(" ".join(kind), file, (kind[0], kind[1])) for kind, file in kinds.items()]
    whole, eager = sizes.get(WEIGHTS), speeds.get(("torch", "fp32"))
    heads = ["size", "× encoder", *(["images/s", "× encoder"] if speeds else [])]
    lines = []
    for name, file, kind in rows:
        cells = [_megabytes(sizes.get(file)), _ratio(sizes.get(file), whole)]
        cells += [_rate(speeds.get(kind)), _ratio(speeds.get(kind), eager)] if speeds else []
        values = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}<br><small>{escape(file)}</small></th>{values}</tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    table = f'<table class="scores"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return section("Size and speed" if speeds else "Size", f'<div class="wide">{table}</div>')


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.2f}\u00a0MB"


def _rate(images_per_s: float | None) -> str:
    return "–" if images_per_s is None else f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else "–"


def _footer(manifest: Manifest, proofs: Sequence[ArtifactProof]) -> str:
    """Everything that the verdicts rest on."""
    pairs = {"space": manifest.space, "weights": manifest.weights_sha256}
    versions: dict[str, str] = {}
    for proof in proofs:
        evidence = proof.report.get("evidence") or {}
        pairs |= {key: str(evidence[name]) for key, name in _EVIDENCE.items() if name in evidence}
        pairs |= {proof.name: str(evidence["artifact_sha256"])} if "artifact_sha256" in evidence else {}
        versions |= {str(name): str(text) for name, text in (proof.report.get("versions") or {}).items()}
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in pairs.items())
    made = " · ".join(f"{name} {text}" for name, text in ({"mio-export": version("mio-export")} | versions).items())
    details = f"<details><summary>Hashes (sha256) and images</summary><table>{rows}</table></details>"
    return f"<footer>{details}<p>{escape(made)}</p></footer>"


_EVIDENCE = {"images": "images", "pixels": "images_sha256"}
"""What the footer calls what a report rests on."""


__all__ = ["ArtifactProof", "bundle_page"]
