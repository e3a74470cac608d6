"""A bundle or a store, in words."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mio_export.bundle import MANIFEST, Artifact, Bundle, EncoderSpec, ProjectorSpec, Training, load_bundle
from mio_export.bundle.provenance import read_provenance
from mio_export.errors import GateError, UsageError
from mio_export.evidence import ParityReport
from mio_export.metrics import HEADLINE_K
from mio_export.preprocess import Preprocess, preprocess_from_dict
from mio_export.schema import validated
from mio_export.store import DUPLICATE, FAILED, STORE, Row, Span, StoreInfo, read_info, read_rows


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``mio inspect`` says."""

    kind: str
    """``bundle``, ``artifact`` or ``store``."""
    lines: tuple[tuple[str, str], ...]
    """A name and what there is to say, in order."""
    values: dict[str, Any]
    """The same for machines."""


def describe(path: str | Path) -> Description:
    """Describe a bundle, a single artifact of one, or an embedding store.

    Raises:
        UsageError: the path is none of these.
        GateError: its description is damaged.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        bundle = load_bundle(path)
        try:
            return _describe_bundle(bundle)
        except (KeyError, TypeError, ValueError, OSError) as error:  # a file that is not there, scores that are none
            reason = f"{type(error).__name__}: {error}"
            raise GateError(f"{path} is damaged: its manifest does not fit what it describes ({reason})") from None
    if path.is_file():
        return _describe_artifact(read_provenance(path))
    info = read_info(path)
    if info is None:
        raise UsageError(f"{path} is neither a bundle (no {MANIFEST}) nor an embedding store (no {STORE})")
    return _describe_store(info, read_rows(path))


def _describe_bundle(bundle: Bundle) -> Description:
    manifest = bundle.manifest
    lines = [
        ("bundle", f"{manifest.name}, schema version {manifest.schema_version}"),
        *_contract(manifest.encoder, manifest.preprocess, manifest.max_batch, manifest.space, manifest.training),
    ]
    if manifest.metrics:
        lines.append(("measured", _measured(manifest.metrics["scores"]["trained"])))
    lines += [("artifact", _artifact(bundle, artifact)) for artifact in manifest.artifacts]
    return Description(kind="bundle", lines=tuple(lines), values=json.loads(manifest.to_json()))


def _describe_artifact(values: dict[str, Any]) -> Description:
    """Describe what an artifact says of itself; it says the same in every format."""
    encoder = validated(values["encoder"], EncoderSpec)
    preprocess = preprocess_from_dict(values["preprocess"])
    training = validated(values["training"], Training) if values["training"] else None
    lines = _contract(encoder, preprocess, values["max_batch"], values["space"], training)
    return Description(kind="artifact", lines=tuple(lines), values=values)


def _contract(
    encoder: EncoderSpec, preprocess: Preprocess, max_batch: int, space: str, training: Training | None
) -> list[tuple[str, str]]:
    size, channels = preprocess.image_size, preprocess.channels
    return [
        ("encoder", f"{encoder.backbone}, {encoder.stem} stem"),
        ("embedding", _embedding(encoder.projector)),
        ("takes", f"uint8 images (N, {size}, {size}, {channels}), N from 1 to {max_batch}"),
        ("gives", f"float32 (N, {encoder.embedding_dim}), {_norm(encoder.normalize)}"),
        ("decoding", _decoding(preprocess)),
        ("graph", f"mean {_numbers(preprocess.mean)} and std {_numbers(preprocess.std)} are applied inside"),
        ("space", space),
        ("trained", _trained(training)),
    ]


def _embedding(projector: ProjectorSpec | None) -> str:
    if projector is None:
        return "the backbone's features"
    part = f"first {projector.keep} of" if projector.keep < projector.output_dim else "all"
    return f"{part} {projector.output_dim} {'ordered ' if projector.ordered else ''}projections"


def _norm(normalized: bool) -> str:
    return "L2-normalised" if normalized else "not normalised"


def _decoding(preprocess: Preprocess) -> str:
    size, filter_name = preprocess.image_size, preprocess.interpolation
    crop = f"shorter side to {preprocess.shorter_side} px ({filter_name}, antialiased), centre {size} px"
    return f"EXIF orientation applied, {crop}, transparency over grey level {preprocess.background}"


def _measured(scores: Mapping[str, Any]) -> str:
    knn = f"kNN (k={HEADLINE_K}) {scores['knn'][str(HEADLINE_K)]:.1%}, " if scores["knn"] else ""
    return f"{knn}copy recall@1 {scores['copy_recall']['1']:.1%}"


def _artifact(bundle: Bundle, artifact: Artifact) -> str:
    """One line, with the worst row if it was proved."""
    report = ParityReport.load(bundle.path / artifact.parity.report)
    worst = min((comparison.min_cosine for comparison in report.comparisons), default=None)
    megabytes = (bundle.path / artifact.file).stat().st_size / 1e6
    kind = f"{artifact.format} {artifact.precision}" + (f" for {artifact.capability}" if artifact.capability else "")
    kind += f" opset {artifact.opset}" if artifact.opset else ""
    proof = f" (min cosine {worst:.7f})" if worst is not None else ""
    return f"{artifact.file}: {kind}, {megabytes:.1f} MB, {artifact.verdict}{proof}"


def _trained(training: Training | None) -> str:
    if training is None:
        return "elsewhere; the weights are from elsewhere"
    recipe = training.recipe
    epochs = f"{training.last['epoch']} of {recipe['epochs']} epochs"
    images = f"{training.data.num_images:,} images"
    return f"{recipe['objective']} on {images}, {epochs}, batch size {recipe['batch_size']}, seed {recipe['seed']}"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _describe_store(info: StoreInfo, rows: list[Row]) -> Description:
    counts = Counter(row.status for row in rows)
    reasons = Counter(row.reason for row in rows if row.status == FAILED)
    num_ok = len(rows) - counts[FAILED]
    lines = [
        ("store", f"{len(rows):,} files: {num_ok:,} embedded, {counts[FAILED]:,} failed"),
        *_duplicates(counts[DUPLICATE]),
        ("vectors", f"float32, {info.embedding_dim} dimensions, {_norm(info.normalized)}"),
        ("made by", f"{info.bundle}: {info.artifact_file} ({info.precision}), {info.runtime} on {info.device}"),
        ("space", info.space),
        ("settings", f"decode {info.decode}, batch size {info.batch_size}, shard size {info.shard_size:,}"),
        *[("versions", _span(span)) for span in info.spans],
        *[("failed", f"{count:,} x {reason}") for reason, count in reasons.most_common(10)],
    ]
    values = {
        "store": asdict(info),
        "counts": dict(counts),
        "failed": [asdict(row) for row in rows if row.status == FAILED],
    }
    return Description(kind="store", lines=tuple(lines), values=values)


def _duplicates(count: int) -> list[tuple[str, str]]:
    return [("duplicates", f"{count:,} have the bytes, and so the vector, of another file")] if count else []


def _span(span: Span) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in span.versions.items()) or "not recorded"
    return f"from shard {span.first_shard:,} on: {versions}"
