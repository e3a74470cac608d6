"""Check a bundle: every hash, and on demand every artifact against its encoder again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mio_export.bundle import MANIFEST, Artifact, Bundle, broken_files, load_bundle, save_manifest
from mio_export.parity.report import ParityReport


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``verify`` found."""

    bundle: Bundle
    """With the verdicts that were reached now."""
    broken: tuple[str, ...]
    """Files that are missing or changed, one line each."""
    problems: tuple[str, ...]
    """What else is refused of the bundle as a whole, one line each."""
    reports: tuple[ParityReport, ...]
    """One for each artifact, if images were given and no file is broken."""

    @property
    def passed(self) -> bool:
        """Whether no file is broken and no artifact is refused; one that cannot run here is neither."""
        return not self.broken and not self.problems and all(r.verdict != "refused" for r in self.reports)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Artifacts that nobody has proved yet, one line each."""
        return tuple(
            f"{artifact.file} ({artifact.format} {artifact.precision})"
            for artifact in self.bundle.manifest.artifacts
            if artifact.parity.verdict == "unproven"
        )


def verify(path: str | Path, *, images: Path | None = None, limit: int = 256, device: str = "auto") -> Verification:
    """Check every hash of a bundle; with images, prove every artifact again.

    What was ``unproven`` and can run here is then proved or refused for good: the manifest says so. A proof on another
    device than those before is written down too.

    Args:
        path: the bundle.
        images: a folder of images; None checks hashes only, in seconds and without torch.
        limit: number of images to take from the folder.
        device: where the artifacts run: ``cpu``, ``cuda``, ``tensorrt`` (ONNX Runtime's provider), or ``auto``: all
            that this machine has; the encoder itself always runs on the CPU.

    Raises:
        UsageError: there is no bundle, or no image that can be read.
        GateError: the manifest is damaged.
        MissingBackendError: the device is not there.
    """
    bundle = load_bundle(path)
    broken = list(broken_files(bundle))
    if images is not None and not bundle.manifest.artifacts:
        broken.append(f"{MANIFEST}: no artifact to prove")
    problems = [
        f"{artifact.file}: {artifact.format} {artifact.precision} was refused on a machine that runs it"
        for artifact in bundle.manifest.artifacts
        if artifact.parity.verdict == "refused" and images is None
    ]
    reports: Sequence[ParityReport] = ()
    if images is not None and not broken:
        bundle, reports, problems = _prove_all(bundle, images, limit, device)
    return Verification(bundle=bundle, broken=tuple(broken), problems=tuple(problems), reports=tuple(reports))


def _prove_all(bundle: Bundle, folder: Path, limit: int, device: str) -> tuple[Bundle, list[ParityReport], list[str]]:
    from mio_export.models import load_encoder
    from mio_export.parity.golden import GOLDEN, decoding_problems, load_golden
    from mio_export.parity.images import parity_images
    from mio_export.parity.prove import devices_for, prove, write_report
    from mio_export.parity.reference import Reference

    manifest = bundle.manifest
    images, _ = parity_images(manifest.preprocess, folder, limit=limit)
    reference = Reference.of(load_encoder(bundle.path), images, weights_sha256=manifest.weights_sha256)
    problems = decoding_problems(load_golden(bundle.path / GOLDEN)[0], reference.golden)
    rows, reports = [], []
    for artifact in manifest.artifacts:
        devices = devices_for(artifact.format) if device == "auto" else _chosen(device, artifact)
        report = prove(bundle.path, artifact, manifest=manifest, reference=reference, devices=devices).report
        reports.append(report)
        known = artifact.parity
        settled = known.verdict == "unproven" and report.verdict != "unproven"
        further = known.verdict == report.verdict == "proved" and not set(report.devices) <= set(known.devices)
        if settled or further:
            proof = write_report(bundle.path, artifact, report)
            proof = replace(proof, devices=tuple(dict.fromkeys((*known.devices, *proof.devices))))
            artifact = replace(artifact, parity=proof)
        rows.append(artifact)
    if tuple(rows) != manifest.artifacts:
        manifest = replace(manifest, artifacts=tuple(rows))
        save_manifest(bundle.path, manifest)
        for name in {a.parity.report for a in bundle.manifest.artifacts} - {a.parity.report for a in rows}:
            (bundle.path / name).unlink(missing_ok=True)
    return Bundle(path=bundle.path, manifest=manifest), reports, problems


def _chosen(device: str, artifact: Artifact) -> tuple[str, ...]:
    """Settle a device that was asked for; an artifact whose library never runs on it keeps its own."""
    from mio_export.parity.prove import devices_for
    from mio_export.runtimes.devices import resolve_device
    from mio_export.runtimes.registry import BACKENDS, backend_of

    library = BACKENDS[backend_of(artifact.format)].library
    if library in ("openvino", "tensorrt") or (device == "tensorrt" and library != "onnxruntime"):
        return devices_for(artifact.format)
    return (resolve_device(device, library=library),)
