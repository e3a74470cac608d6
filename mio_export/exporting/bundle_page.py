"""The report of a bundle: one HTML page that shows what each artifact was proved to be, and on which images it errs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mio_export.bundle import WEIGHTS, Manifest
from mio_export.errors import UsageError
from mio_export.exporting.worst_images import WorstImage, relative_errors, shown_rows, worst_images
from mio_export.pages import Cell, Figure, Row, log_histogram, number_label, render, thumbnail
from mio_export.preprocess import Pixels

Matrix = npt.NDArray[np.floating[Any]]
_VERDICTS = {"proved": ("up", "✓"), "unproven": ("", "?"), "refused": ("down", "✕")}
_SIDE = 64


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
        proof.name: worst_images(reference, proof.embeddings)
        for proof in proofs
        if proof.embeddings is not None and proof.embeddings.shape == reference.shape
    }
    shown = shown_rows(image for images in worst.values() for image in images)
    return render(
        "bundle.html",
        title=f"{manifest.name} · bundle report",
        name=manifest.name,
        facts=_facts(manifest),
        tally=_tally(proofs, len(pixels)),
        proofs=proofs,
        parity_heads=["verdict", *(column.title for column in _COLUMNS)],
        parity=[_parity_row(proof) for proof in proofs],
        errors=_errors(proofs, reference),
        worst=worst,
        caption=_caption,
        speeds=speeds,
        cost_heads=["size", "× encoder", *(["images/s", "× encoder"] if speeds else [])],
        costs=_costs(manifest, proofs, sizes, speeds),
        hashes=_hashes(manifest, proofs),
        made=_made(proofs),
        thumbnails={row: thumbnail(pixels[row], _SIDE) for row in sorted(shown)},
    )


def _facts(manifest: Manifest) -> list[str]:
    height, width, channels = manifest.preprocess.shape
    return [
        manifest.encoder.backbone,
        f"{manifest.encoder.embedding_dim:,} dimensions" + (", L2-normalised" if manifest.encoder.normalize else ""),
        f"images of {width} × {height} px, {'grey' if channels == 1 else 'colour'}",
        f"space {manifest.space[:12]}",
    ]


def _tally(proofs: Sequence[ArtifactProof], num_images: int) -> str:
    counts = [(name, sum(proof.verdict == name for proof in proofs)) for name in _VERDICTS]
    tally = ", ".join(f"{count} {name}" for name, count in counts if count) or "No artifacts"
    return f"{tally}, on {num_images:,} images" if proofs else tally


def _parity_row(proof: ArtifactProof) -> Row:
    css, mark = _VERDICTS[proof.verdict]
    verdict = Cell(f"{mark}\u00a0{proof.verdict}", css)
    return Row(proof.name, [verdict, *(_measure(proof.report, column) for column in _COLUMNS)])


def _measure(report: Mapping[str, Any], column: _Column) -> Cell:
    """The worst over the batch sizes, with its budget; a dash if nothing was compared."""
    found = [comparison.get(column.key) for comparison in report.get("comparisons") or ()]
    numbers = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    if not numbers or len(numbers) < len(found):
        return Cell("–")
    value = column.worst(numbers)
    bound = (report.get("budget") or {}).get(column.budget)
    if not isinstance(bound, int | float):
        return Cell(_number(value, column))
    least = column.worst is min
    broken = value < bound if least else value > bound
    limit = f"≥ {f'{bound:.0%}' if '%' in column.form else f'{bound:.6g}'}" if least else f"≤ {bound:.2g}"
    if broken:
        return Cell(f"✕\u00a0{_number(value, column)}", "down", limit)
    return Cell(_number(value, column), note=limit)


def _number(value: float, column: _Column) -> str:
    return f"{value:{column.form}}" if column.form else number_label(value)


def _errors(proofs: Sequence[ArtifactProof], reference: Matrix) -> list[Figure]:
    """A histogram for each artifact that gave embeddings, all over the same decades."""
    errors = {
        number: relative_errors(reference, proof.embeddings)
        for number, proof in enumerate(proofs)
        if proof.embeddings is not None and proof.embeddings.shape == reference.shape
    }
    if not errors:
        return []
    budgets = {n: (proofs[n].report.get("budget") or {}).get("max_row_error") for n in errors}
    limits = _decades([*np.concatenate(list(errors.values())).tolist(), *filter(None, budgets.values())])
    return [_histogram(proofs[number].name, values, budgets[number], limits) for number, values in errors.items()]


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Decimal exponents that hold every value above 0, at most twelve decades below the greatest."""
    exponents = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    high = math.floor(max(exponents)) + 1
    return max(min(math.floor(min(exponents)), high - 2), high - 12), high


def _histogram(name: str, errors: npt.NDArray[np.float64], budget: float | None, limits: tuple[int, int]) -> Figure:
    finite = errors[np.isfinite(errors)]
    mark = (budget, f"budget {budget:.2g}") if budget else None
    picture = log_histogram(finite.tolist(), title=f"Relative errors of {name}", limits=limits, mark=mark)
    lost = len(errors) - len(finite)
    beyond = int((finite > budget).sum()) if budget else 0
    notes = [f"{beyond:,} of {len(errors):,} lie beyond the budget."] if budget else []
    notes += [f"{lost:,} of {len(errors):,} are NaN or infinite and not drawn."] if lost else []
    return Figure(picture=picture, meaning=" ".join(notes), title=name)


def _caption(image: WorstImage) -> str:
    error = number_label(image.relative_error) if math.isfinite(image.relative_error) else "not finite"
    changed = f"{len(image.changed)} of {len(image.after)} neighbours new" if image.changed else "neighbours kept"
    return f"image {image.row}, relative error {error}, {changed if image.after else 'no neighbours'}"


def _costs(
    manifest: Manifest,
    proofs: Sequence[ArtifactProof],
    sizes: Mapping[str, int],
    speeds: Mapping[tuple[str, str], float],
) -> list[Row]:
    """File, size and speed of the encoder and each artifact, beside the encoder's."""
    files = {(artifact.format, artifact.precision): artifact.file for artifact in manifest.artifacts}
    kinds = {(proof.format, proof.precision): str(proof.report.get("artifact", "")) for proof in proofs} | files
    rows = [("encoder, PyTorch", WEIGHTS, ("torch", "fp32"))]
    rows += [(" ".join(kind), file, (kind[0], kind[1])) for kind, file in kinds.items()]
    whole, eager = sizes.get(WEIGHTS), speeds.get(("torch", "fp32"))
    lines = []
    for name, file, kind in rows:
        cells = [_megabytes(sizes.get(file)), _ratio(sizes.get(file), whole)]
        cells += [_rate(speeds.get(kind)), _ratio(speeds.get(kind), eager)] if speeds else []
        lines.append(Row(name, [Cell(cell) for cell in cells], note=file))
    return lines


def _megabytes(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 1e6:,.2f}\u00a0MB"


def _rate(images_per_s: float | None) -> str:
    return "–" if images_per_s is None else f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _ratio(value: float | None, whole: float | None) -> str:
    return f"{value / whole:.2f}" if value is not None and whole else "–"


def _hashes(manifest: Manifest, proofs: Sequence[ArtifactProof]) -> list[tuple[str, str]]:
    """Everything that the verdicts rest on."""
    pairs = {"space": manifest.space, "weights": manifest.weights_sha256}
    for proof in proofs:
        evidence = proof.report.get("evidence") or {}
        pairs |= {key: str(evidence[name]) for key, name in _EVIDENCE.items() if name in evidence}
        pairs |= {proof.name: str(evidence["artifact_sha256"])} if "artifact_sha256" in evidence else {}
    return list(pairs.items())


def _made(proofs: Sequence[ArtifactProof]) -> list[str]:
    versions = {"mio-export": version("mio-export")}
    for proof in proofs:
        versions |= {str(name): str(text) for name, text in (proof.report.get("versions") or {}).items()}
    return [f"{name} {text}" for name, text in versions.items()]


_EVIDENCE = {"images": "images", "pixels": "images_sha256"}
"""What the footer calls what a report rests on."""


__all__ = ["ArtifactProof", "bundle_page"]
