"""An encoder as a ``.pt2`` file, the format of ``torch.export``."""

import logging
import warnings
from pathlib import Path
from typing import Literal

import torch

from mio_export.bundle.provenance import KEY
from mio_export.errors import MioError, one_line
from mio_export.exporting.traceable import Traceable
from mio_export.models import Encoder
from mio_export.runtimes.pt2_archive import write_pt2


def pt2_from_encoder(
    encoder: Encoder, path: Path, *, precision: Literal["fp32", "bf16"], max_batch: int, provenance: str
) -> None:
    """Write a ``.pt2`` file that takes uint8 (batch, H, W, C) and gives float32 (batch, D); it holds no pickle.

    Args:
        encoder: in eval mode, on the CPU.
        path: where to write.
        precision: what it computes in.
        max_batch: largest batch.
        provenance: JSON text for the extra file ``mio-export.json``.

    Raises:
        MioError: ``torch.export`` cannot capture the encoder.
        GateError: it needs more than ATen operators.
    """
    raw = path.with_name(f"raw.{path.name}")
    example = torch.zeros((2, *encoder.preprocess.shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    logging.getLogger("torch.export").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(Traceable(encoder, precision), (example,), dynamic_shapes=({0: batch},))
            torch.export.save(program, raw, extra_files={f"{KEY}.json": provenance})
    except Exception as error:
        raise MioError(f"{encoder.spec.backbone} cannot be captured by torch.export: {one_line(error)}") from error
    write_pt2(raw, path)
    raw.unlink()
