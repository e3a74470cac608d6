"""What ``auto`` stands for, settled once for a store: the fastest proved artifact, and how to decode large JPEGs."""

import importlib.util
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mio_export.bundle import Bundle
from mio_export.decoding import Decoder
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.limits import Limits
from mio_export.parity.report import relative_errors
from mio_export.preprocess import DecodeError, Preprocess
from mio_export.progress import Progress
from mio_export.runtimes import BACKENDS, Choice, Runtime, choose
from mio_export.runtimes.registry import NAMED_ONLY, backend_of, choice_of, open_choice
from mio_export.sources import SourceFile, spread

_ROUNDS = 3
_MAX_BATCH = 16
_SAMPLE = 24
_MIN_GAIN = 1.1
"""A batch of twice the size must be this much faster to be worth its memory."""
_CANDIDATES = 400
MIN_SCALED_COSINE = 0.995
"""Scaled decoding is used where the user's own images keep at least this cosine with full decoding."""


def fastest(bundle: Bundle, *, precision: str = "auto", device: str, progress: Progress) -> Choice:
    """Return the proved artifact that embeds fastest here; they take turns on a few batches of noise.

    Formats that may hold code (``NAMED_ONLY``) are never opened unless they are named.

    Args:
        bundle: whose artifacts.
        precision: the one that is asked for; ``auto``: fp32, since the others lose something.
        device: as for ``choose``.
        progress: is told how fast each is.

    Raises:
        UsageError: a name is not known, or no artifact of the precision is proved.
        MissingBackendError: the device is not there.
    """
    first = choose(bundle, precision=precision, device=device)
    proved = [
        artifact
        for artifact in bundle.manifest.artifacts
        if (artifact.precision, artifact.parity.verdict) == (first.precision, "proved")
        and backend_of(artifact.format) not in NAMED_ONLY
    ]
    if len(proved) < 2:
        return first
    size = min(_MAX_BATCH, bundle.manifest.max_batch)
    images = np.random.default_rng(0).integers(0, 256, (size, *bundle.manifest.preprocess.shape), dtype=np.uint8)
    with ExitStack() as stack:
        running = []
        for artifact in proved:
            try:
                choice = choice_of(artifact, device=device)
            except (GateError, MissingBackendError):
                continue  # not proved on this device, or it cannot run here; ``first`` is and can
            try:
                runtime = stack.enter_context(open_choice(bundle, choice))
            except MissingBackendError:
                continue  # what is not installed here cannot be the fastest
            runtime.embed(images)
            running.append((choice, runtime))
        seconds = np.full((_ROUNDS, len(running)), np.inf)
        for round_number in range(_ROUNDS):
            for column, (_, runtime) in enumerate(running):
                runtime.embed(images)  # meanwhile the threads of the one before stop to spin
                start = time.perf_counter()
                runtime.embed(images)
                seconds[round_number, column] = time.perf_counter() - start
    if not running:
        return first
    best = seconds.min(axis=0)
    rates = [f"{choice.runtime} {size / s:,.0f}/s" for (choice, _), s in zip(running, best, strict=True)]
    progress.line(f"the fastest proved artifact here: {', '.join(rates)}")
    return running[int(best.argmin())][0]


def first_installed(bundle: Bundle, *, precision: str = "auto", device: str) -> Choice:
    """Return the first of ``BACKENDS`` that is installed and whose artifact is proved; nothing is measured.

    So the parts of a collection choose alike on machines that are alike. Formats that may hold code (``NAMED_ONLY``)
    are passed over.

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
        is_installed = importlib.util.find_spec(backend.module) is not None
        try:
            choice = choose(bundle, name, precision=precision, device=device if is_installed else "cpu")
            if is_installed:
                return choice
        except UsageError:
            continue  # no such artifact is proved
        except MissingBackendError as error:
            missing = missing or error
        except GateError:
            if is_installed:
                raise
        if not is_installed:
            missing = missing or MissingBackendError(
                f"runtime {name} needs {backend.module}, which is not installed: {backend.install}"
            )
    if missing:
        raise missing
    return choose(bundle, precision=precision, device=device)  # says what there is


def best_batch(runtime: Runtime, largest: int) -> int:
    """Return the batch that a GPU embeds well with: doubled from 8 while images/s grow by a tenth and memory lasts.

    Args:
        runtime: takes noise.
        largest: the most that the bundle was proved at.
    """
    best, best_rate = min(8, largest), 0.0
    size = best
    while size <= largest:
        images = np.random.default_rng(0).integers(0, 256, (size, *runtime.image_shape), dtype=np.uint8)
        seconds = []
        try:
            for _ in range(1 + _ROUNDS):  # the first one allocates
                start = time.perf_counter()
                runtime.embed(images)
                seconds.append(time.perf_counter() - start)
        except Exception:
            if not best_rate:
                raise
            break  # libraries say in many ways that memory has ended
        rate = size / min(seconds[1:])
        if rate < _MIN_GAIN * best_rate:
            break
        best, best_rate = size, rate
        size *= 2
    return best


def settle_decoding(
    decode: str,
    bundle: Bundle,
    choice: Choice,
    files: Sequence[SourceFile],
    *,
    progress: Progress,
    limits: Limits | None = None,
) -> str:
    """Turn ``auto`` into ``scaled`` or ``full``, by what scaled decoding does to embeddings of the files themselves.

    Args:
        decode: ``auto``, ``full`` or ``scaled``; only ``auto`` looks at any file.
        bundle: whose contract decodes.
        choice: what embeds.
        files: the user's own.
        progress: is told what was found.
        limits: what one file may cost; None: the defaults.
    """
    if decode != "auto":
        return decode
    pairs = _both_ways(files, bundle.manifest.preprocess, limits)
    if not pairs:
        return "full"
    size = min(_MAX_BATCH, bundle.manifest.max_batch)
    whole, scaled = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    with open_choice(bundle, choice) as runtime:
        a, b = (
            np.concatenate([runtime.embed(part[start : start + size]) for start in range(0, len(part), size)])
            for part in (whole, scaled)
        )
    cosine = float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    found = (
        f"cosine {cosine:.4f} at worst, relative error {relative_errors(a, b).max():.3f}, on {len(pairs)} of your JPEGs"
    )
    if cosine >= MIN_SCALED_COSINE:
        progress.line(f"large JPEGs are decoded at a fraction of their size: {found}")
        return "scaled"
    progress.line(f"large JPEGs are decoded in full: scaled decoding moves embeddings too far ({found})")
    return "full"


def _both_ways(
    files: Sequence[SourceFile], preprocess: Preprocess, limits: Limits | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decode some of the JPEGs that scaled decoding would touch, in full and scaled."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    named = [file for file in files if Path(file.key).suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")]
    with Decoder(preprocess, limits=limits) as full, Decoder(preprocess, scaled=True, limits=limits) as scaled:
        for file in spread(named, _CANDIDATES) if named else []:
            try:
                data, _ = file.read(full.limits.max_file_bytes)
                if full.can_scale(data):
                    pairs.append((full.decode(data), scaled.decode(data)))
            except (OSError, DecodeError, MemoryError):
                continue
            if len(pairs) == _SAMPLE:
                break
    return pairs
