"""Augmented views of a whole batch at once, on its device, every image with parameters of its own."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mio_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a view is drawn; the sampling rules are torchvision's, applied to a batch."""

    crop_area: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a crop takes, drawn uniformly."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop, drawn uniformly on the log scale."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip; set 0 for digits and text."""
    brightness: float = 0.4
    """Pixels are multiplied by a factor from 1 ± this."""
    contrast: float = 0.4
    """Deviations from the mean grey level are multiplied by a factor from 1 ± this."""
    saturation: float = 0.4
    """Deviations from grey are multiplied by a factor from 1 ± this; colour images only."""
    hue: float = 0.1
    """Turn of the hue circle, from ± this; colour images only."""
    jitter_probability: float = 0.4
    """Probability that an image's colours are jittered at all."""
    grayscale_probability: float = 0.2
    """Probability that a colour image loses its colour."""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        shares = {
            name: getattr(self, name) for name in ("flip_probability", "jitter_probability", "grayscale_probability")
        }
        checks = [
            (0 < low <= high <= 1, f"crop_area must be a range in (0, 1], got {self.crop_area}"),
            (0 < self.crop_aspect[0] <= self.crop_aspect[1], f"crop_aspect must be a range, got {self.crop_aspect}"),
            (0 <= self.hue <= 0.5, f"hue must be 0 to 0.5, got {self.hue}"),
            *((0 <= share <= 1, f"{name} must be 0 to 1, got {share}") for name, share in shares.items()),
            *(
                (getattr(self, name) >= 0, f"{name} must be 0 or more")
                for name in ("brightness", "contrast", "saturation")
            ),
        ]
        for holds, message in checks:
            if not holds:
                raise UsageError(f"views: {message}")


_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_CROP_TRIES = 10


def two_views(images: Tensor, config: ViewConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two independent views of every image.

    Args:
        images: uint8, shape (N, H, W, C), C being 1 or 3.
        config: how views are drawn.
        generator: the only source of randomness, on the images' device.

    Returns:
        Two tensors of shape (N, C, H, W), float32, in [0, 255].
    """
    pixels = images.permute(0, 3, 1, 2).float()
    views = random_view(torch.cat([pixels, pixels]), config, generator)
    first, second = views.chunk(2)
    return first, second


def random_view(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Return one view of every image; shape (N, C, H, W), float32 in [0, 255], as given."""
    views = crop_and_flip(pixels, crop_boxes(pixels, config, generator), _chance(pixels, config, generator))
    return jitter(views, config, generator)


def crop_boxes(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Draw one crop for each image, as torchvision's RandomResizedCrop does: ten tries, else the whole image.

    Returns:
        Shape (N, 4): left, top, width and height as shares of the image's width and height.
    """
    num_images, _, height, width = pixels.shape
    tries = (num_images, _CROP_TRIES)
    area = _uniform(tries, config.crop_area, pixels, generator) * (height * width)
    low, high = math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1])
    aspect = _uniform(tries, (low, high), pixels, generator).exp()
    widths, heights = (area * aspect).sqrt() / width, (area / aspect).sqrt() / height
    fits = (widths <= 1) & (heights <= 1)
    first = fits.float().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    w = torch.where(found, widths.gather(1, first).squeeze(1), 1.0)
    h = torch.where(found, heights.gather(1, first).squeeze(1), 1.0)
    offsets = torch.rand(num_images, 2, generator=generator, device=pixels.device)
    return torch.stack([offsets[:, 0] * (1 - w), offsets[:, 1] * (1 - h), w, h], dim=1)


def crop_and_flip(pixels: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Resize each image's box to the whole size, bilinearly, mirrored where ``flips`` (bool, shape (N,)) says so."""
    left, top, width, height = boxes.unbind(dim=1)
    mirror = torch.where(flips, -1.0, 1.0)
    zero = torch.zeros_like(left)
    rows = (
        torch.stack([width * mirror, zero, 2 * left + width - 1], dim=1),
        torch.stack([zero, height, 2 * top + height - 1], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def jitter(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Jitter brightness and contrast of each image and, where there is colour, saturation, hue and greyscale."""
    original = pixels
    pixels = (pixels * _factor(config.brightness, pixels, generator)).clamp(0, 255)
    mean = _gray(pixels).mean(dim=(1, 2, 3), keepdim=True)
    pixels = ((pixels - mean) * _factor(config.contrast, pixels, generator) + mean).clamp(0, 255)
    if pixels.shape[1] == 3:
        gray = _gray(pixels)
        pixels = ((pixels - gray) * _factor(config.saturation, pixels, generator) + gray).clamp(0, 255)
        pixels = _turn_hue(pixels, config.hue, generator)
    pixels = torch.where(_mask(config.jitter_probability, pixels, generator), pixels, original)
    if pixels.shape[1] == 3:
        pixels = torch.where(_mask(config.grayscale_probability, pixels, generator), _gray(pixels), pixels)
    return pixels


def _turn_hue(pixels: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Rotate each image's chroma plane (YIQ) by an angle from ± ``amount`` of a full turn; luma stays."""
    angle = _uniform((pixels.shape[0],), (-amount, amount), pixels, generator) * (2 * math.pi)
    to_yiq = pixels.new_tensor(_YIQ)
    rotation = torch.eye(3, device=pixels.device).repeat(len(angle), 1, 1)
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 2, 1] = angle.sin()
    rotation[:, 1, 2] = -angle.sin()
    turn = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return torch.einsum("nij,njhw->nihw", turn, pixels).clamp(0, 255)


def _gray(pixels: Tensor) -> Tensor:
    """Luma (ITU-R 601), shape (N, 1, H, W)."""
    if pixels.shape[1] == 1:
        return pixels
    return (pixels * pixels.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], like: Tensor, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, device=like.device)


def _factor(amount: float, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """One factor from 1 ± amount for each image, shape (N, 1, 1, 1)."""
    return _uniform((pixels.shape[0], 1, 1, 1), (max(0.0, 1 - amount), 1 + amount), pixels, generator)


def _mask(probability: float, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """True with the given probability for each image, shape (N, 1, 1, 1)."""
    return torch.rand((pixels.shape[0], 1, 1, 1), generator=generator, device=pixels.device) < probability


def _chance(pixels: Tensor, config: ViewConfig, generator: torch.Generator) -> Tensor:
    return _mask(config.flip_probability, pixels, generator).view(-1)
