"""One batch through a runtime, without losing it to one image or to a temporary lack of memory."""

from collections.abc import Sequence

import numpy as np

from mio_export.memory import lacks_memory
from mio_export.preprocess import Pixels
from mio_export.runtimes import Runtime
from mio_export.runtimes.base import Embeddings


class ImageMemoryError(Exception):
    """There is not enough memory for one image alone."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is not enough memory to embed {name} alone")
        self.name = name


def embed_carefully(runtime: Runtime, names: Sequence[str], images: Pixels) -> Embeddings:
    """Embed a batch; image by image if there is not enough memory for it, or if any value is NaN or infinite.

    So an image that overflows changes nothing of its neighbours' vectors, whatever a runtime computes over the batch.

    Args:
        runtime: what computes.
        names: of the images.
        images: uint8, shape (N, H, W, C).

    Returns:
        float32, shape (N, D); a row that is not finite is not finite for its image alone either.

    Raises:
        ImageMemoryError: there is not enough memory for one image.
    """
    try:
        embeddings = runtime.embed(images)
    except Exception as error:
        if not lacks_memory(error):
            raise
    else:
        if np.isfinite(embeddings).all() or len(images) == 1:
            return embeddings
    return np.concatenate([_alone(runtime, name, images[index : index + 1]) for index, name in enumerate(names)])


def _alone(runtime: Runtime, name: str, image: Pixels) -> Embeddings:
    try:
        return runtime.embed(image)
    except Exception as error:
        if lacks_memory(error):
            raise ImageMemoryError(name) from error
        raise


__all__ = ["ImageMemoryError", "embed_carefully"]
