"""An ONNX graph in half precision: typed tensors and Cast nodes in the graph, never a builder's flag.

A flag leaves it to each runtime what is computed in which type; types in the graph say it once, and can be proved.
What a precision cannot hold stays in fp32 as an island, chosen by the largest values that real images give.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mio_export.errors import UsageError
from mio_export.preprocess import Pixels

HalfPrecision = Literal["fp16", "bf16"]
Reason = Literal["range", "weights", "normalisation", "reduction", "unsupported"]

SAFETY_FACTOR = 2.0
"""How far below the precision's largest value a forecast must stay: other images may give larger activations."""
MAX_WEIGHT_ISLANDS = 0.1
"""Share of all nodes that may stay fp32 only because a weight is too large; beyond it such weights are clipped."""
_TYPES: dict[str, tuple[int, Any, float]] = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16), 65504.0),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), (2 - 2**-7) * 2.0**127),
}
_MATRIX_OPS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Their sums and squares are no tensor of the graph, so no forecast sees them: a mean of 112² values of 10 sums to
# 1.2e5. LayerNormalization computes in fp32 by its default stash_type, and Softmax subtracts the maximum first.
_REDUCTIONS = {
    "GlobalAveragePool",
    "GlobalLpPool",
    "GroupNormalization",
    "InstanceNormalization",
    "LpNormalization",
    "Pow",
    "RMSNormalization",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMean",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
}


@dataclass(frozen=True, kw_only=True)
class Cast:
    """What became of a graph when it was cast."""

    precision: HalfPrecision
    num_nodes: int
    """Nodes of the graph before, integer arithmetic included."""
    kept: Mapping[str, Reason]
    """The nodes that still compute in fp32, and why; a node without a name goes by its first output."""
    clipped: Mapping[str, int]
    """Elements beyond the precision's largest value, set to it, by initializer; only where there are any."""
    flushed: Mapping[str, int]
    """Elements that became zero, by initializer; only where there are any."""

    @property
    def islands(self) -> tuple[str, ...]:
        """The nodes kept because a forecast input or output is too large for the precision."""
        return tuple(name for name, reason in self.kept.items() if reason == "range")


def forecast(model: onnx.ModelProto, batches: Iterable[Pixels]) -> dict[str, float]:
    """Return the largest |value| of every float32 tensor that a node computes, over real images.

    Each tensor is reduced to one number inside the graph, so memory is flat in the number of images.

    Args:
        model: a flat graph with the input ``images``.
        batches: images, uint8, each batch of shape (N, H, W, C).

    Raises:
        UsageError: there is no image.
    """
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    names = computed_floats(model)
    for name in names:
        probed.graph.node.append(helper.make_node("Abs", [name], [f"{name}:absolute"]))
        probed.graph.node.append(helper.make_node("ReduceMax", [f"{name}:absolute"], [f"{name}:largest"], keepdims=0))
    found = np.zeros(len(names))
    for values in observed(probed, [f"{name}:largest" for name in names], batches):
        found = np.maximum(found, np.array(values, dtype=np.float64))  # NaN stays NaN
    return dict(zip(names, found.tolist(), strict=True))


def computed_floats(model: onnx.ModelProto) -> list[str]:
    """Return the names of the float32 tensors that nodes compute, in the graph's order."""
    floats = _float_tensors(model)
    return [name for node in model.graph.node for name in node.output if name in floats]


def observed(model: onnx.ModelProto, names: Sequence[str], batches: Iterable[Pixels]) -> Iterator[list[Any]]:
    """Yield the values of float32 tensors for each batch, computed by ONNX Runtime as the graph is written.

    Args:
        model: a graph with the input ``images``; it is not changed.
        names: the tensors.
        batches: images, uint8, each batch of shape (N, H, W, C).

    Raises:
        UsageError: there is no batch.
    """
    import onnxruntime

    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch = None
    for batch in batches:
        yield session.run(list(names), {"images": batch})
    if batch is None:
        raise UsageError("no images to run the graph on; at least one batch of real images is needed")


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors, weights included."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    types = {weight.name: weight.data_type for weight in graph.initializer} | values
    return {name for name, type_ in types.items() if type_ == TensorProto.FLOAT}


def cast_graph(
    model: onnx.ModelProto, precision: HalfPrecision, *, ranges: Mapping[str, float]
) -> tuple[onnx.ModelProto, Cast]:
    """Return the graph in ``precision``, its input and output unchanged, and what became of it.

    fp32 stay: the normalisation before the first convolution or matrix product, whose mean and std would lose bits;
    nodes with an input or output whose forecast exceeds the largest value over ``SAFETY_FACTOR`` (fp16 alone: bf16 has
    fp32's range); nodes with a weight that the precision cannot hold, while these are few; reductions, whose sums no
    forecast sees; and operators that the opset does not define for the precision (Conv takes bf16 from opset 22).

    A tensor ``x`` of half precision is named ``x_fp16`` or ``x_bf16``. One that is needed in both types is cast once,
    right after the node that computes it.

    Args:
        model: a flat fp32 graph of standard operators; it is not changed.
        precision: ``fp16`` or ``bf16``.
        ranges: the largest |value| of each tensor, from ``forecast``.

    Raises:
        UsageError: the precision is not known, ``ranges`` is of another graph, or the graph is not flat.
    """
    if precision not in _TYPES:
        raise UsageError(f"precision must be one of {', '.join(_TYPES)}; got {precision!r}")
    nested = [_label(node) for node in model.graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)]
    if nested:
        raise UsageError(f"only flat graphs can be cast to {precision}; node {nested[0]} holds a subgraph")
    target = _Target(model, precision)
    kept = _kept(model, target, _checked(model, target, ranges))
    result = _retyped(model, target, kept)
    clipped, flushed = _cast_weights(result, model, target)
    num_nodes = len(model.graph.node)
    return result, Cast(precision=precision, num_nodes=num_nodes, kept=kept, clipped=clipped, flushed=flushed)


class _Target:
    """A precision, and what a graph's opset defines for it."""

    def __init__(self, model: onnx.ModelProto, precision: HalfPrecision) -> None:
        self.precision = precision
        self.proto_type, self.dtype, self.largest = _TYPES[precision]
        self.floats = _float_tensors(model)
        self.full_names = {self.name(tensor): tensor for tensor in self.floats}
        self.weights = {w.name: _largest(w) for w in model.graph.initializer if w.name in self.floats}
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}

    def name(self, tensor: str) -> str:
        """Name of a tensor in this precision."""
        return f"{tensor}_{self.precision}"

    def defines(self, node: NodeProto) -> bool:
        """Whether the node can compute in this precision: all floats it gives and the first that it takes."""
        first = next((index for index, name in enumerate(node.input) if name in self.floats), None)
        if node.op_type == "Cast" or first is None:  # an attribute sets the type of what they give
            return False
        outputs = [index for index, name in enumerate(node.output) if name in self.floats]
        return self.takes(node, first) and all(self._allows(node, index, inputs=False) for index in outputs)

    def takes(self, node: NodeProto, index: int) -> bool:
        """Whether an input may be of this precision; the scales of Resize, for one, are always fp32."""
        return self._allows(node, index, inputs=True)

    def _allows(self, node: NodeProto, index: int, *, inputs: bool) -> bool:
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opsets.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            return False
        formals = schema.inputs if inputs else schema.outputs
        return f"tensor({self.dtype.name})" in formals[min(index, len(formals) - 1)].types


def _kept(model: onnx.ModelProto, target: _Target, ranges: Mapping[str, float]) -> dict[str, Reason]:
    """The nodes that stay fp32, in the graph's order, and why."""
    front = _front(model)
    reasons: dict[str, Reason] = {}
    for node in model.graph.node:
        if any(name in target.floats for name in (*node.input, *node.output)):
            reason = "normalisation" if _label(node) in front else _reason(node, target, ranges)
            if reason:
                reasons[_label(node)] = reason
    too_heavy = [label for label, reason in reasons.items() if reason == "weights"]
    if len(too_heavy) > MAX_WEIGHT_ISLANDS * len(model.graph.node):
        reasons = {label: reason for label, reason in reasons.items() if reason != "weights"}
    return reasons


def _reason(node: NodeProto, target: _Target, ranges: Mapping[str, float]) -> Reason | None:
    """Why a node behind the normalisation stays fp32; None if it does not."""
    if node.op_type in _REDUCTIONS:
        return "reduction"
    if not target.defines(node):
        return "unsupported"
    activations = [ranges[name] for name in (*node.input, *node.output) if name in ranges]
    weights = [target.weights[name] for name in node.input if name in target.weights]
    if target.precision == "fp16" and not all(value * SAFETY_FACTOR <= target.largest for value in activations):
        return "range"  # NaN too
    return "weights" if any(value > target.largest for value in weights) else None


def _front(model: onnx.ModelProto) -> set[str]:
    """The nodes that the first convolution or matrix product takes its images through."""
    nodes = model.graph.node
    first = next((node for node in nodes if node.op_type in _MATRIX_OPS), None)
    needed = set(first.input) if first else set()
    front = set()
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            front.add(_label(node))
    return front


def _checked(model: onnx.ModelProto, target: _Target, ranges: Mapping[str, float]) -> dict[str, float]:
    """The range of every computed float tensor; refused if one has none."""
    computed = [name for node in model.graph.node for name in node.output if name in target.floats]
    missing = [name for name in computed if name not in ranges]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(computed)} tensors have no range, {missing[0]} the first; "
            "every one must have its own: run forecast on this very graph"
        )
    return {name: ranges[name] for name in computed}


def _retyped(model: onnx.ModelProto, target: _Target, kept: Mapping[str, Reason]) -> onnx.ModelProto:
    """The graph with other types and with casts where they meet; the half-precision weights are still to come."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    for node in model.graph.node:
        graph.node.append(node)
        if _label(node) not in kept:
            _retype(graph.node[-1], target)
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    nodes = [part for node in graph.node for part in (node, *_casts(node, target, used))]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _retype(node: NodeProto, target: _Target) -> None:
    """Make a node take and give the half-precision tensors."""
    takes = [name in target.floats and target.takes(node, index) for index, name in enumerate(node.input)]
    for index, taken in enumerate(takes):
        if taken:
            node.input[index] = target.name(node.input[index])
    for index, name in enumerate(node.output):
        if name in target.floats:
            node.output[index] = target.name(name)


def _casts(node: NodeProto, target: _Target, used: set[str]) -> Iterator[NodeProto]:
    """The casts of what a node gives to the other type, where somebody uses that."""
    for name in node.output:
        low = target.name(name)
        if name in target.floats and low in used:
            yield helper.make_node("Cast", [name], [low], f"{low}_cast", to=target.proto_type)
        full = target.full_names.get(name)
        if full in used:
            yield helper.make_node("Cast", [name], [full], f"{full}_cast", to=TensorProto.FLOAT)


def _cast_weights(
    result: onnx.ModelProto, model: onnx.ModelProto, target: _Target
) -> tuple[dict[str, int], dict[str, int]]:
    """Give the graph its weights in the types that its nodes take; how many elements were clipped and flushed."""
    used = {name for node in result.graph.node for name in node.input}
    clipped, flushed = {}, {}
    del result.graph.initializer[:]
    for weight in model.graph.initializer:
        if weight.name in used:
            result.graph.initializer.append(weight)
        if weight.name in target.floats and target.name(weight.name) in used:
            array = numpy_helper.to_array(weight)
            low = np.clip(array, -target.largest, target.largest).astype(target.dtype)
            result.graph.initializer.append(numpy_helper.from_array(low, target.name(weight.name)))
            clipped[weight.name] = int((np.abs(array) > target.largest).sum())
            flushed[weight.name] = int(((array != 0) & (low == 0)).sum())
    return {k: v for k, v in clipped.items() if v}, {k: v for k, v in flushed.items() if v}


def _largest(weight: TensorProto) -> float:
    array = numpy_helper.to_array(weight)
    return float(np.abs(array).max()) if array.size else 0.0


def _label(node: NodeProto) -> str:
    return node.name or node.output[0]


__all__ = ["Cast", "HalfPrecision", "cast_graph", "computed_floats", "forecast", "observed"]
