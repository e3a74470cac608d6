"""An encoder as an ONNX graph: captured by PyTorch's dynamo exporter, or on record by the TorchScript one."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from mio_export.bundle.provenance import KEY
from mio_export.errors import MioError, one_line
from mio_export.files import sha256_file
from mio_export.models import Encoder

OPSET = 22
_FALLBACK_OPSET = 20
MAX_INLINE_BYTES = 1_900_000_000
"""A larger graph keeps its weights in one file beside it: protobuf ends at 2 GB."""
_MIN_EXTERNAL_BYTES = 1024

Exporter = Literal["dynamo", "torchscript"]


def onnx_from_encoder(encoder: Encoder, *, max_batch: int) -> tuple[onnx.ModelProto, Exporter]:
    """Capture a graph: input ``images`` uint8 (batch, H, W, C), output ``embeddings`` float32 (batch, D).

    The batch dimension is dynamic, cast and normalisation are in the graph, and no path of this machine is in it.

    Args:
        encoder: in eval mode, on the CPU.
        max_batch: largest batch that the graph must take.

    Returns:
        The graph, and which of PyTorch's exporters captured it: the second is tried where the first fails.

    Raises:
        MioError: neither can.
    """
    capturable = _Capturable(encoder).eval()
    example = torch.zeros((2, *encoder.preprocess.shape), dtype=torch.uint8)
    with warnings.catch_warnings(), _quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        try:
            return _stripped(_by_dynamo(capturable, example, max_batch)), "dynamo"
        except Exception as error:  # noqa: BLE001 - the exporter raises whatever a model's own code leads it to
            reason = _reason(error)
        try:
            return _stripped(_by_torchscript(capturable, example)), "torchscript"
        except Exception as error:
            raise MioError(f"{encoder.spec.backbone} cannot be exported to ONNX: {reason}") from error


def save_onnx(model: onnx.ModelProto, path: Path, *, provenance: str) -> dict[str, str]:
    """Write a graph, with its weights beside it if it is too large for one file.

    Args:
        model: the graph; it is changed.
        path: where to write.
        provenance: JSON text for the model's metadata.

    Returns:
        The other file's name and sha256, if there is one.
    """
    model.metadata_props.add(key=KEY, value=provenance)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if weights <= MAX_INLINE_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
        return {}
    name = f"{path.name}.data"
    (path.parent / name).unlink(missing_ok=True)  # the library appends
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=name,
        size_threshold=_MIN_EXTERNAL_BYTES,
    )
    return {name: sha256_file(path.parent / name)}


class _Capturable(nn.Module):
    """An encoder whose graph the runtimes compute fast; the numbers are the encoder's own, operation by operation.

    Mean and std are repeated for every pixel of a row: ONNX Runtime is slow to broadcast three numbers. The images are
    copied into channels-first order: PyTorch captures pooling of a transposed view as a gather over the batch, which
    keeps OpenVINO from fusing the first convolution. Together they make int8 a quarter faster in both.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        shape = encoder.preprocess.shape[1:]
        self.register_buffer("mean", encoder.mean.view(-1).expand(shape).clone())
        self.register_buffer("std", encoder.std.view(-1).expand(shape).clone())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # cast first: TensorRT transposes no uint8
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        return self.encoder.embed_normalized(pixels.permute(0, 3, 1, 2).contiguous())


def _reason(error: BaseException) -> str:
    """What the model's code raised, below the exporter's own advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _by_dynamo(module: nn.Module, example: torch.Tensor, max_batch: int) -> onnx.ModelProto:
    # a traced batch of 1 would be specialised, so the declared range starts at 1 and the example is 2
    batch = torch.export.Dim("batch", min=1, max=max(2, max_batch))
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    assert program is not None  # it is None only for the exporter before dynamo
    return program.model_proto


def _by_torchscript(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    buffer: Any = io.BytesIO()  # it is typed for paths only, and takes both
    torch.onnx.export(
        module,
        (example,),
        buffer,
        dynamo=False,
        opset_version=_FALLBACK_OPSET,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_axes={"images": {0: "batch"}, "embeddings": {0: "batch"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what the exporter notes of each node, stack traces with this machine's paths among it."""
    graph: Any = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
    for part in (*graph.node, *graph.initializer):
        part.doc_string = ""
    return model


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence the exporter's own progress log."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
