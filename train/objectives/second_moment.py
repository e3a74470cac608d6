"""The guard on MINC's second moment: a Λ that lags behind the encoder makes training circle instead of settle."""

import torch
from torch import Tensor

from mio_export.train.objectives.minc import MINCLoss

_LIMIT = 0.2


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


class SecondMomentGuard:
    """Halves the memory 1/(1 − β) of Λ when ρ was above 0.2 twice running.

    With η the step in function space, training is stable where r = η/(1 − β) is small enough; η cannot be measured, but
    a Λ that does not follow can. The rule is the project's own, proved on the finite oracle of the tests.
    """

    def __init__(self) -> None:
        self.num_above = 0

    def observe(self, loss: MINCLoss, lag: float) -> bool:
        """Take one measurement of ρ; return whether Λ's memory was halved."""
        self.num_above = self.num_above + 1 if not lag <= _LIMIT else 0
        if self.num_above < 2:
            return False
        self.num_above = 0
        loss.halve_memory()
        return True
