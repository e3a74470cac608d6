"""ONNX artifacts in ONNX Runtime, on the CPU or, through its CUDA provider, on a GPU."""

from pathlib import Path
from typing import Any

from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.devices import num_threads

_ERROR_LEVEL = 3


class OnnxRuntime(Runtime):
    """One inference session."""

    def __init__(self, session: Any, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str) -> None:
        super().__init__(image_shape=image_shape, embedding_dim=embedding_dim, device=device)
        self._session = session
        self._input = session.get_inputs()[0].name
        self._output = session.get_outputs()[0].name

    def _run(self, images: Pixels) -> Embeddings:
        embeddings: Embeddings = self._session.run([self._output], {self._input: images})[0]
        return embeddings

    def close(self) -> None:
        """Drop the session and its memory."""
        self._session = None


def open_onnxruntime(
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str
) -> OnnxRuntime:
    """Load an ONNX file.

    Raises:
        MissingBackendError: ONNX Runtime, or its CUDA provider, is not there.
        GateError: the file is no ONNX graph that loads, or has not exactly one input and one output.
    """
    session = _session(artifact, device)
    counts = (len(session.get_inputs()), len(session.get_outputs()))
    if counts != (1, 1):
        raise GateError(f"{artifact} must have one input and one output, has {counts[0]} and {counts[1]}")
    return OnnxRuntime(session, image_shape=image_shape, embedding_dim=embedding_dim, device=device)


def _session(artifact: Path, device: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingBackendError("ONNX Runtime is not installed: pip install onnxruntime") from None
    onnxruntime.set_default_logger_severity(_ERROR_LEVEL)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERROR_LEVEL
    providers = _providers(onnxruntime, device)
    try:
        session = onnxruntime.InferenceSession(str(artifact), options, providers=providers)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
        raise GateError(f"{artifact} does not load in ONNX Runtime: {' '.join(str(error).split())[:300]}") from None
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise MissingBackendError(
            "ONNX Runtime could not start its CUDA provider here; use --device cpu, and see: mio doctor"
        )
    return session


def _providers(onnxruntime: Any, device: str) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if device != "cuda":
        raise UsageError(f"ONNX Runtime runs on cpu or cuda, got {device!r}")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingBackendError("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    onnxruntime.preload_dlls()
    # TF32 keeps 10 bits of mantissa; an fp32 artifact must not be computed with it
    return [("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]
