"""Random numbers, one for each image of a batch, from a given generator and on its device."""

import torch
from torch import Tensor


def uniform(num_images: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return a number from [low, high) for each image; shape (N, 1, 1, 1), float32."""
    return low + (high - low) * torch.rand(num_images, 1, 1, 1, generator=generator, device=generator.device)


def chance(num_images: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return, for each image, true with the given probability; shape (N, 1, 1, 1), bool."""
    return torch.rand(num_images, 1, 1, 1, generator=generator, device=generator.device) < probability


def rows_to_change(drawn: Tensor) -> Tensor | slice:
    """Return the images that a transform has to compute.

    On a CPU these are the images drawn. On a GPU they are all: to ask which were drawn would make the host wait for the
    device in every step, which costs more than the work saved. So each transform gives the images that were not drawn a
    parameter that changes nothing.

    Args:
        drawn: bool, shape (N, 1, 1, 1).
    """
    return drawn.view(-1).nonzero().squeeze(1) if drawn.device.type == "cpu" else slice(None)


__all__ = ["chance", "rows_to_change", "uniform"]
