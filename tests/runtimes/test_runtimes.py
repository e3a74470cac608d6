import os
import re
import subprocess
import sys

import numpy as np
import pytest

from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.runtimes import choose, open_runtime
from mio_export.runtimes.devices import has_cuda, num_threads


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript", "torch"])
def test_every_backend_gives_the_encoders_embeddings(bundle, encoder, images, name):
    with open_runtime(bundle, name) as runtime:
        embeddings = runtime.embed(images)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, encoder.embed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript", "torch"])
def test_another_dtype_or_shape_is_refused(bundle, images, name):
    with open_runtime(bundle, name) as runtime:
        for wrong in (images.astype(np.float32), images[:, :16], images[..., :1], images[0], images[:0]):
            with pytest.raises(UsageError, match=re.escape("images must be uint8 of shape (N, 32, 32, 3)")):
                runtime.embed(wrong)


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


def test_threads_follow_the_affinity_mask():
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
