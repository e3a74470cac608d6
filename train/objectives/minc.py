"""MINC: the spectral optimum by power iteration, without pairwise comparisons."""

import torch
from torch import Tensor

from mio_export.errors import UsageError
from mio_export.train.objectives.base import Objective, Quantity
from mio_export.train.objectives.distributed import JoinedBatch, sum_over_processes
from mio_export.train.objectives.norms import Norm, apply_norm, check_norm
from mio_export.train.objectives.second_moment import LAG, SecondMomentMonitor


class MINCLoss(Objective):
    """MINC, as derived from the description in arXiv 2504.16667 and proved on a finite oracle (``tests/train``).

    The second-moment matrix Λ ≈ E[φ̄ φ̄ᵀ] of the target features stands for all other images, so that no pair is ever
    compared and the cost is O(N·D²). Per pair, averaged over both orders of the views::

        value        −2 φ̄(x)ᵀφ(x′) + φ(x′)ᵀ Λ φ(x′)
        gradient     2 · (−φ̄(x) + T(Λ) φ(x′))   with respect to φ(x′)

    T(Λ) = Λ is the subspace form (Oja). T(Λ) = tril(Λ) is the ordered form (the generalised Hebbian algorithm), whose
    columns come out sorted by eigenvalue. The value and the gradient differ on purpose: to differentiate φᵀ tril(Λ) φ
    would symmetrise the triangle and converge to another point.

    Λ is an exponential moving average over steps, uncentred and bias-corrected, that takes the batch's targets first
    and is then used. In ``eval`` mode it is left alone. β is a buffer, ``decay``, so that a run whose memory was halved
    resumes with it. With R processes Λ is summed over all of them, which exchanges D² numbers and no features, and each
    process weighs its images as part of the joined batch.

    Args:
        dim: D, the width of the projections.
        scale: s of the norm rule, > 0.
        norm: ``"sphere"``, ``"ball"`` or ``"none"``; statements on eigenvalues and order hold for ``"none"`` only.
        ordered: whether to use the ordered form.
        second_moment_decay: β of Λ, in [0, 1).

    Raises:
        UsageError: an argument is out of its range.
    """

    information = Quantity(
        title="Mutual information, χ²",
        meaning="−L − 1, an estimate, not a bound, of what the two views tell of each other. Should rise.",
    )
    monitored = LAG
    second_moment: Tensor
    weight: Tensor
    decay: Tensor

    def __init__(
        self,
        dim: int,
        scale: float = 10.0,
        norm: Norm = "sphere",
        ordered: bool = False,
        second_moment_decay: float = 0.9,
    ) -> None:
        super().__init__()
        check_norm(norm, scale)
        if not 0 <= second_moment_decay < 1:
            raise UsageError(f"second_moment_decay must be in [0, 1), got {second_moment_decay}")
        self.scale = scale
        self.norm: Norm = norm
        self.ordered = ordered
        self.register_buffer("second_moment", torch.zeros(dim, dim))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("decay", torch.tensor(second_moment_decay, dtype=torch.float64))

    def forward(self, online_0: Tensor, online_1: Tensor, target_0: Tensor, target_1: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor; in training mode, update Λ first.

        Args:
            online_0: online projections of the first views, shape (N, D), floating.
            online_1: online projections of the second views, same shape.
            target_0: target projections of the first views, same shape; no gradient flows into them.
            target_1: target projections of the second views, same shape.
        """
        batch = JoinedBatch.of(online_0)
        online = [self.features(z) for z in (online_0, online_1)]
        targets = [self.features(z.detach()) for z in (target_0, target_1)]
        if self.training:
            self._update(torch.cat(targets), 2 * batch.num_images)
        moment = self.corrected_second_moment(online[0].dtype)
        pairs = zip(targets, reversed(online), strict=True)
        halves = torch.stack([self._half(target, phi, moment) for target, phi in pairs])
        return batch.share(halves.sum(), 2 * batch.num_images)

    def mutual_information(self, value: float, *, num_images: int) -> float:
        """Return −L − 1, an estimate of the χ² mutual information of the views, from the value of the loss."""
        del num_images
        return -value - 1

    def monitor(self) -> SecondMomentMonitor:
        """Return the monitor of Λ."""
        return SecondMomentMonitor(self)

    def features(self, projections: Tensor) -> Tensor:
        """Return φ, what Λ is the second moment of, of projections, both of shape (N, D)."""
        return apply_norm(projections, self.norm, self.scale)

    @torch.no_grad()
    def halve_memory(self) -> None:
        """Halve 1/(1 − β), the number of steps that Λ remembers, down to the last one."""
        self.decay.copy_((2 * self.decay - 1).clamp_min(0))

    def _half(self, target: Tensor, phi: Tensor, moment: Tensor) -> Tensor:
        """One order of the views, summed: the value of the loss, with the gradient of one step of power iteration."""
        step = phi.detach() @ (moment.tril() if self.ordered else moment).T
        value = (phi.detach() @ moment * phi.detach()).sum(dim=1)
        repulsion = 2 * (step * phi).sum(dim=1)
        return (-2 * (target * phi).sum(dim=1) + repulsion + (value - repulsion.detach())).sum()

    @torch.no_grad()
    def _update(self, targets: Tensor, count: int) -> None:
        """Take the second moment of this step's targets, shape (2n, D), ``count`` over all processes, into Λ."""
        self.second_moment = self.second_moment.to(torch.promote_types(self.second_moment.dtype, targets.dtype))
        targets = targets.to(self.second_moment.dtype)
        moment = sum_over_processes(targets.T @ targets / count)
        self.second_moment.lerp_(moment, (1 - self.decay).to(moment.dtype))
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)

    def corrected_second_moment(self, dtype: torch.dtype) -> Tensor:
        """Return Λ with the bias of its zero start removed, shape (D, D)."""
        return self.second_moment.to(dtype) / self.weight.to(dtype).clamp_min(torch.finfo(dtype).tiny)
