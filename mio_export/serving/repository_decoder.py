"""The decoder in front of the encoder, for Triton's Python backend: bytes of image files to pixels.

``mio deploy`` copies this file as ``model.py``, with the decode contract of mio-export beside it; it needs numpy and
Pillow only.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """``files`` (N, 1), each the bytes of a file, to ``images`` uint8 (N, H, W, C)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the contract, and how large JPEGs are decoded."""
        here = Path(__file__).parent
        sys.path.insert(0, str(here))  # the contract that was deployed, not one that is installed
        from mio_export.preprocess import DecodeError, Preprocess

        values = json.loads((here / "preprocess.json").read_text())
        self._preprocess = Preprocess(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        self._error = DecodeError
        parameters = json.loads(args["model_config"])["parameters"]
        self._scaled = parameters["decode"]["string_value"] == "scaled"
        self._pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and resizes without the interpreter's lock

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode all files of all requests; a file that is no image fails its own request only."""
        files = [pb_utils.get_input_tensor_by_name(request, "files").as_numpy().reshape(-1) for request in requests]
        decoded = self._pool.map(self._decode, [file for batch in files for file in batch])
        return [self._response([next(decoded) for _ in batch]) for batch in files]

    def _decode(self, file: bytes) -> Any:
        try:
            return self._preprocess.decode(file, scaled=self._scaled)
        except (self._error, MemoryError) as error:
            return error

    def _response(self, decoded: list[Any]) -> Any:
        for index, image in enumerate(decoded):
            if isinstance(image, Exception):
                message = f"file {index} of {len(decoded)} cannot be decoded: {image}"
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor("images", np.stack(decoded))])

    def finalize(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
