"""How fast runtimes are on this machine: one timer for all, and what is chosen by it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from mio_export.bundle import Bundle
from mio_export.console.progress import Progress
from mio_export.errors import GateError, MissingBackendError
from mio_export.preprocess import Pixels
from mio_export.runtimes.backends import NAMED_ONLY
from mio_export.runtimes.base import Runtime
from mio_export.runtimes.opening import Selected, open_choice
from mio_export.runtimes.selection import Choice, choice_of, choose

Rates = npt.NDArray[np.float64]
_SEED = 0
_ROUNDS = 3
_MAX_BATCH = 16
_FIRST_BATCH = 8
_MIN_GAIN = 1.1
"""A batch of twice the size must be this much faster to be worth its memory."""


def timed_rounds(
    works: Sequence[Callable[[], int]], *, rounds: int, seconds: float = 0.0, turn_s: float = 0.0, warm_up: bool = True
) -> Rates:
    """Measure how fast several pieces of work are; they take turns, so that what drifts hits all alike.

    The order is drawn for each round.

    Args:
        works: each does something once and returns how many images that were.
        rounds: how many at least.
        seconds: go on with rounds until so much time has passed.
        turn_s: repeat the work within a turn until so much time has passed.
        warm_up: do it once before each turn, untimed: the threads of the one before may still spin, and its data fill
            the caches.

    Returns:
        Images/s, shape (rounds, number of works).
    """
    rng = np.random.default_rng(_SEED)
    measured: list[Rates] = []
    end = time.perf_counter() + seconds
    while len(measured) < rounds or time.perf_counter() < end:
        rates = np.empty(len(works))
        for index in rng.permutation(len(works)):
            if warm_up:
                works[index]()
            rates[index] = _turn(works[index], turn_s)
        measured.append(rates)
    return np.stack(measured)


def _turn(work: Callable[[], int], turn_s: float) -> float:
    num_images, start = 0, time.perf_counter()
    while True:
        num_images += work()
        elapsed = time.perf_counter() - start
        if elapsed >= turn_s:
            return num_images / elapsed


def noise(shape: tuple[int, int, int], num_images: int) -> Pixels:
    """Return images of noise, uint8 (N, H, W, C); time does not depend on what they show."""
    return np.random.default_rng(_SEED).integers(0, 256, (num_images, *shape), dtype=np.uint8)


def embedding_of(runtime: Runtime, images: Pixels) -> Callable[[], int]:
    """Return the work of embedding a batch with a runtime."""
    return lambda: len(runtime.embed(images))


def fastest(
    bundle: Bundle,
    *,
    precision: str = "auto",
    device: str,
    progress: Progress,
    checked: set[str] | None = None,
) -> Selected:
    """Return the proved artifact that embeds fastest here, open if it was measured.

    They take turns on a few batches of noise. Formats that may hold code (``NAMED_ONLY``) are never opened unless they
    are named.

    Args:
        bundle: whose artifacts.
        precision: the one that is asked for; ``auto``: fp32, since the others lose something.
        device: as for ``choose``.
        progress: is told how fast each is.
        checked: as for ``open_choice``.

    Raises:
        UsageError: a name is not known, or no artifact of the precision is proved.
        MissingBackendError: the device is not there.
    """
    first = choose(bundle, precision=precision, device=device)
    rows = bundle.artifacts(precision=first.precision, verdict="proved")
    proved = [row for row in rows if row.runtime not in NAMED_ONLY]
    if len(proved) < 2:
        return Selected(bundle, first)
    checked = set() if checked is None else checked
    running: list[tuple[Choice, Runtime]] = []
    with ExitStack() as stack:
        for artifact in proved:
            try:
                choice = choice_of(artifact, device=device)
            except (GateError, MissingBackendError):
                continue  # not proved on this device, or it cannot run here; ``first`` is and can
            try:
                runtime = open_choice(bundle, choice, checked=checked)
            except MissingBackendError:
                continue  # what is not installed here cannot be the fastest
            stack.callback(runtime.close)
            running.append((choice, runtime))
        if not running:
            return Selected(bundle, first)
        images = noise(bundle.manifest.preprocess.shape, min(_MAX_BATCH, bundle.manifest.max_batch))
        works = [embedding_of(runtime, images) for _, runtime in running]
        for work in works:
            work()  # the first call allocates
        best = timed_rounds(works, rounds=_ROUNDS).max(axis=0)
        rates = [f"{choice.runtime} {rate:,.0f}/s" for (choice, _), rate in zip(running, best, strict=True)]
        progress.line(f"the fastest proved artifact here: {', '.join(rates)}")
        winner = running.pop(int(best.argmax()))
        stack.pop_all()
    for _, loser in running:
        loser.close()
    return Selected(bundle, *winner)


def best_batch(runtime: Runtime, largest: int) -> int:
    """Return the batch that a GPU embeds well with: doubled from 8 while images/s grow by a tenth and memory lasts.

    Args:
        runtime: takes noise.
        largest: the most that the bundle was proved at.
    """
    size = min(_FIRST_BATCH, largest)
    best, best_rate = size, 0.0
    while size <= largest:
        work = embedding_of(runtime, noise(runtime.image_shape, size))
        try:
            work()  # the first call allocates
            rate = float(timed_rounds([work], rounds=_ROUNDS, warm_up=False).max())
        except Exception:
            if not best_rate:
                raise
            break  # each library raises its own out-of-memory error
        if rate < _MIN_GAIN * best_rate:
            break
        best, best_rate = size, rate
        size *= 2
    return best


__all__ = ["Rates", "best_batch", "embedding_of", "fastest", "noise", "timed_rounds"]
