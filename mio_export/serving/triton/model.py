"""The Python models of a deployed repository, for Triton's Python backend; ``mio deploy triton`` ships this very file.

The name of a model says which one it is: it ends with ``_decode``, ``_encode`` or ``_finish``.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_HERE = Path(__file__).parent
_MOST_THREADS = 16
"""That decode, in each instance; each has a process of its own, which takes 60 MB."""
Arrays = dict[str, Any]
"""Tensors by name, an image a row."""


class TritonPythonModel:
    """One of the parts."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the part; Triton is not ready before this returns."""
        config = json.loads(args["model_config"])
        says = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._inputs = [tensor["name"] for tensor in config["input"]]
        part = args["model_name"].rpartition("_")[2]
        self._compute: Callable[[Arrays], Arrays] = _PARTS[part](config, says)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Compute all requests as one batch; nothing is raised, for Triton sends tracebacks to the clients."""
        answers = [_failure("images cannot be read as a tensor", "INVALID_ARG") for _ in requests]
        read: dict[int, Arrays] = {}
        for number, request in enumerate(requests):
            with suppress(Exception):  # the backend raises whatever bytes that are no tensor lead it to
                read[number] = self._tensors(request)
                answers[number] = _failure("the model failed", "INTERNAL")
        try:
            rows = {name: np.concatenate([each[name] for each in read.values()]) for name in self._inputs if read}
            outputs, start = self._compute(rows) if read else {}, 0
            for number, each in read.items():
                part = slice(start, start := start + len(each[self._inputs[0]]))
                tensors = [pb_utils.Tensor(name, np.ascontiguousarray(array[part])) for name, array in outputs.items()]
                answers[number] = pb_utils.InferenceResponse(tensors)
        except Exception:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)
        return answers

    def _tensors(self, request: Any) -> Arrays:
        """Return the inputs; where there is no ``error``, none of the images has one."""
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        arrays = {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}
        return {"error": np.full((len(arrays[self._inputs[0]]), 1), b"", np.object_), **arrays}


def _failure(message: str, code: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code)))


class _Decode:
    """Image files to pixels: black ones, and the reason, for a file that cannot be decoded."""

    def __init__(self, config: Any, says: dict[str, str]) -> None:
        sys.path.insert(0, str(_HERE))  # the decode contract that was deployed, not one that is installed
        from mio_export.decoding import Decoder
        from mio_export.errors import MioError
        from mio_export.limits import Limits
        from mio_export.preprocess import DecodeError, Preprocess

        _check_versions(says, "pillow", "pillow-heif")
        contract = json.loads((_HERE / "contract.json").read_text())
        values = contract["preprocess"]
        self._preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        limits, scaled = Limits(**contract["limits"]), says["decode"] == "scaled"
        self._decoder = Decoder(self._preprocess, scaled=scaled, limits=limits, isolated=True)
        self._errors = (DecodeError, MemoryError, MioError)
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    def __call__(self, inputs: Arrays) -> Arrays:
        decoded = list(self._pool.map(self._decode, inputs["images"][:, 0]))
        pixels, errors = (list(column) for column in zip(*decoded, strict=True))
        return {"images": np.stack(pixels), "error": np.array(errors, np.object_)[:, None]}

    def _decode(self, file: bytes) -> tuple[Any, bytes]:
        try:
            return self._decoder.decode(bytes(file)), b""
        except self._errors as error:
            reason = str(error) or type(error).__name__
            return np.zeros(self._preprocess.shape, np.uint8), reason.encode()


def _encode(config: Any, says: dict[str, str]) -> Callable[[Arrays], Arrays]:
    """ONNX Runtime on the CPU, for a server without a backend of its own for it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    _check_versions(says, "onnxruntime")
    options = onnxruntime.SessionOptions()
    level = says["graph_optimization_level"].upper()
    level = "ORT_DISABLE_ALL" if level == "DISABLED" else f"ORT_ENABLE_{level}"
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(str(_HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    source, target = config["input"][0]["name"], config["output"][0]["name"]
    return lambda inputs: {target: session.run([target], {source: inputs[source]})[0]}


def _finish(inputs: Arrays) -> Arrays:
    """Say for each image what is wrong; an embedding with an error is NaN."""
    vectors, errors = inputs["embedding"].copy(), inputs["error"].copy()
    is_fine = np.isfinite(vectors).all(axis=1)
    errors[~is_fine & (errors[:, 0] == b""), 0] = b"its embedding is not finite"
    vectors[errors[:, 0] != b""] = np.nan
    return {"embedding": vectors, "error": errors}


_PARTS: dict[str, Callable[[Any, dict[str, str]], Callable[[Arrays], Arrays]]] = {
    "decode": _Decode,
    "encode": _encode,
    "finish": lambda config, says: _finish,
}


def _check_versions(says: dict[str, str], *packages: str) -> None:
    """Refuse to load where another version would compute than the parameters say."""
    versions = json.loads(says["versions"])
    for package in versions.keys() & {*packages}:
        if (found := version(package)) != versions[package]:
            raise RuntimeError(f"{package} {found} is installed; needed: pip install {package}=={versions[package]}")
