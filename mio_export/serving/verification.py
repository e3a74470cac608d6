"""A live server held to the gate of the bundle that it says it serves, preprocessing included."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from mio_export.bundle import Artifact, Bundle, broken_files, load_bundle
from mio_export.decoding import Decoder
from mio_export.embedding.versions import difference, versions_here
from mio_export.errors import GateError
from mio_export.metrics import l2_normalized
from mio_export.parity.gate import prove
from mio_export.parity.golden import golden_files
from mio_export.parity.images import parity_images
from mio_export.parity.reference import Reference
from mio_export.parity.report import ParityReport, relative_errors
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.serving.client import RemoteEncoder
from mio_export.sources import SourceFile, evenly_spaced, list_images

_GROUP = 16
"""Images that are read and sent together."""


def verify_server(
    path: str | Path,
    url: str,
    *,
    images: Path,
    limit: int = 256,
    api_key: str | None = None,
    ca: str | Path | None = None,
) -> ParityReport:
    """Compare what a server answers with the encoder in float64, as artifacts are compared.

    The model that takes pixels is asked at several batch sizes. The golden images and the given ones go through the
    server's own decoding too, and must give the embeddings of what the bundle's contract makes of them here.

    Args:
        path: the bundle.
        url: as ``RemoteEncoder`` takes it; so are ``api_key`` and ``ca``.
        images: a folder of images.
        limit: number of images to take from it.
        api_key: what the server asks for.
        ca: whom to trust.

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
    with RemoteEncoder(url, space=bundle.manifest.space, api_key=api_key, ca=ca) as server:
        artifact = _served(bundle, server)
        manifest = bundle.manifest
        found, _ = parity_images(manifest.preprocess, images, limit=limit)
        reference = Reference.of(load_encoder(bundle.path), found, weights_sha256=manifest.weights_sha256)
        report = prove(
            bundle.path,
            artifact,
            manifest=replace(manifest, max_batch=min(manifest.max_batch, server.max_batch)),
            reference=reference,
            devices=("server",),
            open=lambda _: RemoteEncoder(url, api_key=api_key, ca=ca),  # it is closed when it was looked at
        ).report
        scaled = server.parameters["decode"] == "scaled"
        items = _readable(manifest.preprocess, images, limit, scaled=scaled)
        problems = [*report.problems, *_decoding_problems(server, report, items)]
        if problems and (differs := _other_versions(server.parameters)):
            problems.append(f"the server runs other versions: {differs}")
        return replace(report, problems=tuple(problems))


def _served(bundle: Bundle, server: RemoteEncoder) -> Artifact:
    says = server.parameters
    for artifact in bundle.artifacts(sha256=says["artifact_sha256"], precision=says["precision"]):
        return artifact
    raise GateError(
        f"{server.url} runs {says['artifact']} ({says['precision']}, {says['artifact_sha256'][:12]}…), an artifact that"
        f" {bundle.path} does not hold"
    )


def _readable(preprocess: Preprocess, folder: Path, limit: int, *, scaled: bool) -> Iterator[tuple[str, bytes, Pixels]]:
    """Yield name, bytes and pixels of the golden images, then of the given ones that can be decoded here."""
    sources: dict[str, bytes | SourceFile] = {f"golden image {name}": data for name, data in golden_files().items()}
    sources |= {f"image {file.key}": file for file in evenly_spaced(list_images(folder).files, limit)}
    with Decoder(preprocess, scaled=scaled) as decoder:
        for name, source in sources.items():
            try:
                data = source if isinstance(source, bytes) else source.read(decoder.limits.max_file_bytes)[0]
                pixels = decoder.decode(data)
            except (OSError, DecodeError):
                continue
            yield name, data, pixels


def _decoding_problems(
    server: RemoteEncoder, report: ParityReport, items: Iterator[tuple[str, bytes, Pixels]]
) -> list[str]:
    """Send images as files, and the pixels that they have here; both must come to the same."""
    problems, bound, least = [], report.budget.max_row_error, report.budget.min_cosine
    while group := list(islice(items, _GROUP)):
        names, files, pixels = zip(*group, strict=True)
        for name, a, b, error in zip(names, server.embed(np.stack(pixels)), *server.embed_files(files), strict=True):
            far, near = (
                relative_errors(a[None], b[None])[0],
                float(l2_normalized(a[None])[0] @ l2_normalized(b[None])[0]),
            )
            if error is not None:
                problems.append(f"preprocessing: {name} is refused: {error.partition(': ')[2]}")
            elif bound is not None and not far <= bound:
                problems.append(f"preprocessing: {name}: relative error {far:.1e} is above {bound:.1e}")
            elif not near >= least:
                problems.append(f"preprocessing: {name}: cosine {near:.6f} is below {least}")
    return problems


def _other_versions(says: Mapping[str, str]) -> str:
    """Name what may explain a small difference."""
    try:
        return difference(versions_here(says["runtime"]), json.loads(says["versions"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return "which, it does not say"


__all__ = ["verify_server"]
