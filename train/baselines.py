"""What an encoder must beat: raw pixels and PCA."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mio_export.preprocess import Pixels

Embed = Callable[[Pixels], npt.NDArray[np.float32]]
"""From uint8 images (N, H, W, C) to float32 rows (N, D)."""

_PCA_DIM = 128
_LARGEST_RAW = 64
_SHRUNK = 32


def raw_pixels(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Return pixels in [0, 1] as rows; images above 64 px are averaged down to 32 px first, to fit in memory."""
    if pixels.shape[1] <= _LARGEST_RAW:
        rows = pixels.reshape(len(pixels), -1).astype(np.float32)
        rows /= 255
        return rows
    blocks = torch.from_numpy(pixels).split(256)
    small = [F.interpolate(block.permute(0, 3, 1, 2).float(), size=_SHRUNK, mode="area") for block in blocks]
    return torch.cat(small).flatten(1).div(255).numpy()


def fitted_pca(pixels: Pixels) -> Embed:
    """Fit PCA with at most 128 components on raw pixels; return what embeds with it."""
    from sklearn.decomposition import PCA

    rows = raw_pixels(pixels)
    pca = PCA(min(_PCA_DIM, *rows.shape), svd_solver="randomized", random_state=0).fit(rows)
    return lambda images: np.asarray(pca.transform(raw_pixels(images)), dtype=np.float32)
