"""The two models as Triton's Python backend runs them, each in processes of its own; nothing else imports this file.

``NAME`` owns the runtime and ``NAME_decode`` the decoders; ``NAME_jpeg`` is Triton's own chain of both, so that the
runtime is loaded once.
"""

import io
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb
from PIL import Image

from mio_export.bundle import load_bundle
from mio_export.preprocess import DecodeError, Pixels
from mio_export.runtimes.base import Embeddings
from mio_export.runtimes.devices import num_threads
from mio_export.runtimes.registry import open_choice
from mio_export.serving.settings import BUSY, WorkerSettings

_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
Inputs = dict[str, Any]
"""``images``, and ``error`` if there is one: arrays with an item a row."""
Outputs = dict[str, Any]


class _Metrics:
    """Counts beside Triton's own, at its metrics port."""

    def __init__(self, model: str) -> None:
        kind = pb.MetricFamily
        self._model = model
        self._images = kind("mio_images", "Images by what became of them", kind.COUNTER)
        self._results: dict[str, Any] = {}
        self._busy_family = kind(BUSY, "Workers that compute now", kind.GAUGE)
        self.busy = self._busy_family.Metric(labels={"model": model})
        families = {
            "batch": kind("mio_batch_images", "Images in a batch", kind.HISTOGRAM),
            "decode": kind("mio_decode_seconds", "Time to decode a batch", kind.HISTOGRAM),
            "inference": kind("mio_inference_seconds", "Time to embed a batch", kind.HISTOGRAM),
        }
        self._families = families  # a metric lives no longer than its family
        self._histograms = {
            name: family.Metric(labels={"model": model}, buckets=_BATCHES if name == "batch" else _SECONDS)
            for name, family in families.items()
        }

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def count(self, result: str, number: int = 1) -> None:
        if result not in self._results:
            self._results[result] = self._images.Metric(labels={"model": self._model, "result": result})
        self._results[result].increment(number)


class EncoderModel:
    """``NAME``: uint8 images (N, H, W, C) to float32 embeddings (N, D)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the runtime and warm it up; Triton is not ready before this returns."""
        settings = WorkerSettings.load(args)
        bundle = load_bundle(settings.bundle)
        self._runtime = open_choice(bundle, settings.choice)
        self._metrics = _Metrics(args["model_name"])
        for size in (1, settings.max_batch):
            self._runtime.embed(np.zeros((size, *bundle.manifest.preprocess.shape), np.uint8))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Embed the images of all requests in one batch, without those that their decoder could not read."""
        return _answered(requests, self._outputs)

    def _outputs(self, inputs: Sequence[Inputs]) -> Outputs:
        images = np.concatenate([each["images"] for each in inputs]) if len(inputs) > 1 else inputs[0]["images"]
        given = [each["error"] for each in inputs]
        errors = np.concatenate(
            [
                _no_errors(len(each["images"])) if error is None else error
                for each, error in zip(inputs, given, strict=True)
            ]
        )
        good = np.array([not error for error in errors[:, 0]])
        vectors = np.full((len(images), self._runtime.embedding_dim), np.nan, np.float32)
        if good.any():
            vectors[good] = self._embed(images if good.all() else images[good])
        for index in np.flatnonzero(good & ~np.isfinite(vectors).all(axis=1)):
            vectors[index], errors[index, 0] = np.nan, b"its embedding is not finite"
            self._metrics.count("not_finite")
        self._metrics.count("ok", int(sum(not error for error in errors[:, 0])))
        return {"embedding": vectors, "error": errors}

    def _embed(self, batch: Pixels) -> Embeddings:
        start = time.perf_counter()
        vectors = self._runtime.embed(batch)
        self._metrics.observe("inference", time.perf_counter() - start)
        self._metrics.observe("batch", len(batch))
        return vectors

    def finalize(self) -> None:
        """Release the runtime."""
        self._runtime.close()


class DecoderModel:
    """``NAME_decode``: encoded images, bytes (N, 1), of any type that ``Preprocess`` takes, to uint8 (N, H, W, C)."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the contract, and load the decoders."""
        self._settings = WorkerSettings.load(args)
        manifest = load_bundle(self._settings.bundle).manifest
        contract = manifest.preprocess
        self._preprocess = replace(contract, max_pixels=min(contract.max_pixels, self._settings.max_pixels))
        self._metrics = _Metrics(args["model_name"])
        self._pool = ThreadPoolExecutor(num_threads())  # Pillow lets go of the interpreter's lock
        warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
        for kind in ("JPEG", "PNG"):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32)).save(buffer, kind)
            self._preprocess.decode(buffer.getvalue())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Decode the images of all requests; black ones, and the reasons, stand for those that cannot be."""
        self._metrics.busy.increment(1)
        try:
            return _answered(requests, self._outputs)
        finally:
            self._metrics.busy.increment(-1)

    def _outputs(self, inputs: Sequence[Inputs]) -> Outputs:
        files = [bytes(file) for each in inputs for file in each["images"][:, 0]]
        start = time.perf_counter()
        decoded = list(self._pool.map(self._decode, files))
        self._metrics.observe("decode", time.perf_counter() - start)
        pixels, errors = np.zeros((len(files), *self._preprocess.shape), np.uint8), _no_errors(len(files))
        for index, item in enumerate(decoded):
            if isinstance(item, _Unread):
                errors[index, 0] = item.reason.encode()
            else:
                pixels[index] = item
        # not where it is decoded: the backend's metrics end the server when threads use them
        for result, number in Counter(item.cause if isinstance(item, _Unread) else "ok" for item in decoded).items():
            self._metrics.count(result, number)
        return {"images": pixels, "error": errors}

    def _decode(self, data: bytes) -> "Pixels | _Unread":
        limit = self._settings.max_image_bytes
        if len(data) > limit:
            return _Unread("too_many_bytes", f"{len(data):,} bytes are more than the {limit:,} that this server takes")
        try:
            return self._preprocess.decode(data)
        except DecodeError as error:
            return _Unread("too_many_pixels" if "decompression bomb" in str(error) else "not_decoded", str(error))
        except MemoryError:
            return _Unread("not_decoded", "the server has not enough memory to decode it")

    def finalize(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


class _Unread(NamedTuple):
    """Why an image has no pixels: as metrics count it, and as its sender is told."""

    cause: str
    reason: str


def _answered(requests: Sequence[Any], outputs_of: Callable[[Sequence[Inputs]], Outputs]) -> list[Any]:
    """Answer requests, of which each has one or more items; what is wrong with an item is said in its place.

    Triton would send the traceback of whatever left ``execute`` to every client in the batch: nothing may leave it.
    """
    answers: list[Any] = [None] * len(requests)
    inputs: dict[int, Inputs] = {}
    for number, request in enumerate(requests):
        try:
            inputs[number] = {name: _tensor(request, name) for name in ("images", "error")}
        except Exception:  # noqa: BLE001 - the backend raises whatever bytes that are no tensor lead it to
            answers[number] = _failure("images cannot be read as a tensor", pb.TritonError.INVALID_ARG)
    try:
        outputs = outputs_of(list(inputs.values())) if inputs else {}
        start = 0
        for number, each in inputs.items():
            stop = start + len(each["images"])
            answers[number] = pb.InferenceResponse(
                [pb.Tensor(name, np.ascontiguousarray(rows[start:stop])) for name, rows in outputs.items()]
            )
            start = stop
    except Exception:  # noqa: BLE001
        traceback.print_exc(file=sys.stderr)
        answers = [answer or _failure("the model failed", pb.TritonError.INTERNAL) for answer in answers]
    return answers


def _tensor(request: Any, name: str) -> Any:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _no_errors(number: int) -> Any:
    return np.full((number, 1), b"", dtype=np.object_)


def _failure(message: str, code: Any) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(message, code))
