"""MIO: the binary contrastive objective."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mio_export.errors import UsageError
from mio_export.train.objectives.base import Objective, Quantity
from mio_export.train.objectives.distributed import JoinedBatch
from mio_export.train.objectives.norms import at_least_float32


class MIOLoss(Objective):
    """Two separately averaged binary cross-entropies over all pairs of views, plus an L2 term between positives.

    With ẑ the normalised projections, S all cosines of the 2N views, positives the 2N pairs of views of one image and
    negatives the 2N·(2N−2) other off-diagonal entries::

        L = mean softplus(−S⁺/τ⁺) + mean softplus(S⁻/τ⁻) + λ · mean over N·D of (ẑ₀ − ẑ₁)²

    Memory is O(N · block_size): each block of rows of S is computed again in the backward pass instead of being kept,
    and only from the diagonal on, since S is symmetric; that is faster than the whole matrix, too. With R processes the
    negatives are the views of all of them, each process taking the rows of its own views.

    Source: arXiv 2111.12664 v1. At τ = 0.5 and λ = 0 an untrained network lies near 2 ln 2 = 1.386, a collapsed one at
    2.254, and perfect positives with orthogonal negatives give 0.820.

    Args:
        temperature: τ⁺, > 0.
        negative_temperature: τ⁻, > 0; ``None`` means τ⁺.
        regularizer: λ, ≥ 0.
        block_size: rows of S held at once, ≥ 1.

    Raises:
        UsageError: a temperature or ``block_size`` is not positive, or λ is negative.
    """

    information = Quantity(
        title="Mutual information, nats",
        meaning="ln 2 − L/2, for τ⁺ = τ⁻ a lower bound (Jensen-Shannon) of what the two views tell of each other."
        " Should rise from 0; 0.69 is the most.",
    )

    def __init__(
        self,
        temperature: float = 0.5,
        negative_temperature: float | None = None,
        regularizer: float = 1.0,
        *,
        block_size: int = 512,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.negative_temperature = temperature if negative_temperature is None else negative_temperature
        self.regularizer = regularizer
        self.block_size = block_size
        if not (self.temperature > 0 and self.negative_temperature > 0):
            raise UsageError(f"temperatures must be above 0, got {temperature} and {self.negative_temperature}")
        if regularizer < 0:
            raise UsageError(f"regularizer must be 0 or more, got {regularizer}")
        if block_size < 1:
            raise UsageError(f"block_size must be 1 or more, got {block_size}")

    def forward(self, projections_0: Tensor, projections_1: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor.

        Args:
            projections_0: projections of the first views, shape (N, D), floating, N ≥ 2.
            projections_1: projections of the second views, same shape and dtype.
        """
        batch = JoinedBatch.of(projections_0)
        if batch.num_images < 2:
            raise UsageError(f"MIO needs at least 2 images in a batch (there are no negatives), got {batch.num_images}")
        z0, z1 = (F.normalize(at_least_float32(z), dim=1) for z in (projections_0, projections_1))
        positives = (z0 * z1).sum(dim=1)
        attraction = batch.share(F.softplus(-positives / self.temperature).sum(), batch.num_images)
        repulsion = batch.share(
            self._repulsion_sum(torch.cat([z0, z1]), positives, batch),
            2 * batch.num_images * (2 * batch.num_images - 2),
        )
        distance = batch.share((z0 - z1).square().sum(), z0.shape[1] * batch.num_images)
        return attraction + repulsion + self.regularizer * distance

    def mutual_information(self, value: float, *, num_images: int) -> float:
        """Return the Jensen-Shannon lower bound of the views' mutual information, in nats, from the value of the loss.

        For τ⁺ = τ⁻, a binary cross-entropy between joint and product pairs is at least 2 ln 2 − 2·JSD, so
        JSD ≥ ln 2 − L/2 (the L2 term only lowers it). 0 means that nothing was learned; ln 2 = 0.693
        is the largest possible value.
        """
        del num_images
        return math.log(2) - value / 2

    def _repulsion_sum(self, views: Tensor, positives: Tensor, batch: JoinedBatch) -> Tensor:
        """Sum softplus(S/τ⁻) over the negatives of this process's views: all pairs, less the diagonal and positives."""
        num_views = views.shape[0]
        alone = batch.num_processes == 1
        others = views if alone else torch.cat([batch.gather(half) for half in views.chunk(2)])
        total = views.new_zeros(())
        for start in range(0, num_views, self.block_size):
            block = views[start : start + self.block_size]
            rest = others[start:] if alone else others
            if self.block_size < num_views and torch.is_grad_enabled():
                term = checkpoint(self._block_sum, block, rest, alone, use_reentrant=False, preserve_rng_state=False)
            else:
                term = self._block_sum(block, rest, alone)
            total = total + term
        diagonal = views.square().sum(dim=1)
        not_negative = 2 * self._softplus(positives).sum() + self._softplus(diagonal).sum()
        return total - not_negative

    def _block_sum(self, block: Tensor, rest: Tensor, symmetric: bool) -> Tensor:
        """Sum over a block of rows, shape (B, D), and all pairs of it with ``rest``.

        Where ``rest`` begins with the block itself, S is symmetric, and what lies right of the block counts for its
        mirror image too.
        """
        values = self._softplus(block @ rest.T)
        return 2 * values.sum() - values[:, : len(block)].sum() if symmetric else values.sum()

    def _softplus(self, cosines: Tensor) -> Tensor:
        return F.softplus(cosines / self.negative_temperature)
