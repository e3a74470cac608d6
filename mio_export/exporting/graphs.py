"""The ONNX graphs of one encoder, stage by stage, each stage held to the encoder before the next one begins."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from mio_export.bundle import Precision
from mio_export.console.progress import Progress
from mio_export.errors import MioError, MissingBackendError, one_line
from mio_export.exporting.half_precision import Cast, HalfPrecision, cast_graph, forecast
from mio_export.exporting.int8 import calibrate, quantize
from mio_export.exporting.onnx import Exporter, onnx_from_encoder
from mio_export.models import Encoder
from mio_export.parity.gate import embed_in_batches
from mio_export.parity.images import ParityImages
from mio_export.parity.reference import Reference
from mio_export.parity.report import compare
from mio_export.preprocess import Pixels
from mio_export.runtimes.onnxruntime import OnnxRuntime, open_session

_NUM_IMAGES = 64
_BATCH_SIZE = 16
_MAX_GROWTH = 1.1
"""A clean-up that makes the graph larger than this is none."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX graph of one precision, and how it came about."""

    model: onnx.ModelProto
    exporter: Exporter
    stages: tuple[Mapping[str, Any], ...]
    """What each stage did: its name, what became of it, the error after it."""
    notes: tuple[str, ...]
    """What a person should know, a line each."""


CLEAN_UPS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {}
"""Passes over the fp32 graph, by name, in order; one whose result is refused is undone and named."""


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    slimmed = onnxslim.slim(model)
    assert isinstance(slimmed, onnx.ModelProto)  # it is a path's None only if it was told to save
    return slimmed


CLEAN_UPS["onnxslim"] = _slim


class Graphs:
    """Makes the graph of each precision, once.

    Args:
        encoder: in eval mode, on the CPU.
        reference: what every stage is held to.
        max_batch: largest batch.
        calibration: images for int8; None if it is not asked for.
        cache: folder of calibration results; None: none is kept.
        progress: is told what is undone.
    """

    def __init__(
        self,
        encoder: Encoder,
        reference: Reference,
        *,
        max_batch: int,
        calibration: ParityImages | None,
        cache: Path | None,
        progress: Progress,
    ) -> None:
        self._encoder = encoder
        self._reference = reference
        self._max_batch = max_batch
        self._calibration = calibration
        self._cache = cache
        self._progress = progress
        self._made: dict[Precision, Graph] = {}

    def at(self, precision: Precision) -> Graph:
        """Return a graph, refused stages and all: the proof of its file decides.

        Raises:
            MioError: the encoder cannot be captured.
        """
        if precision not in self._made:
            if precision == "fp32":
                self._made[precision] = self._captured()
            elif precision == "int8":
                self._made[precision] = self._quantized()
            else:
                self._made[precision] = self._cast(precision)
        return self._made[precision]

    def _captured(self) -> Graph:
        model, exporter = onnx_from_encoder(self._encoder, max_batch=self._max_batch)
        stages = [self._checked("capture", model, "fp32")]
        notes = []
        if exporter == "torchscript":
            notes.append("captured by the TorchScript exporter: the dynamo exporter failed on this backbone")
        for name, clean_up in CLEAN_UPS.items():
            cleaned, stage = self._cleaned(name, clean_up, model)
            stages.append(stage)
            if stage["outcome"] == "undone":
                notes.append(f"clean-up {name} was undone: {stage['detail']}")
                self._progress.line(notes[-1])
            else:
                model = cleaned
        return Graph(model=model, exporter=exporter, stages=tuple(stages), notes=tuple(notes))

    def _cleaned(
        self, name: str, clean_up: Callable[[onnx.ModelProto], onnx.ModelProto], model: onnx.ModelProto
    ) -> tuple[onnx.ModelProto, Mapping[str, Any]]:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        try:
            cleaned = clean_up(copied)
        except Exception as error:  # noqa: BLE001 - a pass that fails, however it does, is undone
            return model, {"name": name, "outcome": "undone", "detail": one_line(error)}
        stage = self._checked(name, cleaned, "fp32")
        if stage["outcome"] == "refused":
            return model, {**stage, "outcome": "undone"}
        if cleaned.ByteSize() > _MAX_GROWTH * model.ByteSize():
            grown = f"the graph would grow from {model.ByteSize():,} to {cleaned.ByteSize():,} bytes"
            return model, {"name": name, "outcome": "undone", "detail": grown}
        return cleaned, stage

    def _cast(self, precision: HalfPrecision) -> Graph:
        source = self.at("fp32")
        ranges = forecast(source.model, _batches(self._reference.images.pixels))
        model, cast = cast_graph(source.model, precision, ranges=ranges)
        return self._derived(source, f"cast to {precision}", model, precision, _cast_notes(cast))

    def _quantized(self) -> Graph:
        source, images = self.at("fp32"), self._calibration
        if images is None:
            raise MioError("int8 needs images to calibrate on")
        ranges = calibrate(source.model, _batches(images.pixels), images_sha256=images.sha256, cache=self._cache)
        model = quantize(source.model, ranges)
        notes = (f"int8 calibrated on {len(images.pixels)} images, sha256 {images.sha256[:12]}…",)
        return self._derived(source, "quantise to int8", model, "int8", notes)

    def _derived(
        self, source: Graph, name: str, model: onnx.ModelProto, precision: Precision, notes: tuple[str, ...]
    ) -> Graph:
        stage = self._checked(name, model, precision)
        return Graph(
            model=model, exporter=source.exporter, stages=(*source.stages, stage), notes=(*source.notes, *notes)
        )

    def _checked(self, name: str, model: onnx.ModelProto, precision: Precision) -> Mapping[str, Any]:
        """Hold a graph to the encoder on a part of the images; the verdict on the file itself comes later."""
        pixels = self._reference.images.pixels[:_NUM_IMAGES]
        size, dim = min(_BATCH_SIZE, self._max_batch), self._reference.embeddings.shape[1]
        try:
            session = open_session(model.SerializeToString(), name="the graph", device="cpu", options={})
            with OnnxRuntime(session, image_shape=pixels.shape[1:], embedding_dim=dim, device="cpu") as runtime:
                candidate = embed_in_batches(runtime, pixels, size)
        except MissingBackendError as error:
            return {"name": name, "outcome": "not run", "detail": str(error)}
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no public base class
            return {"name": name, "outcome": "refused", "detail": one_line(error)}
        budget = self._reference.budget(precision, {})
        found = compare(self._reference.embeddings[: len(pixels)], candidate, budget=budget, batch_size=size)
        if found.problems:
            return {"name": name, "outcome": "refused", "detail": found.problems[0]}
        return {"name": name, "outcome": "kept", "rms_relative_error": found.rms_relative_error}


def _cast_notes(cast: Cast) -> tuple[str, ...]:
    """What casting did to the graph, for people."""
    notes = [f"{cast.precision}: {len(cast.kept)} of {cast.num_nodes} nodes stay fp32"]
    if cast.islands:
        notes.append(f"fp32 islands, since their values exceed {cast.precision}: {', '.join(cast.islands)}")
    for what, counts in (("clipped", cast.clipped), ("flushed to zero", cast.flushed)):
        notes += [f"{count:,} weights of {name} were {what}" for name, count in counts.items()]
    return tuple(notes)


def _batches(pixels: Pixels) -> Iterator[Pixels]:
    return (pixels[start : start + _BATCH_SIZE] for start in range(0, len(pixels), _BATCH_SIZE))
