import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mio_export.errors import UsageError
from mio_export.exporting.half_precision import cast_graph, forecast, observed
from mio_export.exporting.onnx import onnx_from_encoder, save_onnx
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess

LARGEST = {"fp16": 65504.0, "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}


def exported(encoder, path):
    save_onnx(onnx_from_encoder(encoder, max_batch=32)[0], path, provenance="{}")
    return onnx.load(path)


def pixels(crops, preprocess):
    return np.stack([preprocess.pixels(crop) for crop in crops])


def embed(model, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["embeddings"], {"images": images})[0]


def embed_literally(model, images):
    """In the types that the graph says; ONNX Runtime computes neighbouring fp16 nodes in fp32 on a CPU."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(model).run(None, {"images": images})[0]


def cosines(first, second):
    return (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def relative(candidate, reference):
    return np.linalg.norm(candidate - reference, axis=1) / np.linalg.norm(reference, axis=1)


def naive(model):
    """Every weight and every tensor behind the first Cast in fp16, nothing else."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    for weight in result.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    for node in result.graph.node:
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT16
    result.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return result


class Residual(torch.nn.Module):
    """``depth`` residual blocks; the convolution in the middle of one of them gives values of about 1e5."""

    def __init__(self, depth):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.inner = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(depth))
        self.outer = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(depth))
        with torch.no_grad():
            self.inner[depth // 2].weight.mul_(1e5)
            self.inner[depth // 2].bias.mul_(1e5)
            self.outer[depth // 2].weight.mul_(1e-5)

    def forward(self, images):
        features = self.stem(images)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            features = features + outer(torch.relu(inner(features)))
        return features.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def loud(encoder, photo_crops, tmp_path_factory):
    """A graph with activations of 1e5 in one block, and photos for it."""
    import copy
    from dataclasses import replace

    torch.manual_seed(0)
    loud = copy.deepcopy(encoder)
    loud.backbone = Residual(20).eval()
    loud.spec = replace(loud.spec, embedding_dim=16)
    return exported(loud, tmp_path_factory.mktemp("loud") / "loud.onnx"), pixels(photo_crops, loud.preprocess)


@pytest.fixture(scope="module")
def small(encoder, photo_crops, tmp_path_factory):
    model = exported(encoder, tmp_path_factory.mktemp("small") / "small.onnx")
    images = pixels(photo_crops, encoder.preprocess)
    return model, images, forecast(model, [images])


def test_activations_beyond_fp16_stay_islands_of_fp32(loud):
    model, images = loud
    ranges = forecast(model, [images])
    assert 1e5 < max(ranges.values()) < 1e6
    half, cast = cast_graph(model, "fp16", ranges=ranges)
    onnx.checker.check_model(half, full_check=True)
    assert not np.isfinite(embed_literally(naive(model), images[:1])).all()
    assert relative(embed_literally(half, images[:1]), embed(model, images[:1])).max() < 5e-3
    embeddings, reference = embed(half, images), embed(model, images)
    assert embeddings.dtype == np.float32
    assert relative(embeddings, reference).max() < 3e-3
    assert cosines(embeddings, reference).min() > 0.99999
    operators = {node.name: node.op_type for node in model.graph.node}
    assert sorted(operators[name] for name in cast.islands) == ["Conv", "Conv", "Relu"]
    assert cast.num_nodes == len(model.graph.node) >= 60
    assert len(cast.kept) <= cast.num_nodes / 10  # the normalisation and the mean pooling are among them


def test_the_graph_computes_in_fp32_what_is_said_to_be_kept_and_nothing_else(loud):
    model, images = loud
    half, cast = cast_graph(model, "fp16", ranges=forecast(model, [images]))
    inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    old = {node.name for node in model.graph.node}
    full = [n.name for n in half.graph.node if n.name in old and types.get(n.output[0]) == TensorProto.FLOAT]
    assert full == list(cast.kept)
    casts = [node for node in half.graph.node if node.name not in old]
    assert {node.op_type for node in casts} == {"Cast"}
    assert len(casts) == len({(node.input[0], node.attribute[0].i) for node in casts}) == 4


def test_a_forecast_is_what_numpy_finds_over_all_batches(small):
    model, images, ranges = small
    names = list(ranges)
    found = np.max([[np.abs(v).max() for v in values] for values in observed(model, names, [images])], axis=0)
    in_batches = forecast(model, (images[start : start + 5] for start in range(0, len(images), 5)))
    np.testing.assert_allclose(list(in_batches.values()), found, rtol=1e-6)


@pytest.mark.parametrize("opset", [20, 22])
def test_resnet18_in_fp16_is_as_near_to_float64_as_fp16_is(opset, photo_crops, tmp_path, monkeypatch):
    monkeypatch.setattr("mio_export.exporting.onnx.OPSET", opset)
    torch.manual_seed(0)
    encoder = build_encoder("torchvision/resnet18", Preprocess(image_size=64, resize_size=64))
    images = pixels(photo_crops, encoder.preprocess)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        encoder(torch.from_numpy(images))
        model = exported(encoder.eval(), tmp_path / "resnet18.onnx")
        reference = encoder.double()(torch.from_numpy(images)).numpy()
    half, cast = cast_graph(model, "fp16", ranges=forecast(model, [images[:12]]))
    onnx.checker.check_model(half, full_check=True)
    assert len(half.SerializeToString()) < 0.51 * len(model.SerializeToString())
    assert sorted(set(cast.kept.values())) == ["normalisation", "reduction"]
    assert 1e-4 < relative(embed(half, images), reference).max() < 4e-3
    brain, cast = cast_graph(model, "bf16", ranges=forecast(model, [images[:12]]))
    onnx.checker.check_model(brain, full_check=True)
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    assert convolutions <= cast.kept.keys() if opset == 20 else not convolutions & cast.kept.keys()


def test_a_vision_transformer_works_in_fp16(photo_crops, tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("timm/vit_tiny_patch16_224", Preprocess(image_size=224, resize_size=224)).eval()
    images = pixels(photo_crops[::12], encoder.preprocess)
    model = exported(encoder, tmp_path / "vit.onnx")
    half, cast = cast_graph(model, "fp16", ranges=forecast(model, [images]))
    onnx.checker.check_model(half, full_check=True)
    assert set(cast.kept.values()) == {"normalisation"}
    assert relative(embed(half, images), embed(model, images)).max() < 3e-3


def with_weights(model, factor, count):
    """The graph with one element of ``count`` convolutions set to 1e5 times ``factor`` and one to a tiny value."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {node.input[1] for node in changed.graph.node if node.op_type == "Conv"}
    for weight in [w for w in changed.graph.initializer if w.name in weights][:count]:
        array = numpy_helper.to_array(weight).copy()
        array.flat[0], array.flat[1] = factor * 1e5, 1e-9
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return changed


def counts(model, precision):
    """What numpy finds clipped and flushed of each weight."""
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[precision]
    clipped, flushed = {}, {}
    for weight in model.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.dtype == np.float32 and weight.name not in {"mean", "std"}:
            with np.errstate(over="ignore"):
                low = array.astype(dtype)
            clipped[weight.name] = int((np.abs(array) > LARGEST[precision]).sum())
            flushed[weight.name] = int(((low == 0) & (array != 0)).sum())
    return [{name: n for name, n in found.items() if n} for found in (clipped, flushed)]


def test_many_weights_beyond_fp16_are_clipped_and_counted_as_numpy_counts(loud):
    model, images = loud
    quiet = dict.fromkeys(forecast(model, [images[:1]]), 1.0)
    changed = with_weights(model, -1, 30)
    half, cast = cast_graph(changed, "fp16", ranges=quiet)
    assert [cast.clipped, cast.flushed] == counts(changed, "fp16")
    assert len(cast.clipped) == 30 <= len(cast.flushed)
    low = {weight.name: numpy_helper.to_array(weight) for weight in half.graph.initializer}
    assert {low[f"{name}_fp16"].flat[0] for name in cast.clipped} == {-65504.0}
    brain, cast = cast_graph(changed, "bf16", ranges=quiet)
    onnx.checker.check_model(brain, full_check=True)
    assert [cast.clipped, cast.flushed] == counts(changed, "bf16") == [{}, {}]


def test_a_few_nodes_with_weights_beyond_fp16_stay_fp32(loud):
    model, images = loud
    changed = with_weights(model, 1, 2)
    _, cast = cast_graph(changed, "fp16", ranges=dict.fromkeys(forecast(model, [images[:1]]), 1.0))
    assert list(cast.kept.values()).count("weights") == 2
    assert cast.clipped == {}


def test_bf16_keeps_no_islands_and_is_near_to_fp32_in_openvino(small):
    openvino = pytest.importorskip("openvino")
    model, images, _ = small
    model = onnx.version_converter.convert_version(model, 22)
    ranges = forecast(model, [images])
    half, cast = cast_graph(model, "bf16", ranges=dict.fromkeys(ranges, 1e30))
    onnx.checker.check_model(half, full_check=True)
    assert cast.islands == ()
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(half.SerializeToString()), "CPU")
    embeddings = compiled(images)[0]
    assert 1e-4 < relative(embeddings, embed(model, images)).max() < 3e-2


def test_what_is_not_finite_or_too_near_to_the_largest_value_stays_fp32(small):
    model, _, ranges = small
    name = next(node for node in model.graph.node if node.op_type == "Relu").output[0]
    for value, is_kept in ((32000.0, False), (33000.0, True), (float("inf"), True), (float("nan"), True)):
        _, cast = cast_graph(model, "fp16", ranges={**ranges, name: value})
        assert bool(cast.islands) == is_kept, value


def test_what_cannot_be_cast_is_refused(small):
    model, _, ranges = small
    with pytest.raises(UsageError, match="precision must be one of fp16, bf16; got 'fp8'"):
        cast_graph(model, "fp8", ranges=ranges)
    with pytest.raises(UsageError, match=r"\d+ of \d+ tensors have no range, _to_copy the first; .* run forecast on"):
        cast_graph(model, "fp16", ranges={})
    with pytest.raises(UsageError, match="no images to run the graph on; at least one batch of real images is needed"):
        forecast(model, [])
    nested = onnx.ModelProto()
    nested.CopyFrom(model)
    branch = helper.make_graph([], "branch", [], [])
    nested.graph.node.append(helper.make_node("If", ["c"], ["d"], "choice", then_branch=branch, else_branch=branch))
    with pytest.raises(UsageError, match="only flat graphs can be cast to fp16; node choice holds a subgraph"):
        cast_graph(nested, "fp16", ranges=ranges)
