import json
import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mio_export.errors import UsageError
from mio_export.exporting.int8 import MIN_IMAGES, calibrate, quantize
from mio_export.exporting.onnx import onnx_from_encoder, save_onnx
from mio_export.metrics import neighbor_agreement
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess


@pytest.fixture(scope="module")
def images():
    """160 photo crops to calibrate on and 64 others, 64 px."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    preprocess = Preprocess(image_size=64, resize_size=64)
    crops = []
    for index in range(224):
        photo = load_sample_images().images[index % 2]
        size = int(rng.integers(100, 300))
        top, left = (int(rng.integers(0, length - size)) for length in photo.shape[:2])
        crops.append(preprocess.pixels(Image.fromarray(photo[top : top + size, left : left + size])))
    return np.stack(crops[:160]), np.stack(crops[160:])


@pytest.fixture(scope="module")
def model(images, tmp_path_factory):
    """A ResNet-18 of fresh weights, 64 px, whose batch norms have seen photos."""
    torch.manual_seed(0)
    encoder = build_encoder("torchvision/resnet18", Preprocess(image_size=64, resize_size=64))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        encoder(torch.from_numpy(images[0][:32]))
    path = tmp_path_factory.mktemp("int8") / "resnet18.onnx"
    save_onnx(onnx_from_encoder(encoder.eval(), max_batch=64)[0], path, provenance="{}")
    return onnx.load(path)


@pytest.fixture(scope="module")
def ranges(model, images):
    return calibrate(model, batches(images[0]), images_sha256="crops", cache=None)


def batches(images):
    return (images[start : start + 16] for start in range(0, len(images), 16))


def embed(model, images, batch_size=16):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    starts = range(0, len(images), batch_size)
    return np.concatenate([session.run(None, {"images": images[at : at + batch_size]})[0] for at in starts])


def cosines(first, second):
    return (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def with_outlier(model):
    """The same function with one channel 1000 times as large between two convolutions."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {weight.name: weight for weight in changed.graph.initializer}
    producers = {node.output[0]: node for node in changed.graph.node}
    for second in [node for node in changed.graph.node if node.op_type == "Conv"]:
        relu = producers[second.input[0]]
        first = producers.get(relu.input[0])
        if relu.op_type == "Relu" and first.op_type == "Conv":
            for name in first.input[1:]:
                scale(weights[name], (0,), 1000)
            scale(weights[second.input[1]], (slice(None), 0), 1 / 1000)
    return changed


def scale(weight, where, factor):
    array = numpy_helper.to_array(weight).copy()
    array[where] *= factor
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))


def test_int8_is_near_to_fp32_on_images_it_was_not_calibrated_on(model, ranges, images):
    quantized = quantize(model, ranges)
    onnx.checker.check_model(quantized, full_check=True)
    reference, embeddings = embed(model, images[1]), embed(quantized, images[1])
    assert embeddings.dtype == np.float32
    assert cosines(reference, embeddings).min() > 0.985
    assert cosines(reference, embeddings).mean() > 0.99
    assert neighbor_agreement(reference, embeddings, k=10) > 0.85
    assert quantized.ByteSize() < 0.27 * model.ByteSize()


def test_an_embedding_does_not_depend_on_its_neighbours(model, ranges, images):
    quantized = quantize(model, ranges)
    np.testing.assert_array_equal(embed(quantized, images[1][:8], batch_size=1), embed(quantized, images[1][:8]))


def test_weights_are_int8_by_channel_and_activations_uint8(model, ranges):
    graph = quantize(model, ranges).graph
    initializers = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    for node in [node for node in graph.node if node.op_type == "Conv"]:
        activation, weight = producers[node.input[0]], producers[node.input[1]]
        assert initializers[activation.input[2]].dtype == np.uint8
        assert initializers[weight.input[0]].dtype == np.int8
        assert initializers[weight.input[1]].shape == (len(initializers[weight.input[0]]),)
    assert graph.output[0].name == "embeddings"
    assert producers["embeddings"].op_type not in {"QuantizeLinear", "DequantizeLinear"}


def test_outlier_channels_make_int8_collapse_and_leave_fp32_alone(model, ranges, images):
    outlier = with_outlier(model)
    reference = embed(model, images[1])
    assert cosines(reference, embed(outlier, images[1])).min() > 0.9999
    found = calibrate(outlier, batches(images[0]), images_sha256="crops", cache=None)
    assert max(high for _, high in found.extremes.values()) > 1000 > max(high for _, high in ranges.extremes.values())
    assert cosines(reference, embed(quantize(outlier, found), images[1])).mean() < 0.8


def test_two_runs_give_the_same_bytes_and_leave_logging_alone(model, ranges, capfd):
    root = logging.getLogger()
    before = (root.handlers[:], root.level, root.manager.disable)
    first, second = (quantize(model, ranges).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert (root.handlers, root.level, root.manager.disable) == before
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_ranges_are_what_numpy_finds_and_come_from_the_cache_again(encoder, images, tmp_path):
    path = tmp_path / "small.onnx"
    save_onnx(onnx_from_encoder(encoder, max_batch=32)[0], path, provenance="{}")
    model, pixels = onnx.load(path), images[0][:, :32, :32]
    ranges = calibrate(model, batches(pixels), images_sha256="a", cache=tmp_path / "cache")
    assert ranges.num_images == 160
    embeddings = embed(model, pixels)
    np.testing.assert_allclose(ranges.extremes["embeddings"], (embeddings.min(), embeddings.max()), rtol=1e-4)
    assert calibrate(model, (), images_sha256="a", cache=tmp_path / "cache") == ranges  # no image is looked at
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_text()
    other = json.dumps({**json.loads(whole), "content": json.loads(whole)["content"].replace("160", "161")})
    for damage in ("", whole[: len(whole) // 2], "[]", "null", other):
        file.write_text(damage)
        assert calibrate(model, batches(pixels), images_sha256="a", cache=tmp_path / "cache") == ranges
        assert file.read_text() == whole
    calibrate(model, batches(pixels[:128]), images_sha256="b", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_too_few_images_are_refused_and_not_cached(model, images, tmp_path):
    assert MIN_IMAGES == 128
    with pytest.raises(UsageError, match="int8 needs 128 or more images to calibrate on, got 16"):
        calibrate(model, batches(images[0][:16]), images_sha256="few", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "text"), [(float("inf"), "-1.0 to inf"), (float("nan"), "-1.0 to nan")])
def test_a_tensor_that_is_not_finite_is_refused(model, ranges, value, text):
    from dataclasses import replace

    broken = replace(ranges, extremes={**ranges.extremes, "relu": (-1.0, value)})
    with pytest.raises(UsageError, match=f"the range of tensor relu is {text}, must be finite; calibrate this very gr"):
        quantize(model, broken)
