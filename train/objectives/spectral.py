"""The spectral contrastive objective."""

from torch import Tensor

from mio_export.errors import UsageError
from mio_export.train.objectives.base import Objective, Quantity
from mio_export.train.objectives.distributed import JoinedBatch
from mio_export.train.objectives.norms import Norm, apply_norm, check_norm


class SpectralContrastiveLoss(Objective):
    """The spectral contrastive loss, which MINC estimates without pairs.

    ::

        L = −2 · mean_i φ₀ᵢᵀφ₁ᵢ + mean_{i≠j} (φ₀ᵢᵀφ₁ⱼ)²

    With R processes, j runs over the images of all of them.

    Source: HaoChen et al. 2021, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss"
    (arXiv 2106.04156), section 3, without its division by the scale.

    Args:
        scale: s of the norm rule, > 0 (called μ by the authors).
        norm: ``"sphere"``, ``"ball"`` (the authors' choice) or ``"none"``.

    Raises:
        UsageError: ``scale`` is not positive.
    """

    information = Quantity(
        title="Mutual information, χ²",
        meaning="−L − 1, a lower bound of what the two views tell of each other. Should rise.",
    )

    def __init__(self, scale: float = 1.0, norm: Norm = "ball") -> None:
        super().__init__()
        check_norm(norm, scale)
        self.scale = scale
        self.norm: Norm = norm

    def forward(self, projections_0: Tensor, projections_1: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor.

        Args:
            projections_0: projections of the first views, shape (N, D), floating, N ≥ 2.
            projections_1: projections of the second views, same shape and dtype.
        """
        batch = JoinedBatch.of(projections_0)
        num_images = batch.num_images
        if num_images < 2:
            raise UsageError(f"the spectral loss needs at least 2 images in a batch, got {num_images}")
        phi0 = apply_norm(projections_0, self.norm, self.scale)
        phi1 = apply_norm(projections_1, self.norm, self.scale)
        positives = (phi0 * phi1).sum(dim=1)
        squares = (phi0 @ batch.gather(phi1).T).square().sum() - positives.square().sum()
        attraction = -2 * batch.share(positives.sum(), num_images)
        return attraction + batch.share(squares, num_images * (num_images - 1))

    def mutual_information(self, value: float, *, num_images: int) -> float:
        """Return the lower bound −L − 1 of the χ² mutual information of the views, from the value of the loss."""
        del num_images
        return -value - 1
