"""What every artifact is held to: the encoder itself, in float64, on real images."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mio_export.bundle import Precision
from mio_export.evidence.budget import Budget, budget_for
from mio_export.models import Encoder
from mio_export.parity.golden import golden_pixels, golden_sha256
from mio_export.parity.images import ParityImages
from mio_export.parity.report import Matrix, relative_errors, unfit
from mio_export.preprocess import Pixels

_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An encoder's embeddings of some images in float64, and how far its own float32 lies from them."""

    images: ParityImages
    embeddings: Matrix
    """Eager PyTorch on the CPU, float64, shape (N, D)."""
    golden: Mapping[str, Pixels]
    """Golden images by name."""
    golden_embeddings: Matrix
    """Float64, one row for each golden image."""
    own_rms_error: float
    """Root mean square over rows of the float32 encoder's relative error."""
    own_row_error: float
    """Largest relative error of a row of the float32 encoder."""
    images_per_s: float
    """Of the float32 encoder, in passing."""
    weights_sha256: str
    problems: tuple[str, ...]
    """Why the encoder itself is no reference, such as NaN or a model that is still in training mode."""

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        images: ParityImages,
        *,
        weights_sha256: str,
        golden: Mapping[str, Pixels] | None = None,
    ) -> "Reference":
        """Embed the images with the encoder itself, in float64 and in float32.

        Args:
            encoder: in eval mode, float32, on the CPU.
            images: what artifacts are compared on.
            weights_sha256: hash of the encoder's weights.
            golden: pixels of the golden images; None: what this machine decodes.
        """
        golden = golden or golden_pixels(encoder.preprocess)
        pixels = np.concatenate([images.pixels, np.stack(list(golden.values()))])
        exact = _in_float64(encoder, pixels)
        start = time.perf_counter()
        single = encoder.embed(pixels, batch_size=_BATCH_SIZE)
        seconds = time.perf_counter() - start
        again = encoder.embed(pixels[:_BATCH_SIZE], batch_size=_BATCH_SIZE)
        problems = unfit(exact, single)
        if not problems and not np.array_equal(again, single[:_BATCH_SIZE]):
            problems = ["the encoder gives other embeddings when it is asked again; its forward pass is random"]
        errors = relative_errors(exact, single) if not problems else np.full(len(pixels), math.inf)
        count = len(images.pixels)
        return cls(
            images=images,
            embeddings=exact[:count],
            golden=golden,
            golden_embeddings=exact[count:],
            own_rms_error=math.sqrt(float((errors**2).mean())),
            own_row_error=float(errors.max()),
            images_per_s=len(pixels) / seconds,
            weights_sha256=weights_sha256,
            problems=tuple(problems),
        )

    def budget(self, precision: Precision, required: Mapping[str, float]) -> Budget:
        """Return the bounds that an artifact of a precision is held to."""
        return budget_for(
            precision, own_rms_error=self.own_rms_error, own_row_error=self.own_row_error, required=required
        )

    @property
    def golden_sha256(self) -> str:
        """Hash of the golden images' pixels."""
        return golden_sha256(self.golden)


@torch.inference_mode()
def _in_float64(encoder: Encoder, pixels: Pixels) -> Matrix:
    # Once the count of threads was set, MKL splits float64 products in another way for the rest of the process: the
    # last bit moves, and two exports from one process would not be equal. So it is set here, before the first product.
    torch.set_num_threads(torch.get_num_threads())
    exact = copy.deepcopy(encoder).double().eval()
    batches = torch.from_numpy(pixels).split(_BATCH_SIZE)
    embeddings: Matrix = torch.cat([exact(batch) for batch in batches]).numpy()
    return embeddings
