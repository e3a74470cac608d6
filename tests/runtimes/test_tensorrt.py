import json
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from mio_export.bundle.sidecar import Profile, read_sidecar, sidecar_path, write_sidecar
from mio_export.errors import GateError, MioError, MissingBackendError, UsageError
from mio_export.exporting.onnx import onnx_from_encoder, save_onnx
from mio_export.exporting.tensorrt import engine_from_onnx
from mio_export.files import sha256_file
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.runtimes.backends import BACKENDS
from mio_export.runtimes.devices import has_cuda
from mio_export.runtimes.tensorrt import compute_capability, open_tensorrt, open_tensorrt_rtx

SHAPE = {"image_shape": (64, 64, 3), "embedding_dim": 512}
BUILD = {"library": "tensorrt-rtx", "capability": "8.6", "max_batch": 48, "provenance": '{"space": "abc"}'}
needs_rtx = pytest.mark.skipif(BACKENDS["tensorrt-rtx"].version is None, reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    encoder = build_encoder("torchvision/resnet18", Preprocess(image_size=64, resize_size=72)).eval()
    path = tmp_path_factory.mktemp("onnx") / "resnet.onnx"
    save_onnx(onnx_from_encoder(encoder, max_batch=48)[0], path, provenance="{}")
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory, resnet):
    """An engine for 8.6; read only."""
    path = tmp_path_factory.mktemp("engine") / "encoder.engine"
    engine_from_onnx(resnet, path, **BUILD)
    return path


@pytest.fixture
def engine(tmp_path, built):
    """A copy of the engine and its sidecar."""
    path = tmp_path / "encoder.engine"
    path.hardlink_to(built)
    sidecar_path(path).write_bytes(sidecar_path(built).read_bytes())
    return path


def tiny_graph(path, *nodes, kind=np.float32):
    """``nodes`` after the cast of the pixels, with 2x2 pixels and one weight, ``w``."""
    onnx_kind = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=onnx_kind),
            helper.make_node("Transpose", ["floats"], ["x"], perm=[0, 3, 1, 2]),
            *nodes,
        ],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 2, 2, 3])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(np.full((4, 3, 2, 2), 0.1, kind), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@needs_rtx
@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
def test_a_resnet_builds_without_a_gpu_for_the_capability_asked_for(tmp_path, resnet, capability):
    path = tmp_path / "encoder.engine"
    tools = engine_from_onnx(resnet, path, **(BUILD | {"capability": capability}))
    plan = path.read_bytes()
    assert b"accelerators={sm%s }" % capability.replace(".", "").encode() in plan  # the library's own note of it
    assert b"tf32=0" in plan
    assert len(plan) > 11_000_000 * 4  # its weights are in it, in float32
    sidecar = read_sidecar(path)
    assert (sidecar.capability, sidecar.library) == (capability, "tensorrt-rtx")
    assert sidecar.library_version == tools["tensorrt-rtx"] == BACKENDS["tensorrt-rtx"].version


@needs_rtx
def test_the_sidecar_says_what_the_engine_is(built):
    import tensorrt_rtx

    sidecar = read_sidecar(built)
    assert sidecar.engine_sha256 == sha256_file(built)
    assert sidecar.profile == Profile(min=1, opt=32, max=48)
    assert sidecar.provenance == {"space": "abc"}
    assert sidecar.library_version == tensorrt_rtx.__version__


@needs_rtx
def test_the_profile_reaches_the_engine(built):
    plan = built.read_bytes()
    found = [plan.find(np.array([batch, 64, 64, 3], np.int64).tobytes()) for batch in (1, 32, 48)]
    assert -1 < found[0] < found[1] < found[2] < found[0] + 200  # they lie together, smallest first


def test_the_graph_casts_before_it_transposes(resnet):
    """TensorRT transposes no uint8."""
    model = onnx.load(resnet)
    reader = next(node for node in model.graph.node if "images" in node.input and node.op_type != "Shape")
    assert reader.op_type == "Cast"


@needs_rtx
def test_a_float16_graph_builds_in_float16(tmp_path, resnet):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(resnet), keep_io_types=True), half)
    engine_from_onnx(half, tmp_path / "half.engine", **BUILD)
    assert 11_000_000 * 2 < (tmp_path / "half.engine").stat().st_size < 11_000_000 * 3


@needs_rtx
def test_no_name_that_tensorrt_11_removed_is_touched(tmp_path, monkeypatch):
    import tensorrt_rtx

    removed = {"FP16", "INT8", "BF16", "FP8", "OBEY_PRECISION_CONSTRAINTS", "EXPLICIT_BATCH", "IInt8Calibrator"}

    class Guard(types.ModuleType):
        """A module or an enumeration without those names, even for ``getattr`` with a default."""

        def __init__(self, real):
            super().__init__("guard")
            self.__dict__["real"] = real

        def __getattr__(self, name):
            assert name not in removed, name
            value = getattr(self.real, name)
            return Guard(value) if name in ("BuilderFlag", "NetworkDefinitionCreationFlag") else value

    assert not hasattr(tensorrt_rtx.ILayer, "precision")  # nor can a layer's precision be set here
    with pytest.raises(AssertionError, match="FP16"):
        _ = Guard(tensorrt_rtx).BuilderFlag.FP16
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Guard(tensorrt_rtx))
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = tiny_graph(tmp_path / "tiny.onnx", conv, helper.make_node("Flatten", ["y"], ["embeddings"]))
    engine_from_onnx(graph, tmp_path / "tiny.engine", **BUILD)
    assert (tmp_path / "tiny.engine").stat().st_size > 0


@needs_rtx
def test_an_operator_that_it_lacks_is_named(tmp_path):
    node = helper.make_node("StringNormalizer", ["x"], ["embeddings"], name="strange_one")
    graph = tiny_graph(tmp_path / "tiny.onnx", node)
    with pytest.raises(
        MioError, match=r"cannot take .*tiny\.onnx: node strange_one \(StringNormalizer\): .+"
    ) as caught:
        engine_from_onnx(graph, tmp_path / "tiny.engine", **BUILD)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny.engine").exists()


@needs_rtx
@pytest.mark.parametrize("capability", ["9.0", "CURRENT", "sm86", ""])
def test_a_capability_that_it_does_not_build_for_is_refused(tmp_path, capability):
    with pytest.raises(UsageError, match=r"builds for compute capability 7\.5, .*8\.6, .*12\.0.*; got '") as caught:
        engine_from_onnx(tmp_path / "none.onnx", tmp_path / "e", **(BUILD | {"capability": capability}))
    assert repr(capability) in str(caught.value)


def test_a_batch_of_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="max_batch must be 1 or more, got 0"):
        engine_from_onnx(tmp_path / "none.onnx", tmp_path / "e", **(BUILD | {"max_batch": 0}))


@pytest.mark.skipif(has_cuda(), reason="there is a GPU")
def test_tensorrt_builds_for_no_gpu_but_this_machines(tmp_path):
    assert compute_capability() is None
    with pytest.raises(MissingBackendError, match=r"is none: no NVIDIA GPU is visible; got 8\.6: .*tensorrt-rtx"):
        engine_from_onnx(tmp_path / "none.onnx", tmp_path / "e", **(BUILD | {"library": "tensorrt"}))


@pytest.mark.skipif(BACKENDS["tensorrt"].version is not None, reason="TensorRT is installed")
def test_a_missing_library_is_named_with_its_command():
    from mio_export.runtimes.tensorrt import load_library

    with pytest.raises(MissingBackendError, match=r"TensorRT is not installed: pip install 'mio-export\[tensorrt\]'"):
        load_library("tensorrt")


@needs_rtx
def test_an_engine_without_its_sidecar_is_refused(engine):
    sidecar_path(engine).unlink()
    with pytest.raises(GateError, match=r"has no encoder\.engine\.json beside it.*export it again"):
        open_tensorrt_rtx(engine, **SHAPE, device="cuda", options={})


@needs_rtx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": None}, "capability: Input should be a valid string"),
        ({"surprise": 1}, "surprise: "),
        ({"profile": {"min": 4, "opt": 2, "max": 8}}, "min <= opt <= max, got 4, 2, 8"),
        ({"library": "openvino"}, "library: "),
    ],
)
def test_a_damaged_sidecar_is_refused(engine, change, message):
    values = json.loads(sidecar_path(engine).read_text()) | change
    sidecar_path(engine).write_text(json.dumps(values))
    with pytest.raises(GateError, match=rf"encoder\.engine\.json is damaged: .*{message}"):
        read_sidecar(engine)


@needs_rtx
def test_a_sidecar_of_the_future_is_refused(engine):
    values = json.loads(sidecar_path(engine).read_text()) | {"schema_version": 2}
    sidecar_path(engine).write_text(json.dumps(values))
    with pytest.raises(MioError, match="schema version 2, this mio-export reads up to 1"):
        read_sidecar(engine)


@needs_rtx
def test_other_engine_bytes_are_refused(engine):
    plan = bytearray(engine.read_bytes())
    plan[len(plan) // 2] ^= 1
    engine.unlink()
    engine.write_bytes(plan)
    with pytest.raises(GateError, match="is not the engine that its sidecar describes"):
        open_tensorrt_rtx(engine, **SHAPE, device="cuda", options={})


@needs_rtx
def test_an_engine_of_the_other_library_is_refused(engine):
    with pytest.raises(GateError, match=r"is an engine of TensorRT for RTX, not of TensorRT$"):
        open_tensorrt(engine, **SHAPE, device="cuda", options={})


def opened_elsewhere(engine):
    """Open the engine in a fresh interpreter; return its error, and whether the library was imported."""
    code = f"""if True:
        import sys
        from pathlib import Path
        from mio_export.runtimes.tensorrt import open_tensorrt_rtx
        try:
            shape = {{"image_shape": (64, 64, 3), "embedding_dim": 512}}
            open_tensorrt_rtx(Path({str(engine)!r}), **shape, device="cuda", options={{}})
        except Exception as error:
            print(type(error).__name__, error)
        print("tensorrt_rtx" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, imported = done.stdout.splitlines()
    return error, imported == "True"


@needs_rtx
def test_an_engine_of_another_version_is_refused_before_the_library_is_imported(engine):
    write_sidecar(engine, replace(read_sidecar(engine), library_version="1.6.0.3"))
    error, imported = opened_elsewhere(engine)
    assert error.startswith("MissingBackendError")
    assert "was built by TensorRT for RTX 1.6.0.3" in error
    assert f"{BACKENDS['tensorrt-rtx'].version} is installed" in error
    assert not imported


@needs_rtx
def test_an_engine_for_another_gpu_is_refused_before_the_library_is_imported(engine):
    write_sidecar(engine, replace(read_sidecar(engine), capability="7.2"))
    error, imported = opened_elsewhere(engine)
    assert error.startswith("MissingBackendError")
    assert "was built for GPUs of compute capability 7.2" in error
    assert (f"that of the GPU here is {compute_capability()}" if has_cuda() else "no NVIDIA GPU is visible") in error
    assert not imported


@pytest.mark.gpu
@needs_rtx
@pytest.mark.skipif(not has_cuda(), reason="no CUDA device is visible")
def test_an_engine_gives_the_embeddings_of_its_graph_on_a_gpu(tmp_path, resnet):
    assert compute_capability() == "{}.{}".format(*torch.cuda.get_device_capability())
    path = tmp_path / "encoder.engine"
    engine_from_onnx(resnet, path, **(BUILD | {"capability": compute_capability()}))
    session = onnxruntime.InferenceSession(resnet, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (49, 64, 64, 3), dtype=np.uint8)
    with open_tensorrt_rtx(path, **SHAPE, device="cuda", options={}) as runtime:
        for size in (1, 7, 48):
            expected = session.run(None, {"images": pixels[:size]})[0]
            found = runtime.embed(pixels[:size])
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(UsageError, match="takes 1 to 48 images at once, got 49"):
            runtime.embed(pixels)
    with pytest.raises(GateError, match=r"must take uint8 \(N, 32, 32, 3\)"):
        open_tensorrt_rtx(path, image_shape=(32, 32, 3), embedding_dim=512, device="cuda", options={})
