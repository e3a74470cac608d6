"""TorchScript artifacts (legacy: PyTorch deprecates the format, and Python 3.14 has no tracer)."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from mio_export.errors import GateError, one_line
from mio_export.runtimes.torch_eager import TorchRuntime


def open_torchscript(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> TorchRuntime:
    """Load a TorchScript file; there are no options.

    Raises:
        GateError: the file is no TorchScript.
    """
    del options
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit.load.* is deprecated", category=FutureWarning)
            module = torch.jit.load(str(artifact), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise GateError(f"{artifact} is not TorchScript that loads: {one_line(error)}") from None
    return TorchRuntime(module.eval(), image_shape=image_shape, embedding_dim=embedding_dim, device=device)
