"""Faults are planted in artifacts and the manifest is hashed again, so that only a comparison can find them."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mio_export.errors import UsageError
from mio_export.files import sha256_file
from mio_export.parity import EVERYTHING, budget_for, compare, verify

FP32 = budget_for("fp32", own_rms_error=5e-7, own_row_error=1e-6)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy.mio")


def plant(copy, fault, forge):
    """Change the ONNX graph of a bundle and recompute every hash in its manifest and its evidence."""
    path = copy / "encoder.onnx"
    model = onnx.load(path)
    fault(model.graph)
    onnx.save(model, path)
    forge(copy)


def initializer(graph, select):
    return next(tensor for tensor in graph.initializer if select(numpy_helper.to_array(tensor)))


def change(tensor, function):
    values = function(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def noise_on_one_layer(graph):
    rng = np.random.default_rng(0)
    weight = initializer(graph, lambda values: values.shape[:2] == (64, 32))
    change(weight, lambda values: values * (1 + 0.01 * rng.standard_normal(values.shape)))


def nan_outputs(graph):
    bias = initializer(graph, lambda values: values.shape == (256,))
    change(bias, lambda values: np.full_like(values, np.nan))


def wrong_mean(graph):
    mean = initializer(graph, lambda values: values.shape[1:] == (3,) and values.max() > 100)
    change(mean, lambda values: values + 2)


def swapped_channels(graph):
    weight = initializer(graph, lambda values: values.shape[:2] == (32, 3))
    change(weight, lambda values: values[:, ::-1])


def baked_batch(graph):
    """A reshape that holds for one image only."""
    shape = helper.make_tensor("one", TensorProto.INT64, [4], [1, 32, 32, 3])
    graph.initializer.append(shape)
    node = next(node for node in graph.node if "images" in node.input)
    node.input[list(node.input).index("images")] = "single"
    graph.node.insert(0, helper.make_node("Reshape", ["images", "one"], ["single"]))


def neighbours_mixed(graph):
    """Rows that take a little of the batch's mean: invisible at batch 1."""
    output = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["alone" if name == output else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axis"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "share"))
    graph.node.extend(
        [
            helper.make_node("ReduceMean", ["alone", "axis"], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", "share"], ["part"]),
            helper.make_node("Sub", ["alone", "mean"], ["distance"]),
            helper.make_node("Mul", ["distance", "share"], ["pull"]),
            helper.make_node("Sub", ["alone", "pull"], [output]),
        ]
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (noise_on_one_layer, "relative error"),
        (nan_outputs, "rows are NaN or infinite"),
        (wrong_mean, "relative error"),
        (swapped_channels, "relative error"),
        (baked_batch, "batch 2: fails"),
        (neighbours_mixed, "batch 2: row"),
    ],
)
def test_a_planted_fault_is_refused_by_comparison(copy, photos, mio, forge, fault, reason):
    plant(copy, fault, forge)
    assert mio("verify", copy).code == 0  # every hash holds, and the evidence fits
    refused = mio("verify", copy, "--images", photos, "--all")
    assert refused.code == 3
    assert reason in refused.err
    assert "encoder.torchscript:" not in refused.err  # the healthy artifact is not blamed


def test_grey_images_alone_would_hide_swapped_channels(copy, photos, tmp_path, mio, forge):
    from PIL import Image

    grey = tmp_path / "grey"
    grey.mkdir()
    for index, path in enumerate(photos.rglob("*.jpg")):
        Image.open(path).convert("L").save(grey / f"{index}.png")
    plant(copy, swapped_channels, forge)
    assert mio("verify", copy, "--images", grey).code == 3


def test_a_healthy_bundle_passes(bundle, photos, mio):
    result = mio("verify", bundle.path, "--images", photos, "--all")
    assert result.code == 0, result.err
    assert [line.split()[-1] for line in result.out.splitlines() if line.startswith("  encoder")] == ["proved"] * 2
    reports = verify(bundle.path, images=photos, runtimes=EVERYTHING).reports
    for report in reports:
        assert [comparison.batch_size for comparison in report.comparisons] == [1, 2, 17, 32]
        assert all(comparison.num_rows == 24 for comparison in report.comparisons)
        assert len(report.golden) == 10


def test_evidence_names_every_input_by_its_hash(bundle):
    for artifact in bundle.manifest.artifacts:
        report = json.loads((bundle.path / artifact.parity.report).read_text())
        assert report["verdict"] == "proved"
        assert report["evidence"]["artifact_sha256"] == sha256_file(bundle.path / artifact.file)
        assert report["evidence"]["weights_sha256"] == sha256_file(bundle.path / "encoder.safetensors")
        assert len(report["evidence"]["images_sha256"]) == 64
        assert {"python", "torch", "numpy"} <= set(report["versions"])


@pytest.mark.parametrize(
    "name", ["encoder.onnx", "encoder.torchscript", "encoder.safetensors", "parity/onnx-fp32.json"]
)
def test_a_flipped_byte_in_any_file_is_found_by_its_hash(copy, mio, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = mio("verify", copy)
    assert result.code == 3
    assert name in result.err


def test_a_missing_file_and_a_changed_contract_are_found(copy, mio):
    (copy / "encoder.torchscript").unlink()
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"background": 255', '"background": 0'))
    result = mio("verify", copy)
    assert result.code == 3
    assert "manifest.json is damaged: it was changed after it was written" in result.err
    (copy / "manifest.json").write_text(text)
    result = mio("verify", copy)
    assert result.code == 3
    assert "encoder.torchscript: missing" in result.err


def test_images_that_cannot_be_read_prove_nothing(bundle, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(UsageError, match="can be read; parity needs real images"):
        verify(bundle.path, images=tmp_path)


def rows(num_rows=64, dim=16, seed=0):
    return np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)


def test_equal_rows_pass():
    assert not compare(rows(), rows(), batch_size=1, budget=FP32).problems


def test_one_bad_row_among_many_is_refused():
    candidate = rows(512)
    candidate[77] = candidate[78]
    whole = float((rows(512) * candidate).sum() / np.linalg.norm(rows(512)) / np.linalg.norm(candidate))
    assert whole > 0.997  # what a cosine over the whole tensor would have said
    comparison = compare(rows(512), candidate, batch_size=1, budget=FP32)
    assert comparison.problems
    assert comparison.worst_row == 77


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        (rows()[:63], "output has shape (63, 16), the encoder gives (64, 16)"),
        (rows()[:, :15], "output has shape"),
        (rows().astype(np.float64), "output is float64, must be float32"),
        (np.full((64, 16), np.inf, np.float32), "64 of 64 rows are NaN or infinite"),
        (np.zeros((64, 16), np.float32), "cosine 0.0000000 is below"),
        (rows() * 1.001, "relative error"),
        (-rows(), "cosine -1.0000000 is below"),
    ],
    ids=["a row less", "a column less", "dtype", "infinite", "zero", "scaled", "mirrored"],
)
def test_what_differs_is_refused(candidate, problem):
    problems = compare(rows(), candidate, batch_size=1, budget=FP32).problems
    assert any(problem in found for found in problems), problems


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_nan_or_zero_on_both_sides_is_no_agreement(value):
    both = np.full((4, 3), value, np.float32)
    assert compare(both, both, batch_size=1, budget=FP32).problems


def test_nothing_compared_is_a_failure():
    empty = np.empty((0, 16), np.float32)
    assert "nothing to compare" in compare(empty, empty, batch_size=1, budget=FP32).problems[0]
