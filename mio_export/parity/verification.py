"""Check a bundle: every hash and what its evidence says, and on demand every artifact against its encoder again."""

import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mio_export.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    SIGNATURE,
    Artifact,
    Bundle,
    Manifest,
    ReportFile,
    broken_files,
    load_bundle,
    save_manifest,
)
from mio_export.bundle.lock import bundle_lock
from mio_export.errors import MioError, UsageError
from mio_export.evidence import ParityReport
from mio_export.evidence.check import report_problems
from mio_export.parity.inspection import evidence_problems
from mio_export.runtimes.backends import BACKENDS, NAMED_ONLY

EVERYTHING: tuple[str, ...] = tuple(name for name, backend in BACKENDS.items() if backend.format is not None)
"""Every runtime of artifacts, those included that are opened only when they are named."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What ``verify`` found."""

    bundle: Bundle
    """With the verdicts that were reached now."""
    broken: tuple[str, ...]
    """Files that are missing, changed or not named, one line each."""
    problems: tuple[str, ...]
    """What else is refused: evidence that does not fit the manifest, another decoder; one line each."""
    reports: tuple[ParityReport, ...]
    """One for each artifact that was proved again, if images were given and no file is broken."""
    left_out: tuple[str, ...] = ()
    """Artifacts that were not proved again because their runtime was not named, one line each."""
    unwritten: str | None = None
    """Why new verdicts could not be written down; None if they were, or if there are none."""
    signature_outdated: bool = False
    """Whether the bundle is signed and its manifest has changed, so that the signature no longer fits."""

    @property
    def passed(self) -> bool:
        """Whether no file is broken and no artifact is refused; one that cannot run here is neither."""
        return not self.broken and not self.problems and all(r.verdict != "refused" for r in self.reports)

    @property
    def unproven(self) -> tuple[str, ...]:
        """Artifacts that nobody has proved yet, one line each."""
        return tuple(_named(artifact) for artifact in self.bundle.manifest.artifacts if _is_unproven(artifact))


def verify(
    path: str | Path,
    *,
    images: Path | None = None,
    limit: int = 256,
    device: str = "auto",
    runtimes: Sequence[str] | None = None,
) -> Verification:
    """Check every hash of a bundle and hold its evidence to its manifest; with images, prove its artifacts again.

    What was ``unproven`` and can run here is then proved or refused for good: the manifest says so. A proof on another
    device than those before is written down beside theirs. Proofs of one bundle may run at once, on several machines.

    Args:
        path: the bundle.
        images: a folder of images; None reads hashes and evidence only, without torch.
        limit: number of images to take from the folder.
        device: where the artifacts run: ``cpu``, ``cuda``, ``tensorrt`` (ONNX Runtime's provider), or ``auto``: all
            that this machine has; the encoder itself always runs on the CPU.
        runtimes: whose artifacts are proved again, by the names in ``BACKENDS``; None: all but ``pt2`` and
            ``torchscript``, since opening a program of a stranger's is running it. ``EVERYTHING`` names them all.

    Raises:
        UsageError: there is no bundle, no image that can be read, or no artifact of these runtimes.
        GateError: the manifest is damaged.
        MissingBackendError: the device is not there.
    """
    bundle = load_bundle(path)
    asked = _asked(bundle, runtimes) if images is not None else []
    broken = broken_files(bundle)
    if images is None or broken:
        problems = [] if broken else [*_refused(bundle.manifest.artifacts), *evidence_problems(bundle)]
        return Verification(bundle=bundle, broken=tuple(broken), problems=tuple(problems), reports=())
    reports, problems = _prove_all(bundle, images, limit, device, asked)
    proved, unwritten = _written_down(bundle, list(zip(asked, reports, strict=True)))
    # what a new proof of an artifact says is in the reports; the others keep the verdict that they have
    others = [artifact for artifact in proved.manifest.artifacts if artifact.file not in {r.artifact for r in reports}]
    return Verification(
        bundle=proved,
        broken=(),
        problems=(*problems, *_refused(others), *evidence_problems(proved)),
        reports=tuple(reports),
        left_out=tuple(_named(artifact) for artifact in bundle.manifest.artifacts if artifact not in asked),
        unwritten=unwritten,
        signature_outdated=proved.manifest != bundle.manifest and (bundle.path / SIGNATURE).exists(),
    )


def _asked(bundle: Bundle, runtimes: Sequence[str] | None) -> list[Artifact]:
    """Return the artifacts to prove again."""
    if unknown := [name for name in runtimes or () if name not in EVERYTHING]:
        raise UsageError(f"runtime must be {', '.join(EVERYTHING)}; got {', '.join(unknown)}")
    wanted = set(EVERYTHING) - NAMED_ONLY if runtimes is None else set(runtimes)
    artifacts = bundle.manifest.artifacts
    asked = [artifact for artifact in artifacts if artifact.runtime in wanted]
    if artifacts and not asked:
        held = ", ".join(dict.fromkeys(artifact.runtime for artifact in artifacts))
        raise UsageError(f"{bundle.path} has no artifact to prove for {', '.join(sorted(wanted))}; name one of: {held}")
    return asked


def _refused(artifacts: Iterable[Artifact]) -> list[str]:
    return [
        f"{artifact.file}: {artifact.format} {artifact.precision} was refused on a machine that runs it"
        for artifact in artifacts
        if artifact.verdict == "refused"
    ]


def _named(artifact: Artifact) -> str:
    return f"{artifact.file} ({artifact.format} {artifact.precision})"


def _is_unproven(artifact: Artifact) -> bool:
    return artifact.verdict == "unproven"


def _prove_all(
    bundle: Bundle, folder: Path, limit: int, device: str, asked: Sequence[Artifact]
) -> tuple[list[ParityReport], list[str]]:
    """Prove artifacts again; nothing is written."""
    from mio_export.models import load_encoder
    from mio_export.parity.gate import devices_for, prove
    from mio_export.parity.golden import GOLDEN, decoding_problems, golden_pixels, load_golden
    from mio_export.parity.images import parity_images
    from mio_export.parity.reference import Reference

    manifest = bundle.manifest
    images, _ = parity_images(manifest.preprocess, folder, limit=limit)
    stored = load_golden(bundle.path / GOLDEN)[0]
    decoded = golden_pixels(manifest.preprocess)
    problems = decoding_problems(stored, decoded)
    encoder = load_encoder(bundle.path)
    golden = decoded if problems else stored
    reference = Reference.of(encoder, images, weights_sha256=manifest.weights_sha256, golden=golden)
    reports = []
    for artifact in asked:
        devices = devices_for(artifact.format) if device == "auto" else _chosen(device, artifact)
        outcome = prove(bundle.path, artifact, manifest=manifest, reference=reference, devices=devices)
        reports.append(outcome.report)
    return reports, problems


def _written_down(bundle: Bundle, proved: Sequence[tuple[Artifact, ParityReport]]) -> tuple[Bundle, str | None]:
    """Add new verdicts to the manifest as it is now, which others may have changed meanwhile.

    Reports are written before the manifest that names them and none is removed, so that a process that is killed, or
    another one that reads, always finds what its manifest names.
    """
    if not any(_adds(bundle.path, artifact, report) for artifact, report in proved):
        return bundle, None
    try:
        with bundle_lock(bundle.path):
            now = load_bundle(bundle.path)
            rows = tuple(_merged(now, row, proved) for row in now.manifest.artifacts)
            manifest = replace(now.manifest, artifacts=rows)
            if rows != now.manifest.artifacts:
                manifest = replace(manifest, schema_version=SCHEMA_VERSION)
                save_manifest(bundle.path, manifest)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return bundle, f"{bundle.path} cannot be written ({error.strerror}): its {MANIFEST} stays as it was"
    return Bundle(path=bundle.path, manifest=manifest), None


def _merged(bundle: Bundle, row: Artifact, proved: Sequence[tuple[Artifact, ParityReport]]) -> Artifact:
    """Return a row with the verdict of its new proof, if that adds something."""
    from mio_export.parity.gate import write_report

    for artifact, report in proved:
        if replace(artifact, parity=row.parity) != row or not _fits(report, row, bundle.manifest):
            continue
        if _adds(bundle.path, row, report):
            written = write_report(bundle.path, row, report)
            if _is_unproven(row):
                return replace(row, parity=written)
            further = ReportFile(report=written.report, report_sha256=written.report_sha256)
            devices = tuple(dict.fromkeys((*row.parity.devices, *written.devices)))
            return replace(row, parity=replace(row.parity, devices=devices, further=(*row.parity.further, further)))
    return row


def _fits(report: ParityReport, row: Artifact, manifest: Manifest) -> bool:
    """Whether a new report is of this very row: another export may have taken the bundle's place meanwhile."""
    return not report_problems(report, row, manifest)


def _adds(folder: Path, row: Artifact, report: ParityReport) -> bool:
    """Whether a new report decides what could not be run before, or is of a device that has no report yet."""
    if _is_unproven(row):
        return report.verdict != "unproven"
    return row.parity.verdict == report.verdict == "proved" and not set(report.devices) <= _covered(folder, row)


def _covered(folder: Path, row: Artifact) -> set[str]:
    covered: set[str] = set()
    for evidence in row.parity.evidence:
        try:
            covered.update(ParityReport.load(folder / evidence.report).devices)
        except (MioError, OSError):
            continue  # it is named as a problem of the evidence
    return covered


def _chosen(device: str, artifact: Artifact) -> tuple[str, ...]:
    """Resolve a device that was asked for; an artifact whose library never runs on it keeps its own."""
    from mio_export.parity.gate import devices_for
    from mio_export.runtimes.devices import resolve_device

    library = BACKENDS[artifact.runtime].library
    if library in ("openvino", "tensorrt") or (device == "tensorrt" and library != "onnxruntime"):
        return devices_for(artifact.format)
    return (resolve_device(device, library=library),)


__all__ = ["EVERYTHING", "Verification", "verify"]
