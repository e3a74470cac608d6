"""What goes wrong in exports, planted: every hash is computed again, so that only a comparison can find it."""

import copy
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn

import mio_export.preprocess as preprocess_module
from mio_export.bundle import WEIGHTS
from mio_export.exporting import export
from mio_export.exporting.onnx import onnx_from_encoder, save_onnx
from mio_export.models import build_encoder
from mio_export.models.checkpoint import save_weights
from mio_export.parity import EVERYTHING, verify
from mio_export.preprocess import Preprocess


@pytest.fixture(scope="module")
def small(tmp_path_factory, encoder, photos):
    """A convolutional encoder and its bundle."""
    return encoder, export(encoder, tmp_path_factory.mktemp("b") / "small.mio", images=photos, max_batch=8).bundle


@pytest.fixture(scope="module")
def vit(tmp_path_factory, photos):
    """A vision transformer of 0.3 million weights, none of them zero, and its bundle."""
    torch.manual_seed(0)
    encoder = build_encoder("timm/test_vit", Preprocess(image_size=160, resize_size=160)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return encoder, export(encoder, tmp_path_factory.mktemp("b") / "vit.mio", images=photos, max_batch=8).bundle


def planted(subject, path, forge, *, change=None, edit=None):
    """Copy a bundle with an ONNX file of a changed encoder, or with an edited graph, and hash everything again."""
    encoder, bundle = subject
    copied = shutil.copytree(bundle.path, path)
    if change:
        changed = copy.deepcopy(encoder)
        with torch.no_grad():
            changed = change(changed) or changed
        model, _ = onnx_from_encoder(changed, max_batch=8)
    else:
        model = onnx.load(copied / "encoder.onnx")
        edit(model.graph)
    del model.metadata_props[:]
    save_onnx(model, copied / "encoder.onnx", provenance=bundle.manifest.common_json())
    forge(copied)
    return copied


def first(encoder, kind):
    return next(module for module in encoder.modules() if isinstance(module, kind))


def noise_on_one_weight(encoder):
    weight = [module.weight for module in encoder.modules() if isinstance(module, nn.Conv2d)][1]
    weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


def nan_in_one_channel(encoder):
    first(encoder, nn.BatchNorm2d).bias[3] = torch.nan


def batch_norm_in_training_mode(encoder):
    class Training(nn.Module):
        """Batch norm by the batch's own statistics, as in training."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
            scale, shift = (part.view(1, -1, 1, 1) for part in (self.norm.weight, self.norm.bias))
            return (x - mean) / torch.sqrt(variance + self.norm.eps) * scale + shift

    block = encoder.backbone.blocks[0]
    block[1] = Training(block[1])


def eps_a_hundred_times(encoder):
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps *= 100


def padding_by_reflection(encoder):
    first(encoder, nn.Conv2d).padding_mode = "reflect"
    convolution = first(encoder, nn.Conv2d)
    convolution._reversed_padding_repeated_twice = [p for p in reversed(convolution.padding) for _ in range(2)]


def wrong_mean(encoder):
    encoder.mean.add_(torch.tensor([2.0, -3.0, 1.0]).view(1, 3, 1, 1))


def wrong_std(encoder):
    encoder.std.mul_(1.05)


def constant_output(encoder):
    class Constant(nn.Module):
        """The same for every image."""

        def forward(self, pixels):
            return torch.ones(256) + 0 * pixels.mean((1, 2, 3))[:, None]

    encoder.backbone = Constant()


def transposed_layer(encoder):
    weight = encoder.backbone.blocks[0].attn.proj.weight
    weight.copy_(weight.T.clone())


def tanh_gelu(encoder):
    for block in encoder.backbone.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def shifted_position_embedding(encoder):
    encoder.backbone.pos_embed.copy_(encoder.backbone.pos_embed.roll(1, dims=1))


def output_columns_swapped(graph):
    _rename_output(graph, "kept")
    order = np.r_[np.arange(128, 256), np.arange(128)]
    graph.initializer.append(numpy_helper.from_array(order, "order"))
    graph.node.append(helper.make_node("Gather", ["kept", "order"], [graph.output[0].name], axis=1))


def output_added(graph):
    graph.output.append(helper.make_tensor_value_info("images_again", TensorProto.UINT8, ["batch", 32, 32, 3]))
    graph.node.append(helper.make_node("Identity", ["images"], ["images_again"]))


def output_of_another_type(graph):
    _rename_output(graph, "kept")
    graph.node.append(helper.make_node("Cast", ["kept"], [graph.output[0].name], to=TensorProto.DOUBLE))
    graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def batch_baked(graph):
    graph.initializer.append(helper.make_tensor("two", TensorProto.INT64, [4], [2, 32, 32, 3]))
    node = next(node for node in graph.node if "images" in node.input)
    node.input[list(node.input).index("images")] = "pair"
    graph.node.insert(0, helper.make_node("Reshape", ["images", "two"], ["pair"], name="the_culprit"))


def _rename_output(graph, name):
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = [name if found == output else found for found in node.output]


FAULTS = {
    "noise of 1 % on one weight": ("small", {"change": noise_on_one_weight}, "relative error"),
    "columns swapped": ("small", {"edit": output_columns_swapped}, "relative error"),
    "an output added": ("small", {"edit": output_added}, "must have one input and one output, has 1 and 2"),
    "output of another type": ("small", {"edit": output_of_another_type}, "output is float64, must be float32"),
    "NaN": ("small", {"change": nan_in_one_channel}, "rows are NaN or infinite"),
    "constant output": ("small", {"change": constant_output}, "relative error"),
    "batch baked": ("small", {"edit": batch_baked}, "batch 1: fails.*the_culprit"),
    "batch norm in training mode": ("small", {"change": batch_norm_in_training_mode}, "relative error"),
    "eps a hundred times": ("small", {"change": eps_a_hundred_times}, "relative error"),
    "wrong padding": ("small", {"change": padding_by_reflection}, "relative error"),
    "wrong mean": ("small", {"change": wrong_mean}, "relative error"),
    "wrong std": ("small", {"change": wrong_std}, "relative error"),
    "transposed layer": ("vit", {"change": transposed_layer}, "relative error"),
    "tanh for GELU": ("vit", {"change": tanh_gelu}, "relative error"),
    "wrong position embedding": ("vit", {"change": shifted_position_embedding}, "relative error"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_with_its_reason(request, photos, tmp_path, mio, forge, name):
    subject, fault, reason = FAULTS[name]
    path = planted(request.getfixturevalue(subject), tmp_path / "faulty.mio", forge, **fault)
    assert mio("verify", path).code == 0  # every hash holds, and the evidence fits
    refused = mio("verify", path, "--images", photos)
    assert refused.code == 3
    assert re.search(reason, refused.err), refused.err


def test_nan_on_both_sides_is_no_agreement(small, photos, tmp_path, mio, forge):
    path = planted(small, tmp_path / "faulty.mio", forge, change=nan_in_one_channel)
    broken = copy.deepcopy(small[0])
    with torch.no_grad():
        nan_in_one_channel(broken)
    save_weights(path / WEIGHTS, broken)
    forge(path)
    assert "encoder.onnx: says of itself another weights_sha256, space than the manifest" in mio("verify", path).err
    refused = mio("verify", path, "--images", photos)
    assert refused.code == 3
    assert "the encoder itself gives NaN" in refused.err


@pytest.mark.parametrize("subject", ["small", "vit"])
def test_without_a_fault_the_same_path_passes(request, photos, tmp_path, mio, forge, subject):
    path = planted(request.getfixturevalue(subject), tmp_path / "healthy.mio", forge, change=lambda encoder: None)
    result = mio("verify", path, "--images", photos)
    assert result.code == 0, result.err


# Eight faults of preprocessing: four in the graph, four in what decodes.


def swapped_channels(encoder):
    weight = first(encoder, nn.Conv2d).weight
    weight.copy_(weight.flip(1))


def not_divided(encoder):
    encoder.mean.div_(255)
    encoder.std.div_(255)


def normalised_twice(encoder):
    class Twice(nn.Module):
        """Subtracts the mean again."""

        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, pixels):
            return self.backbone((pixels - 0.45) / 0.225)

    encoder.backbone = Twice(encoder.backbone).eval()


@pytest.mark.parametrize("change", [swapped_channels, wrong_mean, not_divided, normalised_twice])
def test_wrong_preprocessing_in_the_graph_is_refused(small, photos, tmp_path, forge, change):
    report = verify(planted(small, tmp_path / "faulty.mio", forge, change=change), images=photos).reports[0]
    assert report.verdict == "refused"
    assert any(problem.startswith("golden image colour") for problem in report.problems)


def without_antialiasing(image, shorter_side, crop, interpolation):
    width, height = (int(shorter_side * extent / min(image.size)) for extent in image.size)
    tensor = torch.from_numpy(np.array(image).astype(np.float32)).reshape(image.height, image.width, -1)
    resized = nn.functional.interpolate(
        tensor.permute(2, 0, 1)[None], (height, width), mode="bilinear", align_corners=False, antialias=False
    )
    array = resized[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(np.uint8)
    return centre(Image.fromarray(array.squeeze()), crop)


def nearest(image, shorter_side, crop, interpolation):
    size = tuple(int(shorter_side * extent / min(image.size)) for extent in image.size)
    return centre(image.resize(size, Image.Resampling.NEAREST), crop)


def centre(image, crop, shift=0):
    left, top = round((image.width - crop) / 2) + shift, round((image.height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))


def sixteen_pixels_off(image, shorter_side, crop, interpolation):
    size = tuple(int(shorter_side * extent / min(image.size)) for extent in image.size)
    return centre(image.resize(size, Image.Resampling.BILINEAR), crop, shift=16)


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("_resized_crop", without_antialiasing),
        ("_resized_crop", nearest),
        ("_resized_crop", sixteen_pixels_off),
        ("_oriented", lambda image: image),
    ],
    ids=["no antialiasing", "nearest", "crop off by 16", "EXIF ignored"],
)
def test_a_decoder_that_differs_is_refused(small, photos, monkeypatch, mio, name, faulty):
    monkeypatch.setattr(preprocess_module, name, faulty)
    refused = mio("verify", small[1].path, "--images", photos)
    assert refused.code == 3
    assert "preprocessing: golden image" in refused.err


def test_training_evaluation_and_embedding_decode_golden_images_as_parity_does(encoder, tmp_path):
    from mio_export.console.progress import Progress
    from mio_export.embedding.pipeline import decode
    from mio_export.parity.golden import golden_files, golden_pixels
    from mio_export.sources import list_images
    from mio_export.train.data import load_images, open_data

    for name, data in golden_files().items():
        (tmp_path / f"{name}.{'tiff' if name == 'CMYK' else 'png'}").write_bytes(data)
    expected = golden_pixels(encoder.preprocess)
    files = list_images(tmp_path).files
    for file in files:
        assert np.array_equal(decode(file, encoder.preprocess).pixels, expected[Path(file.key).stem])
    loaded = load_images(open_data(tmp_path).train, encoder.preprocess, Progress())
    pixels = {array.tobytes() for array in loaded.pixels}
    assert pixels <= {array.tobytes() for array in expected.values()}
    assert len(pixels) >= len(expected) / 2  # the others are held out


def test_a_hundred_flipped_bytes_are_found(bundle, tmp_path, mio):
    """In artifacts, weights, sidecar, golden images, reports and the manifest."""
    copied = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    files = sorted(path for path in copied.rglob("*") if path.is_file() and path.name != "report.html")
    draw = random.Random(0)
    found = 0
    for _ in range(100):
        path = draw.choice(files)
        data = bytearray(path.read_bytes())
        position, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        data[position] ^= bit
        path.write_bytes(data)
        found += mio("verify", copied).code == 3
        data[position] ^= bit
        path.write_bytes(data)
    assert found == 100
    assert mio("verify", copied).code == 0


def test_hashes_are_checked_without_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = sys.modules['onnx'] = None;"
        f"from mio_export import verify; assert verify({str(bundle.path)!r}).passed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_static_height_is_checked_in_the_artifact_itself(bundle, photos):
    for report in verify(bundle.path, images=photos, runtimes=EVERYTHING).reports:
        assert report.shapes == {"batch 33": "accepted", "height 40": "rejected", "4 channels": "rejected"}
