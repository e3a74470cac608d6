"""Every format and precision, on real runtimes: what is written, how it is run, and what it says of itself."""

import json
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mio_export.bundle import load_bundle, save_manifest
from mio_export.console.progress import Progress
from mio_export.errors import GateError, MioError, MissingBackendError, UsageError
from mio_export.exporting import export
from mio_export.exporting.graphs import CLEAN_UPS
from mio_export.files import sha256_file
from mio_export.inspection import describe
from mio_export.models import build_encoder
from mio_export.parity import verify
from mio_export.preprocess import Preprocess
from mio_export.runtimes import choose, open_runtime
from mio_export.runtimes.onnxruntime import OnnxRuntime
from mio_export.runtimes.openvino import OpenVINORuntime
from mio_export.runtimes.timing import fastest

FORMATS = ("onnx", "openvino", "tensorrt-rtx", "pt2", "torchscript")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
ROOT = str(Path(__file__).parents[2]).encode()


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory):
    """200 crops of two photographs in two class folders, enough for int8."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("data") / "many"
    rng = np.random.default_rng(0)
    for index in range(200):
        photo = load_sample_images().images[index % 2]
        size = int(rng.integers(60, 200))
        top, left = int(rng.integers(0, 427 - size)), int(rng.integers(0, 640 - size))
        path = folder / str(index % 2) / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[top : top + size, left : left + size]).resize((48, 48)).save(path)
    return folder


@pytest.fixture(scope="module")
def everything(tmp_path_factory, encoder, many_photos):
    """A bundle with every format and precision; read only."""
    path = tmp_path_factory.mktemp("bundle") / "all.mio"
    options = {"capabilities": ["8.6", "12.0"], "images": many_photos, "max_batch": 24}
    return export(encoder, path, formats=FORMATS, precisions=PRECISIONS, **options).bundle


def rows(bundle):
    return {
        (a.format, a.precision, a.capability): (a.file, a.parity.verdict, a.parity.devices)
        for a in bundle.manifest.artifacts
    }


def test_what_runs_here_is_proved_and_the_rest_is_unproven(everything):
    found = rows(everything)
    for name, precisions in {
        "onnx": ("fp32", "fp16", "int8"),
        "openvino": PRECISIONS,
        "pt2": ("fp32", "bf16"),
        "torchscript": ("fp32", "bf16"),
    }.items():
        for precision in precisions:
            assert found.pop((name, precision, None))[1:] == ("proved", ("cpu",)), (name, precision)
    engines = [("tensorrt-rtx", p, c) for p in ("fp32", "fp16", "bf16") for c in ("8.6", "12.0")]
    assert set(found) == {("onnx", "bf16", None), *engines}  # ONNX Runtime has no bf16 convolution on a CPU
    assert {verdict for _, verdict, _ in found.values()} == {"unproven"}


def test_openvino_reads_the_onnx_files(everything):
    found = rows(everything)
    assert found["openvino", "fp32", None][0] == found["openvino", "bf16", None][0] == "encoder.onnx"
    assert found["openvino", "int8", None][0] == "encoder.int8.onnx"
    hints = {a.precision: a.options for a in everything.manifest.artifacts if a.format == "openvino"}
    assert hints["bf16"] == {"INFERENCE_PRECISION_HINT": "bf16"}
    assert hints["fp32"] == {"INFERENCE_PRECISION_HINT": "f32"}


def test_auto_takes_the_fastest_of_the_precision_asked_for(everything, monkeypatch):
    for slow, fast in ((OnnxRuntime, "openvino"), (OpenVINORuntime, "onnxruntime")):
        original = slow._run
        with monkeypatch.context() as patch:
            patch.setattr(slow, "_run", lambda self, images, run=original: (time.sleep(0.1), run(self, images))[1])
            with fastest(everything, precision="int8", device="cpu", progress=Progress()) as selected:
                assert selected.choice == choose(everything, fast, precision="int8")


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [
        ("onnxruntime", "fp16", 1e-2),
        ("onnxruntime", "int8", 0.3),
        ("openvino", "fp32", 1e-5),
        ("openvino", "bf16", 0.1),
        ("openvino", "int8", 0.3),
        ("pt2", "fp32", 1e-5),
        ("pt2", "bf16", 0.1),
        ("torchscript", "bf16", 0.1),
    ],
)
def test_what_is_opened_computes_in_the_precision_that_was_proved(everything, encoder, name, precision, bound):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    expected = encoder.embed(images)
    with open_runtime(everything, name, precision=precision) as runtime:
        error = np.linalg.norm(runtime.embed(images) - expected) / np.linalg.norm(expected)
    assert error < bound
    assert precision == "fp32" or error > 1e-5


def test_an_unproven_artifact_is_not_chosen(everything):
    with pytest.raises(UsageError, match="holds no proved onnxruntime bf16 artifact; it holds: onnx fp32 \\(proved\\)"):
        choose(everything, "onnxruntime", precision="bf16")


def test_verify_names_what_cannot_run_here_and_passes(everything, many_photos, mio):
    result = mio("verify", everything.path)
    assert result.code == 0, result.err
    assert "unproven: encoder.bf16.onnx (onnx bf16); prove it where it runs" in result.out
    assert "unproven: encoder.fp16.sm120.rtx.engine (tensorrt-rtx fp16)" in result.out


def unproven(bundle, path):
    """A copy whose fp32 rows claim to have been built elsewhere."""
    copied = shutil.copytree(bundle.path, path)
    manifest = load_bundle(copied).manifest
    artifacts = [replace(a, parity=replace(a.parity, verdict="unproven", devices=())) for a in manifest.artifacts]
    save_manifest(copied, replace(manifest, artifacts=tuple(artifacts)))
    return copied


def test_verify_on_the_right_machine_proves_what_was_unproven(bundle, photos, tmp_path, mio):
    copied = unproven(bundle, tmp_path / "copy.mio")
    with pytest.raises(UsageError, match="holds no proved onnxruntime artifact"):
        choose(load_bundle(copied), "onnxruntime")
    assert mio("verify", copied, "--images", photos, "--all").code == 0
    assert {row[1:] for row in rows(load_bundle(copied)).values()} == {("proved", ("cpu",))}
    assert mio("verify", copied).code == 0  # every hash of the new reports holds
    assert choose(load_bundle(copied), "onnxruntime").file == "encoder.onnx"


def test_verify_on_the_right_machine_refuses_what_is_wrong(bundle, photos, tmp_path, mio):
    copied = unproven(bundle, tmp_path / "copy.mio")
    model = onnx.load(copied / "encoder.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.01), weight.name))
    onnx.save(model, copied / "encoder.onnx")
    manifest = load_bundle(copied).manifest
    changed = tuple(replace(a, sha256=sha256_file(copied / a.file)) for a in manifest.artifacts)
    save_manifest(copied, replace(manifest, artifacts=changed))
    assert mio("verify", copied, "--images", photos).code == 3
    assert rows(load_bundle(copied))["onnx", "fp32", None][1] == "refused"
    again = mio("verify", copied)  # the verdict stays
    assert again.code == 3
    assert "encoder.onnx: onnx fp32 was refused on a machine that runs it" in again.err


def test_every_artifact_says_the_same_of_itself(everything):
    expected = json.loads(everything.manifest.common_json())
    for artifact in everything.manifest.artifacts:
        described = describe(everything.path / artifact.file)
        assert described.kind == "artifact"
        found = {key: value for key, value in described.values.items() if key in expected}
        assert found == expected, artifact.file
    assert dict(described.lines)["space"] == everything.manifest.space


def test_two_exports_are_equal_and_hold_no_path(everything, encoder, many_photos, tmp_path):
    precisions = ("fp32", "bf16", "int8")
    formats = tuple(name for name in FORMATS if name != "tensorrt-rtx")  # the library numbers its temporaries anew
    options = {"images": many_photos, "max_batch": 24, "cache": tmp_path / "cache"}
    again = export(encoder, tmp_path / "elsewhere" / "all.mio", formats=formats, precisions=precisions, **options)
    for artifact in again.bundle.manifest.artifacts:
        path = again.bundle.path / artifact.file
        assert (
            sha256_file(path) == everything.artifacts(format=artifact.format, precision=artifact.precision)[0].sha256
        ), artifact.file
    for path in everything.path.rglob("*"):
        if path.is_file() and path.suffix != ".engine":
            contents = [path.read_bytes()]
            if zipfile.is_zipfile(path):
                contents = [zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()]
            for part in (b"site-packages", str(everything.path.parent).encode(), ROOT, b"/tmp/", b"/home/"):
                assert not [content for content in contents if part in content], (path.name, part)


def test_calibration_is_kept_by_images_and_model(encoder, many_photos, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    options = {"precisions": ["int8"], "images": many_photos, "max_batch": 8, "cache": cache}
    first = export(encoder, tmp_path / "a.mio", **options).bundle
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("mio_export.exporting.int8.observed", None)  # a second look would fail
    second = export(encoder, tmp_path / "b.mio", **options).bundle
    assert second.manifest.artifacts[0].sha256 == first.manifest.artifacts[0].sha256


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precisions": ["int8"]}, UsageError, "int8 is calibrated on your images; add --images DIR"),
        ({"formats": ["pt2"], "precisions": ["fp16"]}, UsageError, "pt2 has no fp16"),
        ({"formats": ["tensorrt-rtx"]}, UsageError, "no NVIDIA GPU is visible here; name those to build engines for"),
        (
            {"formats": ["tensorrt"]},
            MissingBackendError,
            "tensorrt needs tensorrt, which is not installed",
        ),
        (
            {"formats": ["tensorrt-rtx"], "capabilities": ["9.0"]},
            UsageError,
            "TensorRT for RTX builds for compute capability",
        ),
        ({"require": {"recall": 0.9}}, UsageError, "--require knows rms-error, .*; got 'recall'"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_line(encoder, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export(encoder, tmp_path / "x.mio", **options)
    assert not list(tmp_path.iterdir())


def test_int8_needs_enough_images(encoder, photos, tmp_path):
    with pytest.raises(UsageError, match=r"int8 needs 128 images to calibrate on and 32 others .* has 24"):
        export(encoder, tmp_path / "x.mio", precisions=["int8"], images=photos)


def test_a_requirement_tightens_and_stays_with_the_bundle(encoder, many_photos, tmp_path, mio):
    options = {"precisions": ["int8"], "images": many_photos, "max_batch": 8}
    with pytest.raises(GateError, match=r"onnx int8: batch 1: .*recall@10 .* is below 100%"):
        export(encoder, tmp_path / "x.mio", require={"recall@10": 1.0}, **options)
    loose = export(encoder, tmp_path / "y.mio", require={"recall@10": 0.1, "min-cosine": 0.91}, **options)
    budget = loose.reports[0].budget
    assert (budget.recall_at_10, budget.min_cosine) == (0.9, 0.91)  # it never loosens
    report = verify(tmp_path / "y.mio", images=many_photos).reports[0]
    assert report.budget.min_cosine == 0.91


class Outlier(torch.nn.Module):
    """A backbone with one channel a thousand times as large as the others, which the next layer makes up for."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        first, _, _, second = backbone.blocks[0][0], *backbone.blocks[0][1:3], backbone.blocks[1][0]
        norm = backbone.blocks[0][1]
        with torch.no_grad():
            norm.weight[0] *= 1000
            norm.bias[0] *= 1000
            second.weight[:, 0] /= 1000
        assert isinstance(first, torch.nn.Conv2d)

    def forward(self, pixels):
        return self.backbone(pixels)


def test_an_encoder_with_outlier_channels_is_refused_in_int8_with_the_reason(encoder, many_photos, tmp_path):
    import copy

    planted = copy.deepcopy(encoder)
    planted.backbone = Outlier(planted.backbone).eval()
    export(planted, tmp_path / "whole.mio", images=many_photos, max_batch=8)
    with pytest.raises(GateError, match=r"refused by parity: onnx int8: batch 1: .*cosine"):
        export(planted, tmp_path / "x.mio", precisions=["int8"], images=many_photos, max_batch=8)
    assert not (tmp_path / "x.mio").exists()


def test_a_clean_up_that_changes_the_result_is_undone_and_named(encoder, photos, tmp_path, monkeypatch):
    def lossy(model):
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.round(values, 2), weight.name))
        return model

    def crash(model):
        raise RuntimeError("no such pattern")

    def grow(model):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(10**6, np.float32), "ballast"))
        return model

    for name, clean_up in {"lossy": lossy, "crash": crash, "grow": grow}.items():
        monkeypatch.setitem(CLEAN_UPS, name, clean_up)
    result = export(encoder, tmp_path / "x.mio", images=photos)
    outcomes = {stage["name"]: stage["outcome"] for stage in result.reports[0].stages}
    assert outcomes == {"capture": "kept", "onnxslim": "kept", "lossy": "undone", "crash": "undone", "grow": "undone"}
    notes = result.bundle.manifest.artifacts[0].notes
    assert [note.split(":")[0].split()[1] for note in notes] == ["lossy", "crash", "grow"]


class ShapeDependent(torch.nn.Module):
    """What the dynamo exporter cannot capture and a trace can: Python that looks at values."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels):
        return self.backbone(pixels * 1.0 if float(pixels.sum()) != 12345.678 else pixels)


def test_the_fallback_exporter_is_on_record(encoder, photos, tmp_path):
    import copy

    awkward = copy.deepcopy(encoder)
    awkward.backbone = ShapeDependent(awkward.backbone).eval()
    artifact = export(awkward, tmp_path / "x.mio", images=photos).bundle.manifest.artifacts[0]
    assert artifact.exporter == "torchscript"
    assert "captured by the TorchScript exporter" in artifact.notes[0]


def test_large_graphs_keep_their_weights_in_one_relative_file(encoder, photos, tmp_path, monkeypatch, mio):
    monkeypatch.setattr("mio_export.exporting.onnx.MAX_INLINE_BYTES", 100_000)
    path = tmp_path / "large.mio"
    artifacts = export(encoder, path, formats=["onnx", "openvino"], images=photos).bundle.manifest.artifacts
    assert all(list(artifact.companions) == ["encoder.onnx.data"] for artifact in artifacts)
    assert (path / "encoder.onnx").stat().st_size < 100_000
    moved = path.rename(tmp_path / "moved.mio")
    monkeypatch.chdir("/")
    assert mio("verify", moved, "--images", photos).code == 0
    data = (moved / "encoder.onnx.data").read_bytes()
    (moved / "encoder.onnx.data").write_bytes(data[:-100])
    assert "encoder.onnx.data: sha256 is" in mio("verify", moved).err
    with pytest.raises(GateError, match=r"encoder.onnx.data is not the file that was proved"):
        open_runtime(moved)
    (moved / "encoder.onnx.data").unlink()
    assert "encoder.onnx.data: missing" in mio("verify", moved).err
    with pytest.raises(GateError, match=r"encoder.onnx.data is missing"):
        open_runtime(moved)


def test_an_encoder_that_gives_nan_is_refused_before_anything_is_written(encoder, photos, tmp_path):
    import copy

    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.backbone.blocks[1][0].weight[0] = float("nan")
    with pytest.raises(GateError, match="nothing can be proved: the encoder itself gives NaN"):
        export(broken, tmp_path / "x.mio", images=photos)
    assert not list(tmp_path.iterdir())


class Random(torch.nn.Module):
    """A backbone whose dropout was left on."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels):
        return torch.nn.functional.dropout(self.backbone(pixels), 0.1, training=True)


def test_an_encoder_that_is_random_is_refused(encoder, photos, tmp_path):
    import copy

    broken = copy.deepcopy(encoder)
    broken.backbone = Random(broken.backbone)
    with pytest.raises(GateError, match="its forward pass is random"):
        export(broken, tmp_path / "x.mio", images=photos)


class Loud(torch.nn.Module):
    """Deep enough that three nodes are a few of a hundred; in the middle activations of 1e5."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, stride=2)
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(36))

    def forward(self, pixels):
        x = torch.relu(self.first(pixels))
        for number, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x)) * 0.2
            if number == 18:
                x = (x * 1e5) * 1e-5
        return x.mean(dim=(2, 3))


def test_activations_of_1e5_get_an_island_and_pass_in_fp16(photos, tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("small", Preprocess(image_size=32, resize_size=36), stem="small")
    encoder.backbone = Loud().eval()
    encoder.spec = replace(encoder.spec, embedding_dim=16)
    result = export(encoder.eval(), tmp_path / "loud.mio", precisions=["fp32", "fp16"], images=photos, max_batch=8)
    artifact = result.bundle.artifacts(format="onnx", precision="fp16")[0]
    (kept,) = [note for note in artifact.notes if "nodes stay fp32" in note]
    num_kept, num_nodes = int(kept.split()[1]), int(kept.split()[3])
    assert num_kept <= num_nodes / 10
    assert any("fp32 islands, since their values exceed fp16" in note for note in artifact.notes)
    assert result.reports[1].verdict == "proved"


def test_a_backbone_that_cannot_be_captured_is_one_line(encoder, photos, tmp_path):
    import copy

    class Hidden(torch.nn.Module):
        def forward(self, pixels):
            if torch.compiler.is_exporting() or torch.jit.is_tracing():
                raise RuntimeError("not while somebody looks")
            return pixels.mean(dim=(2, 3))

    broken = copy.deepcopy(encoder)
    broken.backbone = Hidden()
    broken.spec = replace(broken.spec, embedding_dim=3)
    with pytest.raises(MioError, match=r"small cannot be exported to ONNX: .*not while somebody looks"):
        export(broken, tmp_path / "x.mio", images=photos)
