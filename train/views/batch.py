"""From a batch of images to its views."""

import torch
from torch import Tensor

from mio_export.train.views.blur import random_blur
from mio_export.train.views.color import random_grayscale, random_jitter, random_solarize
from mio_export.train.views.config import ViewConfig
from mio_export.train.views.draws import chance
from mio_export.train.views.geometry import crop_and_flip, crop_boxes


def two_views(
    images: Tensor, config: ViewConfig, generator: torch.Generator, *, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return two independent views of every image.

    Args:
        images: uint8, shape (N, H, W, C), C being 1 or 3.
        config: how views are drawn.
        generator: the only source of randomness, on the images' device.
        size: side of the views in pixels, where the images are stored larger; None: the images' own height and width.

    Returns:
        Two tensors of shape (N, C, H, W), or (N, C, size, size), float32, in [0, 255].
    """
    pixels = images.permute(0, 3, 1, 2).float()
    first = random_view(pixels, config, generator, view=0, size=size)
    return first, random_view(pixels, config, generator, view=1, size=size)


def random_view(
    pixels: Tensor, config: ViewConfig, generator: torch.Generator, *, view: int = 0, size: int | None = None
) -> Tensor:
    """Return one view of every image.

    Crop and flip, colour jitter, greyscale, blur, solarise, in BYOL's order (arXiv 2006.07733, appendix B).

    Args:
        pixels: float32 in [0, 255], shape (N, C, H, W), C being 1 or 3; it is not changed.
        config: how views are drawn.
        generator: the only source of randomness, on the pixels' device.
        view: 0 for the first view, 1 for the second: blur and solarise have a probability for each.
        size: side of the view in pixels; None: as the pixels.

    Returns:
        Shape (N, C, H, W), or (N, C, size, size), float32 in [0, 255].
    """
    num_images, _, height, width = pixels.shape
    with torch.autocast(pixels.device.type, enabled=False):  # half precision would move crops and round pixels
        boxes = crop_boxes(num_images, height, width, config, generator)
        flips = chance(num_images, config.flip_probability, generator).view(-1)
        views = crop_and_flip(pixels, boxes, flips, height=size or height, width=size or width)
        views = random_jitter(views, config, generator)
        views = random_grayscale(views, config, generator)
        views = random_blur(views, config, generator, view=view)
        return random_solarize(views, config, generator, view=view)


__all__ = ["random_view", "two_views"]
