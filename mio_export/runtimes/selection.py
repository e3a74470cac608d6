"""Which artifact runs where: every ``auto`` resolved, by what is proved, what is installed and what is here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from mio_export.bundle import WEIGHTS, Artifact, Bundle, Precision
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.evidence import artifact_problems
from mio_export.runtimes.backends import BACKENDS, NAMED_ONLY
from mio_export.runtimes.devices import devices_of, resolve_device


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A backend, an artifact and a device, all resolved."""

    runtime: str
    precision: Precision
    device: str
    file: str
    """What is run, relative to the bundle: an artifact, or the weights for ``torch``."""
    sha256: str
    """Its sha256."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """Files that it needs beside it, and their sha256."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What the backend is told: what it was told when the artifact was proved."""


def choose(bundle: Bundle, runtime: str = "auto", *, precision: str = "auto", device: str = "auto") -> Choice:
    """Resolve every ``auto``; nothing is measured.

    The runtime is the first of ``BACKENDS`` for which the bundle holds a proved artifact, never one of ``NAMED_ONLY``;
    the precision fp32, if any artifact has it; the device CUDA, if it is there and the artifact was proved on it, else
    the CPU.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        MissingBackendError: a device is asked for and is not there.
        GateError: the artifact was not proved on the device that is asked for.
    """
    if precision != "auto" and precision not in get_args(Precision):
        raise UsageError(f"precision must be auto, {', '.join(get_args(Precision))}; got {precision!r}")
    if runtime != "auto" and runtime not in BACKENDS:
        raise UsageError(f"runtime must be auto, {', '.join(BACKENDS)}; got {runtime!r}")
    wanted = set(BACKENDS) - NAMED_ONLY if runtime == "auto" else {runtime}
    asked = "fp32" if precision == "auto" else precision
    proved = [row for row in bundle.artifacts(precision=asked, verdict="proved") if row.runtime in wanted]
    if runtime == "torch" or (not proved and (runtime, precision) in (("auto", "auto"), ("auto", "fp32"))):
        return _eager(bundle, precision, device)
    if not proved:
        raise UsageError(_nothing_proved(bundle, runtime, precision))
    order = list(BACKENDS)
    first = min(proved, key=lambda artifact: order.index(artifact.runtime))
    return choice_of(first, device=device, bundle=bundle.path)


def choose_elsewhere(bundle: Bundle, runtime: str = "auto", *, precision: str = "auto", device: str = "auto") -> Choice:
    """Resolve every ``auto`` as ``choose`` does, for a machine that may have another device; the evidence is checked.

    The device is ``cuda``, if the artifact was proved on it, whether or not it is here.

    Raises:
        UsageError: a name is not known, or the bundle has no such artifact that was proved.
        GateError: the artifact was not proved on the device that is asked for, or its evidence does not fit.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu or cuda, got {device!r}")
    here = choose(bundle, runtime, precision=precision)
    rows = bundle.artifacts(runtime=here.runtime, file=here.file, sha256=here.sha256)
    if device == "auto":
        device = "cuda" if any("cuda" in row.parity.devices for row in rows) else "cpu"
    choice = replace(here, device=device)
    check_evidence(bundle, choice)
    return choice


def _nothing_proved(bundle: Bundle, runtime: str, precision: str) -> str:
    held = [f"{a.format} {a.precision} ({a.verdict})" for a in bundle.manifest.artifacts]
    wanted = " ".join(name for name in (runtime, precision) if name != "auto")
    message = f"{bundle.path} holds no proved {wanted} artifact; it holds: {', '.join(dict.fromkeys(held)) or 'none'}"
    named = {artifact.runtime for artifact in bundle.artifacts(verdict="proved")} & NAMED_ONLY
    if runtime == "auto" and named:
        message += f"\nauto opens no {' or '.join(sorted(named))}; name it: --runtime {min(named)}"
    return message


def choice_of(artifact: Artifact, *, device: str = "auto", bundle: Path | None = None) -> Choice:
    """Choose the device for an artifact: one that it was proved on.

    Args:
        artifact: a row of a bundle's manifest.
        device: ``auto``: CUDA, if it is there and the artifact was proved on it, else the first that it was proved on.
        bundle: where it lies, for messages.

    Raises:
        UsageError: the device's name is not known.
        MissingBackendError: the device is asked for and is not there.
        GateError: the artifact was not proved, or not on this device.
    """
    library = BACKENDS[artifact.runtime].library
    proved = artifact.parity.devices if artifact.verdict == "proved" else ()
    if device in devices_of(library) and device not in proved:  # whether or not it is there
        raise GateError(_not_proved(artifact, device, bundle))
    resolved = resolve_device(device, library=library)
    if device == "auto" and proved and resolved not in proved:
        resolved = proved[0]
    if resolved not in proved:
        raise GateError(_not_proved(artifact, resolved, bundle))
    return Choice(
        runtime=artifact.runtime,
        precision=artifact.precision,
        device=resolved,
        file=artifact.file,
        sha256=artifact.sha256,
        companions=artifact.companions,
        options=artifact.options,
    )


def _not_proved(artifact: Artifact, device: str, bundle: Path | None) -> str:
    runtime, proof = artifact.runtime, artifact.parity
    named = f" --runtime {runtime}" if runtime in NAMED_ONLY else ""
    proved = f"was proved on {' and '.join(proof.devices) or 'no device'}, not on {device}"
    found = proved if proof.verdict == "proved" else f"is {proof.verdict}"
    return (
        f"{artifact.file} ({artifact.format} {artifact.precision}) {found};"
        f" prove it there: mio verify {bundle or 'NAME.mio'} --images DIR --device {device}{named}"
    )


def _eager(bundle: Bundle, precision: str, device: str) -> Choice:
    """Choose eager PyTorch: the encoder itself, which artifacts are proved against and which needs no proof."""
    if precision not in ("auto", "fp32"):
        raise UsageError(f"runtime torch computes in fp32, got precision {precision!r}")
    resolved = resolve_device(device, library="torch")
    sha256 = bundle.manifest.weights_sha256
    return Choice(runtime="torch", precision="fp32", device=resolved, file=WEIGHTS, sha256=sha256)


def first_installed(bundle: Bundle, *, precision: str = "auto", device: str) -> Choice:
    """Return the first of ``BACKENDS`` that is installed and whose artifact is proved; nothing is measured.

    So the parts of a collection choose alike on machines that are alike. Formats that may hold code (``NAMED_ONLY``)
    are skipped.

    Args:
        bundle: whose artifacts.
        precision: the one that is asked for; ``auto``: fp32.
        device: as for ``choose``.

    Raises:
        UsageError: a name is not known, or no artifact of the precision is proved.
        MissingBackendError: nothing that could run it is installed, or the device is not there.
        GateError: the artifact was not proved on the device.
    """
    missing: MissingBackendError | None = None
    for name, backend in BACKENDS.items():
        if name in NAMED_ONLY:
            continue
        try:
            choice = choose(bundle, name, precision=precision, device=device if backend.is_installed else "cpu")
            if backend.is_installed:
                return choice
        except UsageError:
            continue  # no such artifact is proved
        except MissingBackendError as error:
            missing = missing or error
        except GateError:
            if backend.is_installed:
                raise
        if not backend.is_installed:
            missing = missing or MissingBackendError(
                f"runtime {name} needs {backend.module}, which is not installed: {backend.install}"
            )
    if missing:
        raise missing
    return choose(bundle, precision=precision, device=device)  # says what there is


def check_evidence(bundle: Bundle, choice: Choice) -> None:
    """Hold the reports of an artifact to the manifest; the encoder itself has none.

    Raises:
        GateError: they do not fit, or no row of the manifest allows the choice.
    """
    if BACKENDS[choice.runtime].format is None:
        return
    rows = bundle.artifacts(runtime=choice.runtime, precision=choice.precision, file=choice.file, sha256=choice.sha256)
    if not rows:
        raise GateError(f"{bundle.path} holds no {choice.file} for {choice.runtime} {choice.precision} any more")
    if choice.device not in rows[0].parity.devices or rows[0].verdict != "proved":
        raise GateError(_not_proved(rows[0], choice.device, bundle.path))
    if problems := artifact_problems(bundle, rows[0]):
        raise GateError("\n     ".join([f"{bundle.path} is refused", *problems[:3]]))


__all__ = ["Choice", "check_evidence", "choice_of", "choose", "choose_elsewhere", "first_installed"]
