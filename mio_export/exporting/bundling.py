"""``export``: every artifact is proved on real images before it enters the bundle."""

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mio_export.bundle import (
    MANIFEST,
    PAGE,
    REPORTS,
    SIGNATURE,
    WEIGHTS,
    Bundle,
    Manifest,
    Training,
    check_requirements,
    load_bundle,
    save_manifest,
    space_fingerprint,
)
from mio_export.bundle.lock import bundle_lock
from mio_export.console.progress import Progress
from mio_export.errors import GateError, MioError, UsageError
from mio_export.exporting.artifacts import Writer
from mio_export.exporting.graphs import Graphs
from mio_export.exporting.page import Proved, write_page
from mio_export.exporting.plan import Order, orders
from mio_export.files import sha256_file, staged_folder
from mio_export.models import Encoder, load_encoder, load_projector_encoder
from mio_export.models.checkpoint import EVALUATION, EVALUATION_SCHEMA_VERSION, load_description, save_weights
from mio_export.parity.gate import devices_for, prove, write_report
from mio_export.parity.golden import GOLDEN, save_golden
from mio_export.parity.images import parity_images
from mio_export.parity.reference import Reference
from mio_export.parity.report import ParityReport
from mio_export.schema import read_values


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
    capabilities: Sequence[str] = (),
    images: Path | None = None,
    limit: int = 256,
    max_batch: int = 64,
    require: Mapping[str, float] | None = None,
    normalize: bool = False,
    head: str = "backbone",
    dim: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export an encoder into a bundle, proving every artifact on real images first.

    A bundle appears whole or not at all; one that lies at ``out`` is replaced only by a bundle that passed. If an
    artifact is refused, everything is kept in ``out`` + ``.rejected`` for inspection, the artifact renamed likewise.
    One that cannot run on this machine enters as ``unproven``, and ``verify`` on the right machine settles it.

    Args:
        source: a training run (its recipe and evaluation come along), or an encoder.
        out: the bundle's folder, ``NAME.mio``.
        formats: ``onnx``, ``torchscript``, ``pt2``, ``openvino``, ``tensorrt``, ``tensorrt-rtx``; the last three bring
            the ONNX graphs that they are made from.
        precisions: ``fp32``, ``fp16``, ``bf16``, ``int8``.
        capabilities: CUDA compute capabilities to build engines for, such as 8.9; none: that of this machine's GPU.
        images: a folder of real images to prove on, and for int8 to calibrate on (others); None takes the embedded
            sample.
        limit: number of images to prove on.
        max_batch: largest batch that the artifacts will be given.
        require: bounds tighter than the budget of each precision, by their names: ``{"recall@10": 0.98}``.
        normalize: divide embeddings by their L2 norm, in the graph.
        head: ``backbone``, or ``projector``: embeddings are the projections of the run's head.
        dim: K, keep the first K projections; for a run that ordered them (MINC with ``loss.ordered=true``). That they
            are the leading eigenfunctions is a statement about ``loss.norm=none``; otherwise measure what they are
            worth.
        cache: folder of calibration results; None: none is kept.
        progress: is told what is being done.

    Raises:
        UsageError: a format, precision, batch or path is not allowed, or there are no images to prove or calibrate on.
        MissingBackendError: what builds a format is not installed.
        GateError: an artifact does not give the encoder's embeddings.
        MioError: the encoder cannot be captured.
    """
    out = Path(out)
    require = dict(require or {})
    check_requirements(require)
    asked = orders(formats, precisions, capabilities)
    if max_batch < 1:
        raise UsageError(f"max_batch must be 1 or more, got {max_batch}")
    if out.exists():
        _check_replaceable(out)
    progress = progress or Progress()
    _check_head(source, head, dim)
    encoder, training, metrics = _opened(source, head, dim, progress)
    encoder.spec = replace(encoder.spec, normalize=normalize or encoder.spec.normalize)
    for_int8 = any(order.precision == "int8" for order in asked)
    chosen, calibration = parity_images(encoder.preprocess, images, limit=limit, for_int8=for_int8)
    with ExitStack() as held, staged_folder(out) as folder:
        weights_sha256 = save_weights(folder / WEIGHTS, encoder)
        progress.line(f"embedding {chosen.description} with the encoder itself, in float64")
        reference = Reference.of(encoder, chosen, weights_sha256=weights_sha256)
        _check_reference(encoder, reference)
        (folder / "parity").mkdir()
        save_golden(folder / GOLDEN, reference.golden, reference.golden_embeddings)
        manifest = _manifest(out, encoder, weights_sha256, max_batch, training, metrics)
        manifest = replace(manifest, requirements=require, files={GOLDEN: sha256_file(folder / GOLDEN)})
        graphs = Graphs(
            encoder, reference, max_batch=max_batch, calibration=calibration, cache=cache, progress=progress
        )
        writer = Writer(folder=folder, encoder=encoder, graphs=graphs, manifest=manifest)
        proofs = [_proved(order, writer, reference, progress) for order in asked]
        reports = tuple(proof.outcome.report for proof in proofs)
        manifest = replace(manifest, artifacts=tuple(proof.artifact for proof in proofs))
        write_page(folder, manifest, proofs, reference)
        refusals = [report for report in reports if report.verdict == "refused"]
        if refusals:
            _keep_rejected(folder, out.with_name(f"{out.name}.rejected"), refusals)
            raise GateError(_refusal_message(refusals, out.with_name(f"{out.name}.rejected")))
        save_manifest(folder, manifest)
        if os.access(out / REPORTS, os.W_OK):
            # a verify that runs now writes its verdicts before the bundle is replaced, or not at all
            held.enter_context(bundle_lock(out))
    shutil.rmtree(out.with_name(f"{out.name}.rejected"), ignore_errors=True)
    return ExportResult(bundle=Bundle(path=out, manifest=manifest), reports=reports)


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
        metrics = read_values(run / EVALUATION, newest=EVALUATION_SCHEMA_VERSION)
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
        raise UsageError("head projector needs a training run; an encoder from elsewhere has no projection head")


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but a bundle, or a bundle in which somebody keeps other things."""
    try:
        held = load_bundle(out).manifest
    except MioError:
        raise UsageError(f"{out} exists and is not a bundle; choose another -o") from None
    files = [name for artifact in held.artifacts for name in (artifact.file, *artifact.companions)]
    ours = {MANIFEST, WEIGHTS, PAGE, REPORTS, SIGNATURE, *files}
    left = tuple(f".{name}.tmp" for name in ours)  # by a process that was killed
    others = sorted(path.name for path in out.iterdir() if path.name not in ours and not path.name.startswith(left))
    if others:
        raise UsageError(f"{out} also holds {', '.join(others[:3])}, which would be lost; choose another -o")


def _check_reference(encoder: Encoder, reference: Reference) -> None:
    expected = (len(reference.images.pixels), encoder.spec.embedding_dim)
    if reference.embeddings.shape != expected:
        raise MioError(
            f"{encoder.spec.backbone} gives embeddings of shape {reference.embeddings.shape}, expected {expected};"
            " it cannot be used as a backbone"
        )
    if reference.problems:
        raise GateError(f"nothing can be proved: {reference.problems[0]}")


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


def _proved(order: Order, writer: Writer, reference: Reference, progress: Progress) -> Proved:
    """Write one artifact, prove the very file that was written, and write the report."""
    progress.line(f"exporting {order.label} and proving it")
    artifact, stages = writer.write(order)
    outcome = prove(
        writer.folder,
        artifact,
        manifest=writer.manifest,
        reference=reference,
        devices=devices_for(artifact.format),
        stages=stages,
    )
    proof = write_report(writer.folder, artifact, outcome.report)
    return Proved(artifact=replace(artifact, parity=proof), outcome=outcome)


def _keep_rejected(folder: Path, rejected: Path, refusals: list[ParityReport]) -> None:
    for name in {report.artifact for report in refusals}:
        (folder / name).rename(folder / f"{name}.rejected")
    shutil.rmtree(rejected, ignore_errors=True)
    shutil.copytree(folder, rejected)


def _refusal_message(refusals: list[ParityReport], rejected: Path) -> str:
    reasons = "; ".join(f"{report.format} {report.precision}: {report.problems[0]}" for report in refusals)
    return f"refused by parity: {reasons}\nkept for inspection in {rejected}"
