"""Gaussian blur of a batch, each image with a deviation of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mio_export.train.views.config import ViewConfig
from mio_export.train.views.draws import chance, rows_to_change, uniform
from mio_export.train.views.separable import filtered

_NO_BLUR = 1e-3


def random_blur(pixels: Tensor, config: ViewConfig, generator: torch.Generator, *, view: int) -> Tensor:
    """Blur the images drawn for it, in place; ``view`` (0 or 1) selects the probability."""
    probability = config.blur_probability[view]
    if probability == 0:
        return pixels
    drawn = chance(len(pixels), probability, generator)
    sigma = uniform(len(pixels), *config.blur_sigma, generator).where(drawn, _NO_BLUR)
    rows = rows_to_change(drawn)
    pixels[rows] = blur(pixels[rows], sigma[rows].view(-1))
    return pixels


def blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with a Gaussian, mirrored at the edges; torchvision's ``gaussian_blur`` to rounding.

    The kernel is SimCLR's: a tenth of the shorter side wide, made odd, at least 3 and so 23 at 224 px. At 32 px it is 3
    wide, which cuts a wide Gaussian to nearly a box.

    Args:
        pixels: shape (N, C, H, W).
        sigma: deviation in pixels, shape (N,).

    Source: SimCLR, appendix A (arXiv 2002.05709), and ``random_blur`` in github.com/google-research/simclr.
    """
    height, width = pixels.shape[2:]
    radius = max(1, min(height, width) // 20)
    distance = torch.arange(-radius, radius + 1, device=pixels.device) / sigma.view(-1, 1)
    kernels = (distance.square() / -2).softmax(dim=1)
    return filtered(pixels, _banded(kernels, height), _banded(kernels, width))


def _banded(kernels: Tensor, num_pixels: int) -> Tensor:
    """Return kernels, shape (N, K), as weights of every pixel in every other, shape (N, pixels, pixels)."""
    num_images, kernel_size = kernels.shape
    positions = torch.arange(num_pixels, dtype=torch.float32, device=kernels.device)
    mirrored = F.pad(positions.view(1, 1, -1), [kernel_size // 2] * 2, mode="reflect").view(-1).long()
    sources = F.one_hot(mirrored.unfold(0, kernel_size, 1), num_pixels).to(kernels.dtype)  # (target, K, source)
    return (kernels @ sources.permute(1, 2, 0).reshape(kernel_size, -1)).view(num_images, num_pixels, num_pixels)


__all__ = ["blur", "random_blur"]
