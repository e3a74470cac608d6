"""Writes one artifact after the other into a bundle's folder; none is proved yet."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import onnx

from mio_export.bundle import Artifact, Manifest, ParitySummary
from mio_export.bundle.sidecar import sidecar_path
from mio_export.exporting.graphs import Graph, Graphs
from mio_export.exporting.onnx import save_onnx
from mio_export.exporting.plan import Order, source
from mio_export.exporting.pt2 import pt2_from_encoder
from mio_export.exporting.tensorrt import engine_from_onnx
from mio_export.exporting.torchscript import torchscript_from_encoder
from mio_export.files import sha256_file
from mio_export.models import Encoder

_UNPROVEN = ParitySummary(verdict="unproven", devices=(), report="", report_sha256="")
_ONNX_TOOLS = ("torch", "onnx", "onnxscript", "onnxslim")


@dataclass(kw_only=True)
class Writer:
    """Where artifacts go, and what they are made from."""

    folder: Path
    encoder: Encoder
    graphs: Graphs
    manifest: Manifest
    """For the batch range, and for what every artifact says of itself."""

    def write(self, order: Order) -> tuple[Artifact, tuple[Mapping[str, Any], ...]]:
        """Write an artifact; return its row, as yet unproven, and the stages that its graph went through."""
        if order.format in ("pt2", "torchscript"):
            return self._from_torch(order), ()
        graph = self.graphs.at(source(order.format, order.precision))
        if order.format == "onnx":
            return self._onnx(order, graph), graph.stages
        if order.format == "openvino":
            return self._openvino(order, graph), graph.stages
        return self._engine(order, graph), graph.stages

    def _from_torch(self, order: Order) -> Artifact:
        path = self.folder / _file_name(order)
        write = pt2_from_encoder if order.format == "pt2" else torchscript_from_encoder
        write(
            self.encoder,
            path,
            precision=cast(Literal["fp32", "bf16"], order.precision),
            max_batch=self.manifest.max_batch,
            provenance=self.manifest.common_json(),
        )
        return _row(order, path, tools=("torch",))

    def _onnx(self, order: Order, graph: Graph) -> Artifact:
        path = self._source_file(order)
        companions = save_onnx(_copied(graph.model), path, provenance=self.manifest.common_json())
        options = {"graph_optimization_level": "all"}
        tools = (*_ONNX_TOOLS, *(("onnxruntime-gpu", "onnxruntime") if order.precision == "int8" else ()))
        return _row(order, path, tools=tools, graph=graph, companions=companions, options=options)

    def _openvino(self, order: Order, graph: Graph) -> Artifact:
        """OpenVINO reads the ONNX file that is there already; a precision hint makes it another artifact of it.

        The hint is always given: where the processor has bf16, OpenVINO would compute fp32 graphs in it unasked.
        """
        file = self._source_file(order)
        options = {"INFERENCE_PRECISION_HINT": "bf16" if order.precision == "bf16" else "f32"}
        companions = {name: sha256_file(self.folder / name) for name in self._data_of(file)}
        return _row(order, file, tools=(*_ONNX_TOOLS, "openvino"), graph=graph, companions=companions, options=options)

    def _engine(self, order: Order, graph: Graph) -> Artifact:
        assert order.capability is not None
        path = self.folder / _file_name(order)
        engine_from_onnx(
            self._source_file(order),
            path,
            library=cast(Literal["tensorrt", "tensorrt-rtx"], order.format),
            capability=order.capability,
            max_batch=self.manifest.max_batch,
            provenance=self.manifest.common_json(),
        )
        sidecar = sidecar_path(path)
        tools = (*_ONNX_TOOLS, "tensorrt" if order.format == "tensorrt" else "tensorrt-rtx-cu13")
        return _row(order, path, tools=tools, graph=graph, companions={sidecar.name: sha256_file(sidecar)})

    def _source_file(self, order: Order) -> Path:
        precision = source(order.format, order.precision)
        return self.folder / _file_name(Order(format="onnx", precision=precision))

    def _data_of(self, file: Path) -> list[str]:
        data = file.with_name(f"{file.name}.data")
        return [data.name] if data.is_file() else []


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _row(
    order: Order,
    path: Path,
    *,
    tools: tuple[str, ...],
    graph: Graph | None = None,
    companions: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> Artifact:
    return Artifact(
        file=path.name,
        format=order.format,
        precision=order.precision,
        sha256=sha256_file(path),
        companions=companions or {},
        options=options or {},
        parity=_UNPROVEN,
        capability=order.capability,
        opset=graph.model.opset_import[0].version if graph else None,
        exporter=graph.exporter if graph else None,
        notes=graph.notes if graph else (),
        tools={"mio-export": version("mio-export"), **_versions(tools)},
    )


def _versions(tools: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for tool in tools:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


def _file_name(order: Order) -> str:
    precision = "" if order.precision == "fp32" else f".{order.precision}"
    if order.capability is not None:
        machine = f".sm{order.capability.replace('.', '')}"
        kind = "engine" if order.format == "tensorrt" else "rtx.engine"
        return f"encoder{precision}{machine}.{kind}"
    return f"encoder{precision}.{order.format}"
