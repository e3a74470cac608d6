"""The objective of BYOL and SimSiam: predict one view from the other, without negatives."""

import torch
from lightly.loss import NegativeCosineSimilarity
from torch import Tensor

from mio_export.train.objectives.base import Objective
from mio_export.train.objectives.distributed import require_equal_batches
from mio_export.train.objectives.norms import at_least_float32


class PredictionLoss(Objective):
    """The negative cosine between a prediction of one view and the other view's target, over both orders.

    −1 is perfect, and a collapse to one point reaches it too: it is the predictor, and for BYOL the slow target, that
    keep training from getting there. Watch the rank, not the loss. It bounds no mutual information.

    Source: Grill et al. 2020 (BYOL, arXiv 2006.07733), equation 2, up to scale and offset; Chen and He 2020 (SimSiam,
    arXiv 2011.10566), equations 1 to 4; lightly's ``NegativeCosineSimilarity``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = NegativeCosineSimilarity()

    def forward(self, predictions_0: Tensor, predictions_1: Tensor, target_0: Tensor, target_1: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor.

        Args:
            predictions_0: predictions from the first views, shape (N, D), floating.
            predictions_1: predictions from the second views, same shape.
            target_0: projections of the first views, same shape; no gradient flows into them.
            target_1: projections of the second views, same shape.
        """
        require_equal_batches(predictions_0, "prediction without negatives (byol, linear-byol, simsiam)")
        orders = ((predictions_0, target_1), (predictions_1, target_0))
        return torch.stack(
            [self.loss(at_least_float32(p), at_least_float32(target.detach())) for p, target in orders]
        ).mean()
