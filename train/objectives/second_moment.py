"""The monitor of MINC's second moment: a stale Λ makes training oscillate instead of converge."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mio_export.train.objectives.base import Monitor, Quantity

_LIMIT = 0.2
_STALE = 0.5
_KEY = "second_moment_lag"
LAG = {
    _KEY: Quantity(
        title="Lag of the second moment",
        meaning="How far the moving average Λ is from its present value, relatively. Should fall below 0.2 and stay"
        " there.",
    )
}
"""What the monitor measures: ρ, see ``second_moment_lag``."""


class MovingMoment(Protocol):
    """A loss with a moving second moment Λ of its features."""

    decay: Tensor

    def features(self, projections: Tensor) -> Tensor: ...  # noqa: D102 - a part of MINCLoss

    def corrected_second_moment(self, dtype: torch.dtype) -> Tensor: ...  # noqa: D102

    def halve_memory(self) -> None: ...  # noqa: D102


class SecondMomentMonitor(Monitor):
    """Measures ρ, and halves the memory 1/(1 − β) of Λ when it was above 0.2 twice running.

    With η the step in function space, training is stable where r = η/(1 − β) is small enough; η cannot be measured, but
    a Λ that does not follow can. The rule is the project's own, proved on the finite oracle of the tests.
    """

    def __init__(self, loss: MovingMoment) -> None:
        self._loss = loss
        self._num_above = 0

    def measure(self, projections: Tensor) -> dict[str, float]:
        """Return ρ of target projections, shape (2N, D)."""
        phi = self._loss.features(projections)
        halves = (phi[0::2], phi[1::2])  # different images: views of one follow the images of the other
        fresh = [half.T @ half / len(half) for half in halves]
        return {_KEY: second_moment_lag(self._loss.corrected_second_moment(phi.dtype), (fresh[0], fresh[1]))}

    def alarm(self, measures: Mapping[str, float]) -> str | None:
        """Name a stale Λ."""
        lag = measures[_KEY]
        if lag <= _STALE:
            return None
        return (
            f"stale second moment: Λ is {lag:.0%} away from the encoder's own;"
            " lower learning_rate or loss.second_moment_decay"
        )

    def intervene(self, measures: Mapping[str, float]) -> str | None:
        """Halve Λ's memory where it is due."""
        lag = measures[_KEY]
        self._num_above = self._num_above + 1 if not lag <= _LIMIT else 0
        if self._num_above < 2:
            return None
        self._num_above = 0
        self._loss.halve_memory()
        return (
            f"Λ was {lag:.0%} away from the encoder's own second moment twice running;"
            f" its memory was halved, to {1 / (1 - float(self._loss.decay)):.3g} steps"
        )

    def state(self) -> dict[str, Any]:
        """Return how many measurements running were above the limit."""
        return {"num_above": self._num_above}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._num_above = state["num_above"]


def second_moment_lag(moment: Tensor, fresh: tuple[Tensor, Tensor]) -> float:
    """Return ρ = ‖Λ − Λ_fresh‖ / ‖Λ_fresh‖ (Frobenius), without the noise of Λ_fresh.

    Of few images Λ_fresh is noisy, and its noise alone would count as lag. Two estimates from different images have
    independent noise, so ⟨Λ − F₀, Λ − F₁⟩ has none on average; with F₀ = F₁ it is the squared norm itself.

    Args:
        moment: Λ, shape (D, D).
        fresh: second moments of the present target features on two sets of images, shape (D, D) each.
    """
    first, second = fresh
    distance = ((moment - first) * (moment - second)).sum().clamp_min(0)
    size = (first * second).sum().clamp_min(torch.finfo(moment.dtype).tiny)
    return float((distance / size).sqrt())
