"""An encoder as an ONNX file, through PyTorch's dynamo exporter."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mio_export.errors import MioError
from mio_export.models import Encoder

OPSET = 20
MAX_INLINE_BYTES = 1_900_000_000


def onnx_from_encoder(encoder: Encoder, path: Path, *, max_batch: int, provenance: str) -> dict[str, str]:
    """Write an ONNX file: input ``images`` uint8 (batch, H, W, C), output ``embeddings`` float32 (batch, D).

    The batch dimension is dynamic, cast and normalisation are in the graph, and no path of this machine is in the file.

    Args:
        encoder: in eval mode, on the CPU.
        path: where to write.
        max_batch: largest batch that the graph must take.
        provenance: JSON text for the model's metadata.

    Returns:
        Versions of the libraries that wrote it.

    Raises:
        MioError: the model cannot be captured, or is too large for one file.
    """
    example = torch.zeros((2, *encoder.preprocess.shape), dtype=torch.uint8)
    # a traced batch of 1 would be specialised, so the declared range starts at 1 and the example is 2
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise MioError(
            f"{encoder.spec.backbone} cannot be exported to ONNX: {' '.join(str(error).split())[:300]}"
        ) from error
    assert program is not None  # it is None only for the exporter before dynamo
    model = program.model_proto
    _strip_build_paths(model)
    model.metadata_props.add(key="mio-export", value=provenance)
    if model.ByteSize() > MAX_INLINE_BYTES:
        raise MioError(
            f"{encoder.spec.backbone} makes an ONNX graph of {model.ByteSize():,} bytes, more than one file holds"
        )
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")}


def _strip_build_paths(model: Any) -> None:
    """Remove what the exporter notes of each node, stack traces with this machine's paths among it."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
    for part in (*graph.node, *graph.initializer):
        part.doc_string = ""


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter's own progress log."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
