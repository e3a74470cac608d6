import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mio_export.bundle import load_bundle
from mio_export.errors import GateError, UsageError
from mio_export.exporting import export
from mio_export.models import encoder_from_weights, load_encoder
from mio_export.parity import verify
from mio_export.runtimes import open_runtime
from mio_export.store import load_embeddings


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_holds_these_files(bundle):
    assert names(bundle.path) == [
        "encoder.onnx",
        "encoder.safetensors",
        "encoder.torchscript",
        "manifest.json",
        "parity",
        "report.html",
    ]
    assert names(bundle.path / "parity") == ["golden.safetensors", "onnx-fp32.json", "torchscript-fp32.json"]
    rows = json.loads((bundle.path / "manifest.json").read_text())["artifacts"]
    assert all({"file", "format", "precision", "sha256", "parity"} <= row.keys() for row in rows)
    assert load_bundle(bundle.path).manifest == bundle.manifest


def test_the_graph_takes_uint8_images_of_any_batch(bundle):
    model = onnx.load(bundle.path / "encoder.onnx")
    onnx.checker.check_model(model, full_check=True)
    (graph_input,), (graph_output,) = model.graph.input, model.graph.output
    shape = graph_input.type.tensor_type.shape.dim
    assert graph_input.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape[0].dim_param == "batch"
    assert [dim.dim_value for dim in shape[1:]] == [32, 32, 3]
    assert (graph_input.name, graph_output.name) == ("images", "embeddings")
    assert [output.dim_param or output.dim_value for output in graph_output.type.tensor_type.shape.dim] == [
        "batch",
        256,
    ]


def test_no_path_and_no_user_name_is_in_any_file(bundle):
    parts = {b"site-packages", str(Path.home()).encode(), str(Path(__file__).parents[2]).encode(), b"/tmp/"}
    for path in bundle.path.rglob("*"):
        if path.is_file():
            contents = [path.read_bytes()]
            if path.suffix == ".torchscript":
                archive = zipfile.ZipFile(path)
                contents = [archive.read(name) for name in archive.namelist()]
            for content in contents:
                assert not [part for part in parts if part in content], path


def test_two_exports_of_one_encoder_have_the_same_bytes(bundle, encoder, photos, tmp_path):
    export(encoder, tmp_path / "encoder.mio", formats=("onnx", "torchscript"), images=photos, max_batch=32)
    for path in bundle.path.rglob("*"):
        if path.is_file() and path.name != "report.html":  # it shows how fast each was
            again = tmp_path / "encoder.mio" / path.relative_to(bundle.path)
            assert again.read_bytes() == path.read_bytes(), path


def test_normalize_is_in_the_graph_and_is_another_space(bundle, run_folder, photos, tmp_path):
    result = export(run_folder, tmp_path / "unit.mio", formats=("onnx", "torchscript"), images=photos, normalize=True)
    assert result.bundle.manifest.space != bundle.manifest.space
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for name in ("onnxruntime", "torchscript", "torch"):
        with open_runtime(result.bundle, name) as runtime:
            np.testing.assert_allclose(np.linalg.norm(runtime.embed(images), axis=1), 1, rtol=1e-5)


class BatchDependent(torch.nn.Module):
    """A backbone whose rows depend on their neighbours."""

    def forward(self, pixels):
        features = pixels.mean(dim=(2, 3))
        return features - 0.5 * features.mean(dim=0)


def test_an_encoder_whose_rows_depend_on_their_neighbours_is_refused_and_kept(encoder, photos, tmp_path):
    import copy
    from dataclasses import replace

    broken = copy.deepcopy(encoder)
    broken.backbone = BatchDependent()
    broken.spec = replace(broken.spec, embedding_dim=3)
    with pytest.raises(GateError, match=r"refused by parity: onnx fp32: batch 1: (.|\n)*kept for inspection") as caught:
        export(broken, tmp_path / "broken.mio", images=photos)
    assert caught.value.exit_code == 3
    assert names(tmp_path) == ["broken.mio.rejected"]
    assert {"encoder.onnx.rejected", "report.html"} <= set(names(tmp_path / "broken.mio.rejected"))
    report = json.loads((tmp_path / "broken.mio.rejected" / "parity" / "onnx-fp32.json").read_text())
    assert report["verdict"] == "refused"


def test_a_refused_export_leaves_the_old_bundle_alone(encoder, photos, tmp_path, monkeypatch):
    path = tmp_path / "encoder.mio"
    export(encoder, path, images=photos)
    before = (path / "manifest.json").read_bytes()
    monkeypatch.setattr("mio_export.exporting.graphs.onnx_from_encoder", noisy)
    with pytest.raises(GateError, match="refused by parity"):
        export(encoder, path, images=photos)
    assert (path / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    export(encoder, path, images=photos)
    assert names(tmp_path) == ["encoder.mio"]  # a good export clears what was rejected


def noisy(encoder, **options):
    """An exporter that loses one percent on one layer."""
    import copy

    from mio_export.exporting.onnx import onnx_from_encoder

    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        weight = changed.backbone.blocks[1][0].weight
        weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return onnx_from_encoder(changed, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["coreml"]}, "format must be one of onnx, .*, tensorrt-rtx; got coreml"),
        ({"formats": []}, "format must be one of onnx, .*; got none"),
        ({"precisions": ["int4"]}, "precision must be one of fp32, fp16, bf16, int8; got int4"),
        ({"max_batch": 0}, "max_batch must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused(encoder, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(encoder, tmp_path / "x.mio", **options)


def test_a_folder_that_is_no_bundle_is_not_overwritten(encoder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        export(encoder, tmp_path / "data")


def test_a_bundle_in_which_somebody_keeps_other_things_is_not_overwritten(bundle, encoder, tmp_path):
    copied = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"also holds notes.txt, which would be lost"):
        export(encoder, copied)


def test_the_callers_encoder_is_left_as_it_was(encoder, photos, tmp_path):
    spec = encoder.spec
    export(encoder, tmp_path / "unit.mio", images=photos, normalize=True)
    assert encoder.spec == spec


def test_the_evaluation_of_a_run_comes_along_only_if_it_is_of_these_weights(run_folder, bundle, photos, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    scores = {
        "weights_sha256": bundle.manifest.weights_sha256,
        "scores": {"trained": {"knn": None, "copy_recall": {"1": 0.5}}},
    }
    (run / "evaluation.json").write_text(json.dumps(scores))
    assert export(run, tmp_path / "a.mio", images=photos).bundle.manifest.metrics == scores
    (run / "evaluation.json").write_text(json.dumps({**scores, "weights_sha256": "0"}))
    assert export(run, tmp_path / "b.mio", images=photos).bundle.manifest.metrics is None


def test_batches_of_one_can_be_the_whole_declared_range(encoder, photos, tmp_path):
    reports = export(encoder, tmp_path / "one.mio", images=photos, max_batch=1).reports
    assert [comparison.batch_size for comparison in reports[0].comparisons] == [1]


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("resnet18", 64),
        ("timm/mobilenetv3_small_050", 64),
        pytest.param("resnet50", 224, marks=pytest.mark.slow),
        pytest.param("timm/vit_tiny_patch16_224", 224, marks=pytest.mark.slow),
    ],
)
def test_the_whole_path_for_an_encoder_that_was_not_trained_here(mio, photos, tmp_path, backbone, size):
    import timm
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    library, _, name = backbone.rpartition("/")
    model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    weights, path, out = tmp_path / "weights.safetensors", tmp_path / "foreign.mio", tmp_path / "store"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    options = ["--preprocess", f"image_size={size}", "--images", photos, "--max-batch", 8]
    result = mio(
        "export", "--backbone", backbone, "--weights", weights, "-o", path, "-f", "onnx", "-f", "torchscript", *options
    )
    assert result.code == 0, result.err
    assert result.out.count("proved") == 2
    result = mio("verify", path, "--images", photos)
    assert result.code == 0, result.err
    worst = min(c.min_cosine for report in verify(path, images=photos).reports for c in report.comparisons)
    assert worst >= 0.999999
    assert mio("embed", path, photos, "-o", out, "--batch-size", 8).code == 0
    assert load_embeddings(out).vectors.shape == (24, load_bundle(path).manifest.encoder.embedding_dim)
    # the classifier was left out, everything else is the model's own
    encoder = load_encoder(path)
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        model.eval()
        expected = (
            model.forward_head(model.forward_features(pixels), pre_logits=True)
            if library == "timm"
            else headless(model)(pixels)
        )
        torch.testing.assert_close(encoder.backbone(pixels), expected, rtol=1e-5, atol=1e-5)


def headless(model):
    model.fc = torch.nn.Identity()
    return model


def test_the_encoders_preprocessing_is_its_librarys(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    save_file({key: value.contiguous() for key, value in resnet18().state_dict().items()}, tmp_path / "w.safetensors")
    preprocess = encoder_from_weights("resnet18", tmp_path / "w.safetensors").preprocess
    assert (preprocess.image_size, preprocess.resize_size, preprocess.interpolation) == (224, 256, "bilinear")
    assert preprocess.mean == (0.485, 0.456, 0.406)
