"""``export``: every artifact is proved on real images before it enters the bundle."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from mio_export.bundle import (
    MANIFEST,
    WEIGHTS,
    Artifact,
    Bundle,
    Format,
    Manifest,
    Precision,
    Proof,
    Training,
    load_bundle,
    save_manifest,
    space_fingerprint,
)
from mio_export.errors import GateError, MioError, UsageError
from mio_export.exporting.onnx import OPSET, onnx_from_encoder
from mio_export.exporting.torchscript import torchscript_from_encoder
from mio_export.files import sha256_file, staged_folder, write_text
from mio_export.models import Encoder, load_encoder, load_projector_encoder
from mio_export.models.checkpoint import EVALUATION, load_description, save_weights
from mio_export.parity.images import parity_images
from mio_export.parity.prove import Reference, prove
from mio_export.parity.report import ParityReport
from mio_export.progress import Progress


class Writer(Protocol):
    """Writes one format and returns the versions of the libraries that did it."""

    def __call__(self, encoder: Encoder, path: Path, *, max_batch: int, provenance: str) -> dict[str, str]:
        """Write ``path``."""


WRITERS: dict[Format, tuple[str, Writer]] = {
    "onnx": ("encoder.onnx", onnx_from_encoder),
    "torchscript": ("encoder.torchscript", torchscript_from_encoder),
}
"""File name and writer of each format."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A bundle that was written, and the proof of each of its artifacts."""

    bundle: Bundle
    reports: tuple[ParityReport, ...]


def export(
    source: Encoder | str | Path,
    out: str | Path,
    *,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    images: Path | None = None,
    limit: int = 256,
    max_batch: int = 64,
    normalize: bool = False,
    head: str = "backbone",
    dim: int | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export an encoder into a bundle, proving every artifact on real images first.

    A bundle appears whole or not at all; one that lies at ``out`` is replaced only by a bundle that passed. If an
    artifact is refused, everything is kept in ``out`` + ``.rejected`` for inspection, the artifact renamed likewise.

    Args:
        source: a training run (its recipe and evaluation come along), or an encoder.
        out: the bundle's folder, ``NAME.mio``.
        formats: ``onnx``, ``torchscript``.
        precisions: ``fp32``.
        images: a folder of real images to prove on; None takes the embedded sample (and, in colour, two photographs).
        limit: number of images to take from the folder.
        max_batch: largest batch that the artifacts will be given.
        normalize: divide embeddings by their L2 norm, in the graph.
        head: ``backbone``, or ``projector``: embeddings are the projections of the run's head.
        dim: K, keep the first K projections; for a run that ordered them (MINC with ``loss.ordered=true``). That they
            are the leading eigenfunctions is a statement about ``loss.norm=none``; otherwise measure what they are
            worth.
        progress: is told what is being done.

    Raises:
        UsageError: a format, precision, batch or path is not allowed, or there is no image to prove on.
        GateError: an artifact does not give the encoder's embeddings.
        MioError: the encoder cannot be captured.
    """
    out = Path(out)
    _check(out, formats, precisions, max_batch)
    progress = progress or Progress()
    _check_head(source, head, dim)
    encoder, training, metrics = _opened(source, head, dim, progress)
    encoder.spec = replace(encoder.spec, normalize=normalize or encoder.spec.normalize)
    rejected = out.with_name(f"{out.name}.rejected")
    chosen = parity_images(encoder.preprocess, images, limit=limit)
    with staged_folder(out) as folder:
        weights_sha256 = save_weights(folder / WEIGHTS, encoder)
        progress.line(f"embedding {chosen.description} with the encoder itself")
        reference = Reference.of(encoder, chosen, weights_sha256=weights_sha256)
        _check_shape(encoder, reference)
        manifest = _manifest(out, encoder, weights_sha256, max_batch, training, metrics)
        reports = []
        for kind in dict.fromkeys(cast(Sequence[Format], formats)):
            progress.line(f"exporting {kind} and proving it")
            artifact, report = _export_one(encoder, folder, kind, "fp32", manifest, reference)
            manifest = replace(manifest, artifacts=(*manifest.artifacts, artifact))
            reports.append(report)
        refusals = [report for report in reports if not report.passed]
        if refusals:
            _keep_rejected(folder, rejected, refusals)
            raise GateError(_refusal_message(refusals, rejected))
        save_manifest(folder, manifest)
    shutil.rmtree(rejected, ignore_errors=True)
    return ExportResult(bundle=Bundle(path=out, manifest=manifest), reports=tuple(reports))


def _opened(
    source: Encoder | str | Path, head: str, dim: int | None, progress: Progress
) -> tuple[Encoder, Training | None, Mapping[str, Any] | None]:
    """Return an encoder of its own in eval mode on the CPU, and what its run says of training and evaluation."""
    if isinstance(source, Encoder):
        return copy.deepcopy(source).cpu().eval(), None, None
    run = Path(source)
    if (run / MANIFEST).is_file():
        raise UsageError(f"{run} is a bundle already; export the training run or the weights that it came from")
    if head == "projector":
        encoder = load_projector_encoder(run, dim=dim)
        if (run / EVALUATION).is_file():
            progress.line(f"{run / EVALUATION} is of the backbone's features, not of projections, and is left out")
        return encoder, load_description(run).training, None
    encoder, description = load_encoder(run), load_description(run)
    metrics = None
    if (run / EVALUATION).is_file():
        metrics = json.loads((run / EVALUATION).read_text())
        if metrics["weights_sha256"] != description.weights_sha256:
            progress.line(f"{run / EVALUATION} is of other weights and is left out; evaluate the run again")
            metrics = None
    return encoder, description.training, metrics


def _check_head(source: Encoder | str | Path, head: str, dim: int | None) -> None:
    if head not in ("backbone", "projector"):
        raise UsageError(f"head must be backbone or projector, got {head!r}")
    if head == "backbone" and dim is not None:
        raise UsageError(f"dim {dim} is of the projections; give it together with head projector, or leave it out")
    if head == "projector" and isinstance(source, Encoder):
        raise UsageError("head projector is that of a training run; an encoder that was brought along has none")


def _check(out: Path, formats: Sequence[str], precisions: Sequence[str], max_batch: int) -> None:
    for kind, values, allowed in (
        ("format", formats, get_args(Format)),
        ("precision", precisions, get_args(Precision)),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown or not values:
            raise UsageError(f"{kind} must be one of {', '.join(allowed)}; got {', '.join(unknown) or 'none'}")
    if max_batch < 1:
        raise UsageError(f"max_batch must be 1 or more, got {max_batch}")
    if out.exists():
        _check_replaceable(out)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but a bundle, or a bundle in which somebody keeps other things."""
    try:
        held = load_bundle(out).manifest
    except MioError:
        raise UsageError(f"{out} exists and is not a bundle; choose another -o") from None
    ours = {MANIFEST, WEIGHTS, "parity", *(artifact.file for artifact in held.artifacts)}
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise UsageError(f"{out} also holds {', '.join(others[:3])}, which would be lost; choose another -o")


def _check_shape(encoder: Encoder, reference: Reference) -> None:
    expected = (len(reference.images.pixels), encoder.spec.embedding_dim)
    if reference.embeddings.shape != expected:
        raise MioError(
            f"{encoder.spec.backbone} gives embeddings of shape {reference.embeddings.shape}, expected {expected};"
            " it cannot be used as a backbone"
        )


def _manifest(
    out: Path,
    encoder: Encoder,
    weights_sha256: str,
    max_batch: int,
    training: Training | None,
    metrics: Mapping[str, Any] | None,
) -> Manifest:
    space = space_fingerprint(weights_sha256=weights_sha256, encoder=encoder.spec, preprocess=encoder.preprocess)
    return Manifest(
        name=out.name.removesuffix(".mio"),
        encoder=encoder.spec,
        preprocess=encoder.preprocess,
        weights_sha256=weights_sha256,
        space=space,
        max_batch=max_batch,
        training=training,
        metrics=metrics,
    )


def _export_one(
    encoder: Encoder, folder: Path, format: Format, precision: Precision, manifest: Manifest, reference: Reference
) -> tuple[Artifact, ParityReport]:
    """Write one artifact, prove the very file that was written, and write the report."""
    name, writer = WRITERS[format]
    path = folder / name
    tools = writer(encoder, path, max_batch=manifest.max_batch, provenance=_provenance(manifest))
    report = prove(path, format=format, precision=precision, reference=reference, max_batch=manifest.max_batch)
    report_name = f"parity/{format}-{precision}.json"
    (folder / "parity").mkdir(exist_ok=True)
    write_text(folder / report_name, json.dumps(report.to_dict(), indent=2) + "\n")
    proof = Proof(verdict="proved", report=report_name, report_sha256=sha256_file(folder / report_name))
    artifact = Artifact(
        file=name,
        format=format,
        precision=precision,
        sha256=report.evidence["artifact_sha256"],
        parity=proof,
        opset=OPSET if format == "onnx" else None,
        tools={"mio-export": version("mio-export"), **tools},
    )
    return artifact, report


def _provenance(manifest: Manifest) -> str:
    """What every artifact says of itself: JSON text."""
    values = {
        "schema_version": manifest.schema_version,
        "space": manifest.space,
        "embedding_dim": manifest.encoder.embedding_dim,
        "max_batch": manifest.max_batch,
        "preprocess": manifest.preprocess.to_dict(),
    }
    return json.dumps(values, sort_keys=True)


def _keep_rejected(folder: Path, rejected: Path, refusals: list[ParityReport]) -> None:
    for report in refusals:
        (folder / report.artifact).rename(folder / f"{report.artifact}.rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    shutil.copytree(folder, rejected)


def _refusal_message(refusals: list[ParityReport], rejected: Path) -> str:
    reasons = "; ".join(f"{report.format} {report.precision}: {report.problems[0]}" for report in refusals)
    return f"refused by parity: {reasons}\nkept for inspection in {rejected}"
