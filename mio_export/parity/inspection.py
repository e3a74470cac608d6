"""What a bundle's own evidence says of it, read without running anything: the cheap half of ``verify``."""

import json
from collections import Counter
from collections.abc import Iterator

from mio_export.bundle import MANIFEST, REPORTS, Bundle, unnamed_files
from mio_export.bundle.onnx_file import read_onnx
from mio_export.bundle.provenance import read_provenance
from mio_export.errors import MioError
from mio_export.evidence import ParityReport, artifact_problems
from mio_export.evidence.check import GOLDEN_NAMES
from mio_export.parity.golden import GOLDEN, decoding_problems, golden_pixels, golden_sha256, load_golden

_SAID = ("encoder", "preprocess", "weights_sha256", "space", "max_batch", "training")
"""What every artifact says of itself and the manifest says too."""


def evidence_problems(bundle: Bundle) -> list[str]:
    """Compare reports, golden images and what artifacts say of themselves with the manifest.

    Whoever writes a bundle can write evidence that fits; what this shows is that the parts of this one belong together.

    Args:
        bundle: its hashes hold; see ``broken_files``.

    Returns:
        A line for each thing that differs; empty if all of it fits.
    """
    problems = [*_contents(bundle), *_shared_reports(bundle), *_golden(bundle)]
    for artifact in bundle.manifest.artifacts:
        problems += artifact_problems(bundle, artifact)
    return [*problems, *_provenance(bundle), *_graphs(bundle)]


def _contents(bundle: Bundle) -> Iterator[str]:
    """There is something to run, and nothing that no verdict is about."""
    if not bundle.manifest.artifacts:
        yield f"{MANIFEST}: lists no artifact; export it again"
    for name in unnamed_files(bundle.path, bundle.manifest):
        yield f"{name}: the manifest does not name it; keep other files beside the bundle"


def _shared_reports(bundle: Bundle) -> Iterator[str]:
    """Each report is of one artifact, and is nothing else besides."""
    artifacts = bundle.manifest.artifacts
    reports = [evidence.report for artifact in artifacts for evidence in artifact.parity.evidence]
    for name, count in Counter(reports).items():
        if count > 1:
            yield f"{name}: is the report of {count} proofs; each has one of its own"
        if not (name.startswith(f"{REPORTS}/") and name.endswith(".json")):
            yield f"{name}: no parity report lies there; they are {REPORTS}/*.json"
    rows = Counter((a.file, a.format, a.precision, a.capability) for a in artifacts)
    yield from (f"{MANIFEST}: lists {row[0]} twice as {row[1]} {row[2]}" for row, count in rows.items() if count > 1)


def _golden(bundle: Bundle) -> Iterator[str]:
    """The golden images' pixels are those of the contract, as this machine decodes it, and of the reports."""
    if GOLDEN not in bundle.manifest.files:
        yield f"{MANIFEST}: does not name {GOLDEN}, which shows how images are decoded"
        return
    try:
        pixels, embeddings = load_golden(bundle.path / GOLDEN)
    except MioError as error:
        yield str(error).replace(f"{bundle.path}/", "")
        return
    manifest = bundle.manifest
    if set(pixels) != set(GOLDEN_NAMES) or embeddings.shape != (len(pixels), manifest.encoder.embedding_dim):
        yield f"{GOLDEN}: does not hold the golden images and their {manifest.encoder.embedding_dim} dimensions"
        return
    if wrong := {found.shape for found in pixels.values()} - {manifest.preprocess.shape}:
        yield f"{GOLDEN}: holds images of shape {wrong.pop()}, the contract gives {manifest.preprocess.shape}"
        return
    yield from decoding_problems(pixels, golden_pixels(manifest.preprocess))
    sha256 = golden_sha256(pixels)
    for artifact in manifest.artifacts:
        for evidence in artifact.parity.evidence:
            try:
                found = ParityReport.load(bundle.path / evidence.report).evidence.golden_sha256
            except MioError:
                continue  # named where the artifact is looked at
            if found != sha256:
                yield f"{evidence.report}: is of other golden images ({found[:12]}…) than {GOLDEN} ({sha256[:12]}…)"


def _provenance(bundle: Bundle) -> Iterator[str]:
    """Every artifact says itself which encoder it is, with which mean and standard deviation and for which batches."""
    manifest = json.loads(bundle.manifest.common_json())
    for name in dict.fromkeys(artifact.file for artifact in bundle.manifest.artifacts):
        try:
            said = read_provenance(bundle.path / name)
        except MioError as error:
            yield str(error).replace(f"{bundle.path}/", "")
            continue
        differing = [key for key in _SAID if said.get(key) != manifest[key]]
        if differing:
            yield f"{name}: says of itself another {', '.join(differing)} than the manifest"


def _graphs(bundle: Bundle) -> Iterator[str]:
    """Weights beside an ONNX file are among what is hashed, and nothing is named beside it that it does not read."""
    for artifact in bundle.manifest.artifacts:
        if artifact.format not in ("onnx", "openvino"):
            continue
        try:
            external = read_onnx(bundle.path / artifact.file).external
        except MioError:
            continue  # named where it is asked what it says of itself
        if external != set(artifact.companions):
            found, named = (", ".join(sorted(names)) or "none" for names in (external, artifact.companions))
            yield f"{artifact.file}: reads {found} beside it, the manifest says {named}"


__all__ = ["evidence_problems"]
