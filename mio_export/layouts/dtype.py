"""The dtype of the vectors that are written, and what it costs."""

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mio_export.errors import GateError

DType: TypeAlias = Literal["float32", "float16"]


class Cast:
    """To the dtype asked for; remembers how far that moved the vectors.

    Attributes:
        min_cosine: between a vector and its float16, the least so far; None for float32.
    """

    def __init__(self, dtype: DType) -> None:
        self.dtype = np.dtype(dtype)
        self.min_cosine: float | None = None if dtype == "float32" else 1.0

    def __call__(self, vectors: npt.NDArray[np.float32], keys: pa.Array) -> npt.NDArray[Any]:
        """Cast vectors, shape (N, D).

        Raises:
            GateError: a value is too large; its key is named.
        """
        if self.min_cosine is None:
            return vectors
        with np.errstate(over="ignore"):
            cast: npt.NDArray[Any] = vectors.astype(self.dtype)
        too_large = ~np.isfinite(cast).all(axis=1)
        if too_large.any():
            row = int(too_large.argmax())
            raise GateError(
                f"{keys[row]} has a value of {np.abs(vectors[row]).max():,.0f}, too large for float16"
                f" (at most {np.finfo(np.float16).max:,.0f}); use float32"
            )
        self.min_cosine = min(self.min_cosine, float(_cosines(vectors, cast).min(initial=1)))
        return cast


def _cosines(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair of rows; of two zeros it is 1, of one 0."""
    products, squares_a, squares_b = (
        np.einsum("nd,nd->n", x, y, dtype=np.float64) for x, y in ((a, b), (a, a), (b, b))
    )
    norms = np.sqrt(squares_a) * np.sqrt(squares_b)
    cosines: npt.NDArray[np.float64] = np.divide(
        products, norms, out=(squares_a == squares_b).astype(np.float64), where=norms > 0
    )
    return cosines
