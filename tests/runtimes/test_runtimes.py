import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mio_export import GateError, MissingBackendError, UsageError, embed, load_embeddings, open_runtime
from mio_export.runtimes import choose, devices
from mio_export.runtimes.devices import has_cuda, num_threads
from mio_export.runtimes.opening import open_file


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript", "torch"])
def test_every_backend_gives_the_encoders_embeddings(bundle, encoder, images, name):
    with open_runtime(bundle, name) as runtime:
        embeddings = runtime.embed(images)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, encoder.embed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchscript", "torch"])
def test_torch_uses_the_threads_of_the_process_and_gives_the_callers_back(bundle, images, monkeypatch, name):
    used = []
    with open_runtime(bundle, name) as runtime:
        module = runtime._module
        monkeypatch.setattr(runtime, "_module", lambda x: (used.append(torch.get_num_threads()), module(x))[1])
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads() + 1)
        try:
            runtime.embed(images)
            assert torch.get_num_threads() == num_threads() + 1
        finally:
            torch.set_num_threads(before)
    assert set(used) == {num_threads()}


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript", "torch"])
def test_another_dtype_or_shape_is_refused(bundle, images, name):
    with open_runtime(bundle, name) as runtime:
        for wrong in (images.astype(np.float32), images[:, :16], images[..., :1], images[0], images[:0]):
            with pytest.raises(UsageError, match=re.escape("images must be uint8 of shape (N, 32, 32, 3)")):
                runtime.embed(wrong)


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_files_become_the_vectors_of_embed_and_the_others_say_why_not(bundle, photos, tmp_path, name):
    embed(bundle.path, photos, tmp_path / "store", runtime=name, decode="full")
    store = load_embeddings(tmp_path / "store")
    paths = [photos / key for key in store.keys] * 2
    bad = [tmp_path / "nowhere.jpg", b"", paths[0].read_bytes()[:200], b"text", "a\0b"]
    files = [*map(str, paths[:40]), *bad, *(path.read_bytes() for path in paths[40:])]
    with open_runtime(bundle, name) as runtime:
        vectors, errors = runtime.embed_files(files)
    assert (vectors.dtype, vectors.shape) == (np.float32, (len(files), 256))
    assert [number for number, error in enumerate(errors) if error] == [40, 41, 42, 43, 44]
    assert errors[40:42] == [
        "image 40: cannot be read: No such file or directory",
        "image 41: the file is empty",
    ]
    assert errors[43:45] == [
        "image 43: not an image that Pillow can read",
        "image 44: cannot be read: embedded null byte",
    ]
    assert np.isnan(vectors[40:45]).all()
    np.testing.assert_allclose(
        np.delete(vectors, range(40, 45), axis=0), np.tile(store.vectors, (2, 1)), rtol=1e-5, atol=1e-6
    )


def test_files_must_be_a_list_and_need_the_contract(bundle, photos):
    path = str(next(photos.rglob("*.*")))
    with open_runtime(bundle) as runtime:
        for one in (path, path.encode()):
            with pytest.raises(UsageError, match=r"files must be a list of paths or bytes, got one (str|bytes)$"):
                runtime.embed_files(one)
        with pytest.raises(UsageError, match="there is no image to embed"):
            runtime.embed_files([])
    graph = bundle.path / "encoder.onnx"
    with (
        open_file("onnxruntime", graph, image_shape=(32, 32, 3), embedding_dim=256) as runtime,
        pytest.raises(UsageError, match="opened without its bundle"),
    ):
        runtime.embed_files([path])


def test_files_are_embedded_in_batches_that_were_proved(bundle, photos, monkeypatch):
    path = next(photos.rglob("*.*"))
    with open_runtime(bundle, "onnxruntime") as runtime:
        sizes, embed_images = [], runtime.embed
        monkeypatch.setattr(runtime, "embed", lambda images: sizes.append(len(images)) or embed_images(images))
        runtime.max_batch = 4
        runtime.embed_files([path] * 6 + [b""] * 4)
    assert sizes == [4, 2]


def test_the_readmes_python_runs_as_it_stands(bundle, photos, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, *_ = sorted(photos.rglob("*.*"))
    for link, target in (("encoder.mio", bundle.path), ("photos", photos), ("cat.jpg", first), ("dog.png", second)):
        (tmp_path / link).symlink_to(target)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    values = {"images": images}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, values)
    assert values["errors"] == [None, None]
    assert values["vectors"].shape == (5, 256)


def test_views_with_strides_are_taken(bundle, encoder, images):
    with open_runtime(bundle) as runtime:
        np.testing.assert_allclose(runtime.embed(images[::2]), encoder.embed(images[::2].copy()), rtol=1e-4, atol=1e-5)


def test_auto_prefers_onnx_runtime(bundle):
    choice = choose(bundle)
    assert (choice.runtime, choice.precision, choice.file) == ("onnxruntime", "fp32", "encoder.onnx")
    assert choice.device == ("cuda" if has_cuda() else "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"runtime": "tflite"},
            "runtime must be auto, onnxruntime, openvino, tensorrt, tensorrt-rtx, pt2, torchscript, torch; got",
        ),
        ({"precision": "int4"}, "precision must be auto, fp32, fp16, bf16, int8; got 'int4'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda, tensorrt, got 'tpu'"),
    ],
)
def test_unknown_names_are_refused(bundle, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        choose(bundle, **arguments)


@pytest.mark.skipif(has_cuda(), reason="a CUDA device is visible")
def test_cuda_without_a_device_is_a_missing_backend(bundle):
    with pytest.raises(MissingBackendError, match="no CUDA device is visible here; use --device cpu"):
        open_runtime(bundle, "torch", device="cuda")


def test_an_artifact_that_is_not_the_proved_file_is_not_opened(bundle, tmp_path):
    import shutil

    from mio_export.bundle import load_bundle

    copy = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    with (copy / "encoder.onnx").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(GateError, match="is not the file that was proved"):
        open_runtime(load_bundle(copy))


def test_threads_follow_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(devices, "_limit", math.inf)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_onnx_runtime_keeps_no_record_of_its_use(tmp_path):
    code = "import mio_export, onnxruntime; onnxruntime.SessionOptions()"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_embedding_that_is_not_finite_has_its_reason(bundle, photos, monkeypatch):
    with open_runtime(bundle, "onnxruntime") as runtime:
        run = type(runtime)._run
        monkeypatch.setattr(type(runtime), "_run", lambda self, images: run(self, images) * np.float32([[1], [np.nan]]))
        vectors, reasons = runtime.embed_files(sorted(path for path in photos.rglob("*") if path.is_file())[:2])
    assert reasons[0] is None
    assert "not finite" in reasons[1]
    assert np.isfinite(vectors[0]).all()
    assert np.isnan(vectors[1]).all()
