"""What every backend has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from mio_export.decoding import Decoder
from mio_export.errors import UsageError
from mio_export.preprocess import Pixels, Preprocess
from mio_export.runtimes.image_files import ImageFile, embed_image_files, numbered

Embeddings = npt.NDArray[np.float32]
_BATCH_SIZE = 32


class Runtime(ABC):
    """A loaded artifact that embeds images; a context manager.

    A new backend is one file: a subclass with ``_run`` and a function that opens it, and one line in
    ``runtimes.BACKENDS``.
    """

    preprocess: Preprocess | None = None
    """The contract of its bundle; None for an artifact that was opened without one."""
    max_batch: int = 1
    """The largest batch that the artifact was proved at."""

    def __init__(self, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str) -> None:
        self.image_shape = image_shape
        self.embedding_dim = embedding_dim
        self.device = device

    def embed(self, images: Pixels) -> Embeddings:
        """Embed a batch.

        Args:
            images: uint8, shape (N, H, W, C), N ≥ 1, as the bundle's preprocessing decodes them.

        Returns:
            float32, shape (N, D).

        Raises:
            UsageError: the array has another dtype or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape or not len(images):
            height, width, channels = self.image_shape
            raise UsageError(
                f"images must be uint8 of shape (N, {height}, {width}, {channels}), got {images.dtype} {images.shape}"
            )
        return self._run(np.require(images, requirements=["C", "W"]))

    def embed_files(self, files: Sequence[ImageFile]) -> tuple[Embeddings, list[str | None]]:
        """Embed image files, decoded in full under the bundle's contract, as ``mio embed`` decodes them.

            vectors, errors = runtime.embed_files(["cat.jpg", "dog.png"])

        Args:
            files: paths, or the whole bytes of each; any type that ``Preprocess`` takes, one or more.

        Returns:
            float32, shape (N, D), NaN where an image failed; and the reason of each, None where it did not.

        Raises:
            UsageError: there is no file, or the artifact was opened without its bundle.
            OutOfMemoryError: there is not enough memory to decode a file.
        """
        if self.preprocess is None:
            raise UsageError("the artifact was opened without its bundle, which says how files are decoded")
        with Decoder(self.preprocess) as decoder:
            vectors, reasons = embed_image_files(self, files, decoder, batch_size=min(_BATCH_SIZE, self.max_batch))
        return vectors, numbered(reasons)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether the artifact itself, without the check above, takes uint8 zeros of a shape."""
        try:
            self._run(np.zeros(shape, np.uint8))
        except Exception:  # noqa: BLE001 - backends refuse with whatever they have
            return False
        return True

    @abstractmethod
    def _run(self, images: Pixels) -> Embeddings:
        """Embed a checked, contiguous, writable batch; what comes out is returned as it is."""

    def close(self) -> None:  # noqa: B027 - most backends hold nothing that needs it
        """Release what the backend holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
