"""What happens to a view's colours: jitter, greyscale, solarise."""

import torch
from torch import Tensor

from mio_export.train.views.config import ViewConfig
from mio_export.train.views.draws import chance, rows_to_change, uniform

_LUMA = (0.299, 0.587, 0.114)


def random_jitter(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Jitter brightness and contrast of the images drawn for it, in place; of colour images saturation and hue too.

    The order is fixed, where torchvision draws one for each image. Brightness, contrast and saturation commute wherever
    nothing is clipped to [0, 255], so an order of its own for each image changes little and would cost a pass for each
    of the four at each place; one drawn for the batch would tie its images together.

    Args:
        pixels: float32 in [0, 255], shape (N, C, H, W).
        config: how far and how often.
        generator: on the same device.
    """
    if config.jitter_probability == 0:
        return pixels
    num_images, is_colour = len(pixels), pixels.shape[1] == 3
    amounts = (config.brightness, config.contrast, *((config.saturation,) if is_colour else ()))
    factors = [uniform(num_images, max(0.0, 1 - amount), 1 + amount, generator) for amount in amounts]
    turns = uniform(num_images, -config.hue, config.hue, generator) if is_colour else None
    drawn = chance(num_images, config.jitter_probability, generator)
    rows = rows_to_change(drawn)
    part = pixels[rows]
    for adjust, amount, factor in zip((_brighten, _stretch, _saturate), amounts, factors, strict=False):
        if amount > 0:
            adjust(part, factor.where(drawn, 1.0)[rows])
    if turns is not None and config.hue > 0:
        part = turn_hue(part, turns.where(drawn, 0.0)[rows])
    pixels[rows] = part
    return pixels


def random_grayscale(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Replace the channels of the colour images drawn for it by their luma, in place."""
    if config.grayscale_probability == 0 or pixels.shape[1] == 1:
        return pixels
    drawn = chance(len(pixels), config.grayscale_probability, generator)
    rows = rows_to_change(drawn)
    part = pixels[rows]
    _saturate(part, 1 - drawn[rows].float())
    pixels[rows] = part
    return pixels


def random_solarize(pixels: Tensor, config: ViewConfig, generator: torch.Generator, *, view: int) -> Tensor:
    """Invert the bright pixels of the images drawn for it, in place; ``view`` (0 or 1) selects the probability."""
    probability = config.solarize_probability[view]
    if probability == 0:
        return pixels
    drawn = chance(len(pixels), probability, generator)
    rows = rows_to_change(drawn)
    part = pixels[rows]
    pixels[rows] = torch.where((part >= config.solarize_threshold) & drawn[rows], 255 - part, part)
    return pixels


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of colour images in HSV space, where value and saturation stay; torchvision's ``adjust_hue``.

    Args:
        pixels: float32, shape (N, 3, H, W).
        turns: share of the hue circle, shape (N, 1, 1, 1).

    Returns:
        A new tensor of the same shape.
    """
    red, green, blue = pixels.split(1, dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # With R, G, B as places between low (0) and high (1), a hue lies 1 - R + G + B sixths of the circle away from red,
    # on the side that the sign of G - B tells. To choose by the largest channel instead takes torch.where, which costs
    # ten times an addition on a CPU.
    from_red = high.sub_(red).add_(green).add_(blue).sub_(low, alpha=2).div_(chroma.clamp(min=1e-6).mul_(6))
    hue = torch.copysign(from_red, green - blue).add_(turns)
    hues = hue + pixels.new_tensor([0, -1 / 3, 1 / 3]).view(1, 3, 1, 1)  # as seen from red, green and blue
    distances = hues.sub_(hues.round()).abs_()
    return distances.mul_(-6).add_(2).clamp_(0, 1).mul_(chroma).add_(low)


def luma(pixels: Tensor) -> Tensor:
    """Return the grey level (ITU-R 601) of each pixel, shape (N, 1, H, W)."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    level: Tensor = red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return level


def _brighten(pixels: Tensor, factor: Tensor) -> None:
    pixels.mul_(factor).clamp_(0, 255)


def _stretch(pixels: Tensor, factor: Tensor) -> None:
    mean = luma(pixels).mean(dim=(1, 2, 3), keepdim=True)
    pixels.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def _saturate(pixels: Tensor, factor: Tensor) -> None:
    rest = luma(pixels).mul_(1 - factor)
    pixels.mul_(factor).add_(rest).clamp_(0, 255)


__all__ = ["luma", "random_grayscale", "random_jitter", "random_solarize", "turn_hue"]
