"""SimCLR's objective, from lightly."""

import math

from lightly.loss import NTXentLoss
from torch import Tensor

from mio_export.errors import UsageError
from mio_export.train.objectives.base import Objective, Quantity
from mio_export.train.objectives.distributed import require_equal_batches, world_size
from mio_export.train.objectives.norms import at_least_float32


class SimCLRLoss(Objective):
    """NT-Xent: each view must name its partner among the 2N − 1 other views of the batch, of all processes.

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1; lightly's ``NTXentLoss``.

    Args:
        temperature: > 0.

    Raises:
        UsageError: ``temperature`` is not positive.
    """

    information = Quantity(
        title="Mutual information, nats",
        meaning="ln(2N − 1) − L, a lower bound (InfoNCE) of what the two views tell of each other. Should rise; for N"
        " images in a batch it cannot pass ln(2N − 1).",
    )

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if temperature <= 0:
            raise UsageError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature

    def forward(self, projections_0: Tensor, projections_1: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor.

        Args:
            projections_0: projections of the first views, shape (N, D), floating, N ≥ 2.
            projections_1: projections of the second views, same shape and dtype.
        """
        if len(projections_0) < 2:
            raise UsageError(f"SimCLR needs at least 2 images in a batch, got {len(projections_0)}")
        require_equal_batches(projections_0, "SimCLR")
        nt_xent = NTXentLoss(self.temperature, gather_distributed=world_size() > 1)
        loss: Tensor = nt_xent(at_least_float32(projections_0), at_least_float32(projections_1))
        return loss

    def mutual_information(self, value: float, *, num_images: int) -> float:
        """Return the InfoNCE lower bound ln(2N − 1) − L of the mutual information, in nats (arXiv 1807.03748)."""
        return math.log(2 * num_images - 1) - value
