"""The encoder for Triton's Python backend, where the server has no backend of its own for ONNX.

``mio deploy`` copies this file as ``model.py``; it needs numpy and onnxruntime, and runs on the CPU.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}


class TritonPythonModel:
    """``images`` uint8 (N, H, W, C) to ``embeddings`` float32 (N, D)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``model.onnx`` with the options that it was proved with."""
        config = json.loads(args["model_config"])
        level = config["parameters"]["graph_optimization_level"]["string_value"]
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[level])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        model = str(Path(__file__).with_name("model.onnx"))
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Embed all requests as one batch, which the dynamic batcher keeps within the largest."""
        images = [pb_utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        embeddings = self._session.run([self._output], {self._input: np.concatenate(images)})[0]
        ends = np.cumsum([len(batch) for batch in images])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self._output, np.ascontiguousarray(embeddings[end - n : end]))])
            for end, n in zip(ends, map(len, images), strict=True)
        ]
