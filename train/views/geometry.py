"""Where a view is taken from its image: crop, size and flip."""

import math

import torch
from torch import Tensor

from mio_export.train.views.config import ViewConfig
from mio_export.train.views.separable import filtered

_CROP_TRIES = 10


def crop_boxes(num_images: int, height: int, width: int, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Draw one crop for each image, as torchvision's RandomResizedCrop does, but not rounded to whole pixels.

    Ten tries for a crop that fits into the image; after them the whole image, cut to an aspect that is allowed.

    Returns:
        Shape (N, 4), float32: left, top, width and height as shares of the image's width and height.
    """
    device = generator.device
    low, high = config.crop_area
    area = low + (high - low) * torch.rand(num_images, _CROP_TRIES, generator=generator, device=device)
    low, high = math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1])
    aspect = (low + (high - low) * torch.rand(num_images, _CROP_TRIES, generator=generator, device=device)).exp()
    aspect *= height / width  # of shares, no longer of pixels
    widths, heights = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = (widths <= 1) & (heights <= 1)
    first = fits.byte().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    w = torch.where(found, widths.gather(1, first).squeeze(1), min(1.0, config.crop_aspect[1] * height / width))
    h = torch.where(found, heights.gather(1, first).squeeze(1), min(1.0, width / height / config.crop_aspect[0]))
    offsets = torch.rand(num_images, 2, generator=generator, device=device)
    offsets = torch.where(found[:, None], offsets, 0.5)
    return torch.stack([offsets[:, 0] * (1 - w), offsets[:, 1] * (1 - h), w, h], dim=1)


def crop_and_flip(pixels: Tensor, boxes: Tensor, flips: Tensor, *, height: int, width: int) -> Tensor:
    """Resize each image's box to the given size, bilinearly.

    Where a box is shrunk, the filter widens with it, so that nothing aliases however large the stored images are:
    torchvision's ``antialias=True``, which is also what Pillow does. At a box's edge the filter sees the pixels beyond,
    as Pillow's ``Image.resize(box=...)``.

    Args:
        pixels: float32, shape (N, C, H, W).
        boxes: shape (N, 4), as ``crop_boxes`` gives them.
        flips: bool, shape (N,); true for a box that is mirrored.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        A new tensor of shape (N, C, height, width).
    """
    left, top, box_width, box_height = boxes.unbind(dim=1)
    columns = _weights(
        torch.where(flips, left + box_width, left), torch.where(flips, -box_width, box_width), pixels.shape[3], width
    )
    rows = _weights(top, box_height, pixels.shape[2], height)
    return filtered(pixels, rows, columns)


def _weights(start: Tensor, extent: Tensor, num_source: int, num_target: int) -> Tensor:
    """Return the weight of every source pixel in every target pixel, shape (N, source, target).

    Args:
        start: where the first target pixel begins, as a share of the source; shape (N,).
        extent: how far the target pixels reach from there; negative where they run backwards; shape (N,).
        num_source: pixels of the source.
        num_target: pixels of the target.
    """
    step = (extent * (num_source / num_target)).view(-1, 1, 1)
    target = torch.arange(num_target, device=start.device) + 0.5
    centre = (start * num_source).view(-1, 1, 1) + step * target
    source = torch.arange(num_source, device=start.device).view(-1, 1) + 0.5
    distance = (source - centre).abs_()
    if num_target < num_source:
        distance /= step.abs().clamp(min=1)
    weights = distance.neg_().add_(1).clamp_(min=0)
    return weights.div_(weights.sum(dim=1, keepdim=True))


__all__ = ["crop_and_flip", "crop_boxes"]
