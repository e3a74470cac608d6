"""The first projections of a run that ordered them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mio_export.errors import UsageError
from mio_export.models import load_projector_encoder

Rows = npt.NDArray[np.float32]
Truncation = Callable[[Rows], Rows]


def truncations(run: Path, dims: Sequence[int]) -> dict[str, Truncation]:
    """Return, by the name of its row, what turns features into the first K projections, for each K of ``dims``.

    Each takes the backbone's features, shape (N, F), and gives projections, shape (N, K), in eval mode and float32.

    Raises:
        UsageError: the run holds no head or did not order its projections, or a K is not among them.
    """
    if not dims:
        return {}
    encoder = load_projector_encoder(run)
    head, spec = encoder.projector, encoder.spec.projector
    assert head is not None  # it was asked for
    assert spec is not None
    if not spec.ordered:
        raise UsageError(
            f"the projections of {run} have no order, so that the first ones are not the best ones"
            "; leave dims out, or train with --objective minc --set loss.ordered=true"
        )
    outside = [dim for dim in dims if not 1 <= dim <= spec.output_dim]
    if outside:
        raise UsageError(
            f"dims must be 1 to {spec.output_dim}, the width of the projections of {run}; got {outside[0]}"
        )

    @torch.inference_mode()
    def project(features: Rows, dim: int) -> Rows:
        projections: torch.Tensor = head(torch.from_numpy(features))
        return projections[:, :dim].numpy()

    return {f"first {dim} projections": partial(project, dim=dim) for dim in dims}
