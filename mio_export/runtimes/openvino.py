"""ONNX artifacts in OpenVINO, on the CPU; it may compute an fp32 graph in bf16 if told so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mio_export.errors import GateError, MissingBackendError, one_line
from mio_export.extras import install_command
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.devices import num_threads


class OpenVINORuntime(Runtime):
    """One compiled model."""

    def __init__(self, request: Any, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str) -> None:
        super().__init__(image_shape=image_shape, embedding_dim=embedding_dim, device=device)
        self._request = request

    def _run(self, images: Pixels) -> Embeddings:
        (embeddings,) = self._request.infer([images], share_inputs=True).values()
        copied: Embeddings = embeddings.copy()  # the next inference writes over what it gave
        return copied

    def close(self) -> None:
        """Drop the model and its memory."""
        self._request = None


def open_openvino(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> OpenVINORuntime:
    """Compile an ONNX file.

    Args:
        artifact: the file; external weights lie beside it.
        image_shape: (H, W, C).
        embedding_dim: D.
        device: ``cpu``.
        options: ``INFERENCE_PRECISION_HINT``: ``f32`` or ``bf16``.

    Raises:
        MissingBackendError: OpenVINO is not installed, or the device is not the CPU.
        GateError: the file is no ONNX graph that compiles.
    """
    try:
        import openvino
    except ImportError:
        raise MissingBackendError(f"OpenVINO is not installed: {install_command('openvino')}") from None
    if device != "cpu":
        raise MissingBackendError(f"OpenVINO runs on the CPU here, got device {device!r}")
    settings = {"INFERENCE_NUM_THREADS": num_threads(), "PERFORMANCE_HINT": "LATENCY", **options}
    try:
        model = openvino.Core().compile_model(str(artifact), "CPU", settings)
    except RuntimeError as error:
        raise GateError(f"{artifact} does not compile in OpenVINO: {one_line(error)}") from None
    return OpenVINORuntime(
        model.create_infer_request(), image_shape=image_shape, embedding_dim=embedding_dim, device=device
    )
