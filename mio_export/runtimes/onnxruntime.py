"""ONNX artifacts in ONNX Runtime, on the CPU or, through its CUDA and TensorRT providers, on a GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mio_export.errors import GateError, MissingBackendError, UsageError, one_line
from mio_export.extras import install_command
from mio_export.preprocess import Pixels
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.devices import num_threads

_FATAL = 4
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


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
    artifact: Path, *, image_shape: tuple[int, int, int], embedding_dim: int, device: str, options: Mapping[str, str]
) -> OnnxRuntime:
    """Load an ONNX file.

    Args:
        artifact: the file; external weights lie beside it.
        image_shape: (H, W, C).
        embedding_dim: D.
        device: ``cpu``, ``cuda``, or ``tensorrt`` for ONNX Runtime's TensorRT provider.
        options: ``graph_optimization_level``: ``all`` (the default), ``extended``, ``basic`` or ``disabled``.

    Raises:
        MissingBackendError: ONNX Runtime or the device's provider is not there, or lacks an operator of the graph.
        GateError: the file is no ONNX graph that loads, or has not exactly one input and one output.
    """
    session = open_session(str(artifact), name=str(artifact), device=device, options=options)
    counts = (len(session.get_inputs()), len(session.get_outputs()))
    if counts != (1, 1):
        raise GateError(f"{artifact} must have one input and one output, has {counts[0]} and {counts[1]}")
    return OnnxRuntime(session, image_shape=image_shape, embedding_dim=embedding_dim, device=device)


def open_session(model: str | bytes, *, name: str, device: str, options: Mapping[str, str]) -> Any:
    """Start an inference session on a file or on a graph in memory; ``name`` is for messages, the rest as above."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingBackendError(f"ONNX Runtime is not installed: {install_command('cpu')}") from None
    onnxruntime.set_default_logger_severity(_FATAL)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = num_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _FATAL
    # its threads would spin for a while after each batch, and take the processor from what decodes and answers
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    level = _LEVELS[options.get("graph_optimization_level", "all")]
    settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    try:
        session = onnxruntime.InferenceSession(model, settings, providers=_providers(onnxruntime, device))
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise MissingBackendError(f"ONNX Runtime on {device} cannot run {name}: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
        raise GateError(f"{name} does not load in ONNX Runtime: {one_line(error)}") from None
    if device != "cpu" and _PROVIDERS[device] not in session.get_providers():
        raise MissingBackendError(
            f"ONNX Runtime could not start its {_PROVIDERS[device]} here; use --device cpu, and see: mio doctor"
        )
    return session


def _providers(onnxruntime: Any, device: str) -> list[Any]:
    if device not in _PROVIDERS:
        raise UsageError(f"ONNX Runtime runs on {', '.join(_PROVIDERS)}, got {device!r}")
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise MissingBackendError(f"this ONNX Runtime has no {_PROVIDERS[device]}: {install_command('gpu')}")
    if device == "cpu":
        return [_PROVIDERS["cpu"]]
    onnxruntime.preload_dlls()
    # TF32 keeps 10 bits of mantissa; an fp32 artifact must not be computed with it
    cuda = (_PROVIDERS["cuda"], {"use_tf32": 0})
    return [cuda, _PROVIDERS["cpu"]] if device == "cuda" else [_PROVIDERS["tensorrt"], cuda, _PROVIDERS["cpu"]]
