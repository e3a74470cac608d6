"""How many images a second each artifact of a bundle embeds on this machine, beside eager PyTorch."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mio_export.bundle import Bundle, load_bundle
from mio_export.errors import MissingBackendError, UsageError, one_line
from mio_export.extras import is_installed
from mio_export.preprocess import Pixels
from mio_export.runtimes import Choice, Runtime, choose
from mio_export.runtimes.backends import BACKENDS, NAMED_ONLY
from mio_export.runtimes.machine import Machine, this_machine
from mio_export.runtimes.opening import open_choice
from mio_export.runtimes.selection import choice_of
from mio_export.runtimes.timing import Rates, embedding_of, noise, timed_rounds

_SEED = 0
_WARM_UP = 3
_ROUNDS = 20
_MIN_ROUNDS = 5
_RESAMPLES = 2000
_EAGER = "torch"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to run the encoder."""

    runtime: str
    format: str
    """The artifact's, or ``torch`` for the encoder itself."""
    precision: str
    device: str
    """``cpu`` or ``cuda``; of one that cannot run, what was asked for."""
    capability: str | None = None
    """CUDA compute capability of an engine."""
    verdict: Literal["reference", "proved", "unproven", "refused"]
    """What parity says of it; the encoder itself is the reference."""

    @property
    def name(self) -> str:
        """Runtime, precision and, of an engine, its GPUs."""
        return " ".join([self.runtime, self.precision, *([self.capability] if self.capability else [])])


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured of a contender."""

    contender: Contender
    images_per_s: float
    """Median over the rounds."""
    low: float
    """Lower end of the median's 95 % bootstrap interval."""
    high: float
    """Upper end of it."""
    rates: tuple[float, ...]
    """Images/s in each round."""

    def leads(self, other: "Speed") -> bool:
        """Whether it is faster by more than both intervals."""
        return self.low > other.high


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A contender that does not run here."""

    contender: Contender
    reason: str


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What ``bench`` found."""

    bundle: str
    """The bundle's name."""
    batch_size: int
    num_rounds: int
    speeds: tuple[Speed, ...]
    """The encoder in eager PyTorch first, if that is installed, then artifacts in the manifest's order."""
    absent: tuple[Absent, ...]
    """Artifacts that do not run here, and the encoder itself, if PyTorch is not installed."""
    machine: Machine

    @property
    def eager(self) -> Speed | None:
        """The encoder itself, in eager PyTorch; None if that is not installed."""
        return next((speed for speed in self.speeds if speed.contender.verdict == "reference"), None)

    @property
    def fastest(self) -> Speed | None:
        """The fastest proved artifact; None if there is none that runs."""
        proved = [speed for speed in self.speeds if speed.contender.verdict == "proved"]
        return max(proved, key=lambda speed: speed.images_per_s, default=None)

    def findings(self) -> list[str]:
        """Return what the numbers say, a line each."""
        absent = [f"{a.contender.name} does not run here: {a.reason}" for a in self.absent]
        return [self._verdict(), *self._slower_reduced(), *absent]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return a header and rows of text: a row for each that ran."""
        header = ["", "device", "images/s", "95 % interval", "x eager torch", "parity"]
        return header, [
            [
                speed.contender.name,
                speed.contender.device,
                f"{speed.images_per_s:,.1f}",
                f"{speed.low:,.1f} to {speed.high:,.1f}",
                f"{speed.images_per_s / self.eager.images_per_s:.2f}" if self.eager else "",
                speed.contender.verdict,
            ]
            for speed in self.speeds
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values, findings included."""
        return {**asdict(self), "findings": self.findings()}

    def _verdict(self) -> str:
        """Which proved artifact is fastest, and how sure that is."""
        best = self.fastest
        if best is None:
            return "no proved artifact runs here"
        rivals = [s for s in self.speeds if s.contender.verdict == "proved" and s is not best and not best.leads(s)]
        tie = f"; {', '.join(s.contender.name for s in rivals)} may be as fast" if rivals else ""
        if self.eager is None:
            return f"fastest proved: {best.contender.name}, {best.images_per_s:,.1f} images/s{tie}"
        sure = "within the intervals, so no lead"
        if best.leads(self.eager):
            sure = "a lead beyond the intervals"
        elif self.eager.leads(best):
            sure = "slower, beyond the intervals"
        ratio = f"{best.images_per_s / self.eager.images_per_s:.2f} times eager torch fp32"
        return f"fastest proved: {best.contender.name}, {ratio} ({sure}){tie}"

    def _slower_reduced(self) -> Iterator[str]:
        """Where a reduced precision does not pay."""
        whole = {(s.contender.runtime, s.contender.device): s for s in self.speeds if s.contender.precision == "fp32"}
        for speed in self.speeds:
            reduced = speed.contender
            fp32 = whole.get((reduced.runtime, reduced.device))
            if fp32 is None or reduced.precision == "fp32" or speed.leads(fp32):
                continue
            how = "slower" if fp32.leads(speed) else "no faster"
            rates = f"{speed.images_per_s:,.1f} against {fp32.images_per_s:,.1f} images/s"
            yield f"{reduced.precision} is {how} than fp32 here ({reduced.name}: {rates})"


def bench(
    bundle: Bundle | str | Path,
    *,
    batch_size: int = 32,
    seconds: float = 10.0,
    device: str = "auto",
    runtimes: Sequence[str] | None = None,
) -> BenchResult:
    """Measure the speed of every artifact that is proved here, and of the encoder in eager PyTorch.

    All take turns, in an order that is drawn anew for each round, so that what drifts hits all alike; each turn starts
    with a batch that is not timed. Images are noise: time does not depend on what they show. A rate is whole batches
    from and to host memory, without decoding.

    Args:
        bundle: a bundle or its path.
        batch_size: images in a batch, 1 to the bundle's ``max_batch``.
        seconds: how long to measure in all; longer where that is too short for five rounds.
        device: ``auto``, ``cpu`` or ``cuda``.
        runtimes: whose artifacts, by the names in ``BACKENDS``; None: all but ``pt2`` and ``torchscript``, which hold
            programs and are opened only when they are named.

    Raises:
        UsageError: batch size, time, device or a runtime is not allowed, or there is no bundle.
        MissingBackendError: the device is not there, or nothing that runs the bundle is installed.
        GateError: the weights are not the ones that the manifest names.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    manifest = bundle.manifest
    _check(manifest.max_batch, batch_size, seconds, runtimes or ())
    images = noise(manifest.preprocess.shape, batch_size)
    with ExitStack() as stack:
        running, absent = _opened(bundle, images, _contenders(bundle, device, runtimes), stack)
        if not running:
            raise MissingBackendError("; ".join(dict.fromkeys(contender.reason for contender in absent)))
        works = [embedding_of(runtime, images) for _, runtime in running]
        turn_s = seconds / (_ROUNDS * len(running))
        rates = timed_rounds(works, rounds=_MIN_ROUNDS, seconds=seconds, turn_s=turn_s)
    contenders = [contender for contender, _ in running]
    return BenchResult(
        bundle=manifest.name,
        batch_size=batch_size,
        num_rounds=len(rates),
        speeds=tuple(_speed(contender, column) for contender, column in zip(contenders, rates.T, strict=True)),
        absent=tuple(absent),
        machine=this_machine(on_gpu=any(contender.device == "cuda" for contender in contenders)),
    )


def _check(max_batch: int, batch_size: int, seconds: float, runtimes: Sequence[str]) -> None:
    if unknown := [name for name in runtimes if name not in BACKENDS]:
        raise UsageError(f"runtime must be {', '.join(BACKENDS)}; got {', '.join(unknown)}")
    if not 1 <= batch_size <= max_batch:
        raise UsageError(
            f"batch_size must be 1 to {max_batch}, the largest batch that the bundle was proved at; got {batch_size}"
        )
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UsageError(f"seconds must be above 0 and finite, got {seconds}")


def _contenders(
    bundle: Bundle, device: str, runtimes: Sequence[str] | None
) -> Iterator[tuple[Contender, Callable[[], Choice]]]:
    """The encoder itself, then every artifact, each with a function that returns how it is opened."""
    wanted = set(BACKENDS) - NAMED_ONLY if runtimes is None else set(runtimes)
    eager = Contender(runtime=_EAGER, format=_EAGER, precision="fp32", device=device, verdict="reference")
    yield eager, lambda: choose(bundle, _EAGER, device=device)
    for artifact in bundle.manifest.artifacts:
        if artifact.runtime not in wanted:
            continue
        contender = Contender(
            runtime=artifact.runtime,
            format=artifact.format,
            precision=artifact.precision,
            capability=artifact.capability,
            device=device,
            verdict=artifact.verdict,
        )
        yield contender, partial(choice_of, artifact, device=device, bundle=bundle.path)


def _opened(
    bundle: Bundle,
    images: Pixels,
    contenders: Iterable[tuple[Contender, Callable[[], Choice]]],
    stack: ExitStack,
) -> tuple[list[tuple[Contender, Runtime]], list[Absent]]:
    """Open and warm up whatever runs; the encoder itself must, where PyTorch is installed."""
    running: list[tuple[Contender, Runtime]] = []
    absent = []
    for contender, choice in contenders:
        try:
            runtime = stack.enter_context(open_choice(bundle, choice()))
            for _ in range(_WARM_UP):
                runtime.embed(images)
        except Exception as error:
            if contender.verdict == "reference" and is_installed(_EAGER):
                raise
            absent.append(Absent(contender=contender, reason=one_line(error)))
        else:
            running.append((replace(contender, device=runtime.device), runtime))
    return running, absent


def _speed(contender: Contender, rates: Rates) -> Speed:
    """Median and its percentile interval (Efron and Tibshirani 1993, chapter 13), rounds being drawn again."""
    drawn = np.random.default_rng(_SEED).integers(0, len(rates), (_RESAMPLES, len(rates)))
    low, high = np.quantile(np.median(rates[drawn], axis=1), [0.025, 0.975])
    return Speed(
        contender=contender,
        images_per_s=float(np.median(rates)),
        low=float(low),
        high=float(high),
        rates=tuple(rates.tolist()),
    )


__all__ = ["Absent", "BenchResult", "Contender", "Speed", "bench"]
