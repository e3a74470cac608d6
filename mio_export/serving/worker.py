"""The two models as Triton's Python backend runs them, each in processes of its own; nothing else imports this file.

``NAME`` owns the runtime. ``NAME_jpeg`` decodes, and asks ``NAME`` over shared memory: the runtime is loaded once, images
of both models meet in its batches, and a file that crashes a decoder takes no model with it.
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
from mio_export.serving.settings import WorkerSettings

_BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
_NO_ERROR = ""


class _Metrics:
    """Counts beside Triton's own, at its metrics port."""

    def __init__(self, model: str) -> None:
        kind = pb.MetricFamily
        self._model = model
        self._images = kind("mio_images", "Images by what became of them", kind.COUNTER)
        self._results: dict[str, Any] = {}
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
        """Embed the images of all requests in one batch."""
        return _answered(requests, self._vectors)

    def _vectors(self, images: Sequence[Pixels]) -> tuple[Embeddings, list[str]]:
        batch = images[0] if len(images) == 1 else np.concatenate(images)
        start = time.perf_counter()
        vectors = self._runtime.embed(batch)
        self._metrics.observe("inference", time.perf_counter() - start)
        self._metrics.observe("batch", len(batch))
        finite = np.isfinite(vectors).all(axis=1)
        vectors[~finite] = np.nan
        self._metrics.count("ok", int(finite.sum()))
        if not finite.all():
            self._metrics.count("not_finite", int((~finite).sum()))
        return vectors, [_NO_ERROR if fine else "its embedding is not finite" for fine in finite]

    def finalize(self) -> None:
        """Release the runtime."""
        self._runtime.close()


class EncodedImageModel:
    """``NAME_jpeg``: encoded images, bytes (N, 1), of any type that ``Preprocess`` takes, to embeddings."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the contract, and load the decoders."""
        self._settings = WorkerSettings.load(args)
        manifest = load_bundle(self._settings.bundle).manifest
        contract = manifest.preprocess
        self._preprocess = replace(contract, max_pixels=min(contract.max_pixels, self._settings.max_pixels))
        self._dim = manifest.encoder.embedding_dim
        self._metrics = _Metrics(args["model_name"])
        self._pool = ThreadPoolExecutor(num_threads())  # Pillow lets go of the interpreter's lock
        warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
        for format in ("JPEG", "PNG"):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32)).save(buffer, format)
            self._preprocess.decode(buffer.getvalue())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Decode the images of all requests, and let ``NAME`` embed those that could be."""
        return _answered(requests, self._vectors)

    def _vectors(self, files: Sequence[Any]) -> tuple[Embeddings, list[str]]:
        start = time.perf_counter()
        decoded = list(self._pool.map(self._decode, [bytes(item) for item in np.concatenate(files)[:, 0]]))
        self._metrics.observe("decode", time.perf_counter() - start)
        vectors = np.full((len(decoded), self._dim), np.nan, np.float32)
        errors = [item.reason if isinstance(item, _Unread) else _NO_ERROR for item in decoded]
        good = [index for index, item in enumerate(decoded) if not isinstance(item, _Unread)]
        # not where it is decoded: the backend's metrics end the server when threads use them
        for result, number in Counter(item.cause if isinstance(item, _Unread) else "ok" for item in decoded).items():
            self._metrics.count(result, number)
        if good:
            vectors[good], found = self._embed(np.stack([decoded[index] for index in good]))
            for index, error in zip(good, found, strict=True):
                errors[index] = error
        return vectors, errors

    def _decode(self, data: bytes) -> "Pixels | _Unread":
        limit = self._settings.max_image_bytes
        if len(data) > limit:
            return _Unread("too_many_bytes", f"{len(data):,} bytes are more than the {limit:,} that this server takes")
        try:
            return self._preprocess.decode(data)
        except DecodeError as error:
            return _Unread("too_many_pixels" if "decompression bomb" in str(error) else "not_decoded", str(error))

    def _embed(self, pixels: Pixels) -> tuple[Embeddings, list[str]]:
        request = pb.InferenceRequest(
            model_name=self._settings.encoder_model,
            requested_output_names=["embedding", "error"],
            inputs=[pb.Tensor("images", pixels)],
        )
        answer = request.exec()
        if answer.has_error():
            raise _RefusedError(answer.error())
        vectors, errors = (pb.get_output_tensor_by_name(answer, name).as_numpy() for name in ("embedding", "error"))
        return vectors, [error.decode().partition(": ")[2] for error in errors[:, 0]]

    def finalize(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


class _Unread(NamedTuple):
    """Why an image has no pixels: as metrics count it, and as its sender is told."""

    cause: str
    reason: str


class _RefusedError(Exception):
    """``NAME`` refused a batch, in Triton's own words: too long a queue, or its end."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


def _answered(
    requests: Sequence[Any], vectors_of: Callable[[Sequence[Any]], tuple[Embeddings, list[str]]]
) -> list[Any]:
    """Answer requests, of which each has one or more items; what is wrong with an item is said in its place.

    Triton would send the traceback of whatever left ``execute`` to every client in the batch: nothing may leave it.
    """
    answers: list[Any] = [None] * len(requests)
    inputs = {}
    for number, request in enumerate(requests):
        try:
            inputs[number] = pb.get_input_tensor_by_name(request, "images").as_numpy()
        except Exception:  # noqa: BLE001 - the backend raises whatever bytes that are no tensor lead it to
            answers[number] = _failure("images cannot be read as a tensor", pb.TritonError.INVALID_ARG)
    try:
        if inputs:
            vectors, errors = vectors_of(list(inputs.values()))
            start = 0
            for number, items in inputs.items():
                stop = start + len(items)
                answers[number] = _answer(vectors[start:stop], errors[start:stop])
                start = stop
    except _RefusedError as refused:
        answers = [answer or pb.InferenceResponse(error=refused.error) for answer in answers]
    except Exception:  # noqa: BLE001
        traceback.print_exc(file=sys.stderr)
        answers = [answer or _failure("the model failed", pb.TritonError.INTERNAL) for answer in answers]
    return answers


def _answer(vectors: Embeddings, errors: Sequence[str]) -> Any:
    named = [f"image {number}: {error}".encode() if error else b"" for number, error in enumerate(errors)]
    column = np.array(named, dtype=np.object_).reshape(-1, 1)
    return pb.InferenceResponse(
        [pb.Tensor("embedding", np.ascontiguousarray(vectors)), pb.Tensor("error", column)]
    )


def _failure(message: str, code: Any) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(message, code))
