"""A live server held to the gate of the bundle that it says it serves, preprocessing included."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mio_export.bundle import Artifact, Bundle, broken_files, load_bundle
from mio_export.errors import GateError
from mio_export.metrics import l2_normalized
from mio_export.parity.golden import golden_files
from mio_export.parity.images import parity_images
from mio_export.parity.prove import prove
from mio_export.parity.reference import Reference
from mio_export.parity.report import ParityReport, relative_errors
from mio_export.serving.client import RemoteEncoder


def verify_server(path: str | Path, url: str, *, images: Path, limit: int = 256) -> ParityReport:
    """Compare what a server answers with the encoder in float64, as artifacts are compared.

    The uint8 model is asked at several batch sizes. The golden images go through the server's own decoding, and must
    give the embeddings of the pixels that the bundle's contract makes of them here.

    Args:
        path: the bundle.
        url: as ``RemoteEncoder`` takes it.
        images: a folder of images.
        limit: number of images to take from it.

    Raises:
        GateError: the bundle was changed, or the server runs an artifact that it does not hold as proved.
        SpaceError: the server serves another embedding space.
        MioError: the server cannot be reached.
    """
    from mio_export.models import load_encoder

    bundle = load_bundle(path)
    broken = broken_files(bundle)
    if broken:
        raise GateError("\n     ".join([f"{bundle.path} is refused", *broken]))
    with RemoteEncoder(url, space=bundle.manifest.space) as server:
        artifact = _served(bundle, server)
        manifest = bundle.manifest
        found, _ = parity_images(manifest.preprocess, images, limit=limit)
        reference = Reference.of(load_encoder(bundle.path), found, weights_sha256=manifest.weights_sha256)
        manifest = replace(manifest, max_batch=min(manifest.max_batch, server.max_batch))
        report = prove(
            bundle.path,
            artifact,
            manifest=manifest,
            reference=reference,
            devices=("server",),
            open=lambda _: RemoteEncoder(url),  # it is closed when it was looked at
        ).report
        return replace(report, problems=(*report.problems, *_decoding_problems(server, reference, report)))


def _served(bundle: Bundle, server: RemoteEncoder) -> Artifact:
    says = server.parameters
    for artifact in bundle.manifest.artifacts:
        if (artifact.sha256, artifact.precision) == (says["sha256"], says["precision"]):
            return artifact
    raise GateError(
        f"{server.url} runs {says['artifact']} ({says['sha256'][:12]}…), an artifact that {bundle.path} does not hold"
    )


def _decoding_problems(server: RemoteEncoder, reference: Reference, report: ParityReport) -> list[str]:
    """Send the golden images as files, and their pixels; both must come to the same."""
    pixels = np.stack(list(reference.golden.values()))
    vectors, errors = server.embed_files([golden_files()[name] for name in reference.golden])
    expected = server.embed(pixels)
    problems = []
    bound = report.budget.max_row_error
    for name, error, a, b in zip(reference.golden, errors, expected, vectors, strict=True):
        if error is not None:
            problems.append(f"preprocessing: golden image {name} is refused: {error.partition(': ')[2]}")
        elif bound is not None and (far := relative_errors(a[None], b[None])[0]) > bound:
            problems.append(f"preprocessing: golden image {name}: relative error {far:.1e} is above {bound:.1e}")
        elif (near := float((l2_normalized(a[None]) * l2_normalized(b[None])).sum())) < report.budget.min_cosine:
            problems.append(
                f"preprocessing: golden image {name}: cosine {near:.6f} is below {report.budget.min_cosine}"
            )
    return problems


__all__ = ["verify_server"]
