"""``torch.export`` artifacts: ``.pt2``, which PyTorch puts in TorchScript's place."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from mio_export.errors import GateError, one_line
from mio_export.runtimes.pt2_archive import read_pt2
from mio_export.runtimes.torch_eager import TorchRuntime


def open_pt2(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> TorchRuntime:
    """Load a ``.pt2`` file; there are no options.

    Raises:
        GateError: the file is no exported program, or holds anything that could run code.
    """
    del options
    archive = read_pt2(artifact)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(archive)
            if device != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
    except Exception as error:  # noqa: BLE001 - a damaged archive raises whatever its first reader does
        raise GateError(f"{artifact} is no .pt2 that loads: {one_line(error)}") from None
    return TorchRuntime(program.module(), image_shape=image_shape, embedding_dim=embedding_dim, device=device)
