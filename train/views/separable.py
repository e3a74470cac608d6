"""Filters that work on rows and columns one after the other, each image with its own."""

import torch
from torch import Tensor


def filtered(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Filter images along both axes by batched matrix products.

    On a CPU this takes half the time of ``grid_sample`` for small images, and one form serves resizing and blur.

    Args:
        pixels: shape (N, C, H, W).
        rows: weight of each of H rows in each row of the result, shape (N, H, height).
        columns: weight of each of W columns in each column of the result, shape (N, W, width).

    Returns:
        Shape (N, C, height, width).
    """
    num_images, num_channels, height, width = pixels.shape
    narrowed = pixels.reshape(num_images, num_channels * height, width).bmm(columns)
    return torch.matmul(
        rows.mT.contiguous().unsqueeze(1), narrowed.view(num_images, num_channels, height, columns.shape[2])
    )


__all__ = ["filtered"]
