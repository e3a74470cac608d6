"""``report.html`` of a bundle: written from what the proofs found, for people; no verdict rests on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import PAGE, WEIGHTS, Artifact, Manifest
from mio_export.exporting.bundle_page import ArtifactProof, bundle_page
from mio_export.files import write_text
from mio_export.parity.gate import GateResult
from mio_export.parity.reference import Reference


@dataclass(frozen=True, kw_only=True, eq=False)
class Proved:
    """An artifact's row, and what its proof found."""

    artifact: Artifact
    outcome: GateResult


def write_page(folder: Path, manifest: Manifest, proved: Sequence[Proved], reference: Reference) -> None:
    """Write the page into a bundle's folder."""
    proofs = [_proof(one) for one in proved]
    speeds: dict[tuple[str, str], float] = {
        (one.artifact.format, one.artifact.precision): one.outcome.images_per_s
        for one in proved
        if one.outcome.images_per_s is not None
    }
    speeds["torch", "fp32"] = reference.images_per_s
    sizes = {name: (folder / name).stat().st_size for name in (WEIGHTS, *(one.artifact.file for one in proved))}
    page = bundle_page(
        manifest,
        proofs,
        pixels=reference.images.pixels,
        reference=reference.embeddings,
        sizes=sizes,
        speeds=speeds,
    )
    write_text(folder / PAGE, page)


def _proof(one: Proved) -> ArtifactProof:
    report = one.outcome.report
    reason = report.unproven or "" if report.verdict == "unproven" else "; ".join(report.problems[:3])
    return ArtifactProof(
        format=report.format,
        precision=report.precision,
        verdict=report.verdict,
        reason=reason,
        report=report.to_dict(),
        embeddings=one.outcome.embeddings,
    )
