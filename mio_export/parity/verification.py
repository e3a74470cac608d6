"""Check a bundle: every hash, and on demand every artifact against its encoder again."""

from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import MANIFEST, Bundle, broken_files, load_bundle
from mio_export.parity.report import ParityReport


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``verify`` found."""

    bundle: Bundle
    broken: tuple[str, ...]
    """Files that are missing or changed, one line each."""
    reports: tuple[ParityReport, ...]
    """One for each artifact, if images were given and no file is broken."""

    @property
    def passed(self) -> bool:
        """Whether no file is broken and no artifact is refused."""
        return not self.broken and all(report.passed for report in self.reports)


def verify(path: str | Path, *, images: Path | None = None, limit: int = 256, device: str = "cpu") -> Verification:
    """Check every hash of a bundle; with images, prove every artifact again.

    Args:
        path: the bundle.
        images: a folder of images; None checks hashes only, in seconds and without torch.
        limit: number of images to take from the folder.
        device: where the artifacts run, ``cpu``, ``cuda`` or ``auto``; the encoder itself always runs on the CPU.

    Raises:
        UsageError: there is no bundle, or no image that can be read.
        GateError: the manifest is damaged.
        MissingBackendError: the device or a backend is not there.
    """
    bundle = load_bundle(path)
    broken = tuple(broken_files(bundle))
    if images is not None and not bundle.manifest.artifacts:
        broken += (f"{MANIFEST}: no artifact to prove",)
    reports = () if broken or images is None else _prove_all(bundle, images, limit, device)
    return Verification(bundle=bundle, broken=broken, reports=reports)


def _prove_all(bundle: Bundle, folder: Path, limit: int, device: str) -> tuple[ParityReport, ...]:
    from mio_export.models import load_encoder
    from mio_export.parity.images import parity_images
    from mio_export.parity.prove import Reference, prove

    manifest = bundle.manifest
    images = parity_images(manifest.preprocess, folder, limit=limit)
    reference = Reference.of(load_encoder(bundle.path), images, weights_sha256=manifest.weights_sha256)
    return tuple(
        prove(
            bundle.path / artifact.file,
            format=artifact.format,
            precision=artifact.precision,
            reference=reference,
            max_batch=manifest.max_batch,
            device=device,
        )
        for artifact in manifest.artifacts
    )
