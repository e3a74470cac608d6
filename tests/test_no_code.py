"""Nothing that a bundle holds runs code: each payload writes a file if it is run, and the file must not appear."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mio_export.bundle import load_bundle, save_manifest
from mio_export.bundle.onnx_file import check_onnx, read_onnx
from mio_export.errors import GateError, UsageError
from mio_export.exporting.pt2 import pt2_from_encoder
from mio_export.parity import verify
from mio_export.runtimes import choose
from mio_export.runtimes.backends import NAMED_ONLY
from mio_export.runtimes.opening import open_file

SHAPE = {"image_shape": (32, 32, 3), "embedding_dim": 256}


@pytest.fixture(scope="module")
def pt2(tmp_path_factory, encoder):
    path = tmp_path_factory.mktemp("pt2") / "encoder.pt2"
    pt2_from_encoder(encoder, path, precision="fp32", max_batch=8, provenance="{}")
    return path


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def torch_pickle(mark):
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def written(path, found, root="encoder", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in found.items():
            archive.writestr(f"{root}/{name}" if root else name, data)
    return path


def overlapping(archive):
    """Let the directory of an archive list its one member three times, under three names."""
    start, end = archive.index(b"PK\x01\x02"), archive.index(b"PK\x05\x06")
    entry, tail = archive[start:end], bytearray(archive[end:])
    tail[8:12] = struct.pack("<HH", 3, 3)
    tail[12:16] = struct.pack("<I", 3 * len(entry))
    return archive[:start] + b"".join(entry.replace(b"weight_9", b"weight_%d" % n) for n in range(3)) + bytes(tail)


def in_program(change):
    def tamper(found, mark):
        program = json.loads(found["models/model.json"])
        change(program, mark)
        found["models/model.json"] = json.dumps(program).encode()

    return tamper


def node(program):
    return program["graph_module"]["graph"]["nodes"][0]


def call_a_function(program, mark):
    text = {"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}
    node(program).update(target="torch.os.system", inputs=[text])


def evaluate_a_size(program, mark):
    sizes = program["graph_module"]["graph"]["tensor_values"]["images"]["sizes"]
    sizes[0] = {"as_expr": {"expr_str": f"__import__('os').system('touch {mark}')", "hint": None}}


def evaluate_a_guard(program, mark):
    program["guards_code"] = [f"__import__('os').system('touch {mark}')"]


def name_a_node(program, mark):
    name = f"x = __import__('os').system('touch {mark}')"
    text = json.dumps(program).replace('"images"', json.dumps(name))
    program.update(json.loads(text))


def import_a_type(program, mark):
    context = json.dumps({"default_factory_module": "antigravity", "default_factory_name": "fly"})
    spec = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)


def read_a_file(program, mark):
    node(program).update(target="torch.ops.aten.from_file.default")


def pickled_tensor(config, member):
    def tamper(found, mark):
        values = json.loads(found[config])
        next(iter(values["config"].values()))["use_pickle"] = True
        found[config] = json.dumps(values).encode()
        found[member] = torch_pickle(mark)

    return tamper


def member(name, data=torch_pickle):
    def tamper(found, mark):
        found[name] = data(mark)

    return tamper


def opaque(found, mark):
    config = "data/constants/model_constants_config.json"
    values = json.loads(found[config])
    next(iter(values["config"].values())).update(path_name="opaque_obj_0", use_pickle=True)
    found[config] = json.dumps(values).encode()
    found["data/constants/opaque_obj_0"] = pickle.dumps(Payload(mark))


PAYLOADS = {
    "sample inputs": (member("data/sample_inputs/model.pt"), "holds a pickle .data/sample_inputs/model.pt"),
    "a pickled weight": (
        pickled_tensor("data/weights/model_weights_config.json", "data/weights/weight_0"),
        "is pickled, which could run code",
    ),
    "a pickled constant": (
        pickled_tensor("data/constants/model_constants_config.json", "data/constants/tensor_0"),
        "is pickled, which could run code",
    ),
    "weights of an older format": (member("data/weights/model.pt"), "data/weights/model.pt: no .pt2 of mio-export"),
    "constants of an older format": (
        member("data/constants/model.pt"),
        "data/constants/model.pt: no .pt2 of mio-export",
    ),
    "another program": (member("models/other.json", lambda mark: b"{}"), "models/other.json: no .pt2 of mio-export"),
    "a compiled library": (
        member("data/aotinductor/model/a.so", lambda mark: b"\x7fELF"),
        "data/aotinductor/model/a.so: no .pt2 of mio-export",
    ),
    "an opaque object": (opaque, "data/constants/.*"),
    "a function of Python": (in_program(call_a_function), "calls 'torch.os.system'; only ATen operators"),
    "a size": (in_program(evaluate_a_size), "has the size .*; only arithmetic on symbols"),
    "a guard": (in_program(evaluate_a_guard), "holds guards, which are Python text"),
    "a name": (in_program(name_a_node), "which could be code"),
    "a type to import": (in_program(import_a_type), "has arguments in 'collections.defaultdict'"),
    "an operator on files": (in_program(read_a_file), "calls 'torch.ops.aten.from_file.default'"),
    "an unknown format": (member("archive_version", lambda mark: b"1"), "archive_version: is b'1'"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_pt2_that_holds_code_is_refused_before_pytorch_sees_it(pt2, tmp_path, monkeypatch, name):
    tamper, reason = PAYLOADS[name]
    found, mark = members(pt2), tmp_path / "ran"
    tamper(found, mark)
    path = written(tmp_path / "evil.pt2", found)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("PyTorch was given the file"))
    with pytest.raises(GateError, match=reason):
        open_file("pt2", path, **SHAPE)
    assert not mark.exists()


def test_archives_of_another_shape_are_refused(pt2, tmp_path):
    found = members(pt2)
    path = tmp_path / "odd.pt2"
    with pytest.raises(GateError, match="compressed or encrypted"):
        open_file("pt2", written(path, found, compression=zipfile.ZIP_DEFLATED), **SHAPE)
    old = {"version": b"8.20", "serialized_state_dict.pt": b"", "serialized_exported_program.json": b"{}"}
    with pytest.raises(GateError, match="do not lie in one folder"):
        open_file("pt2", written(path, old, root=""), **SHAPE)
    with zipfile.ZipFile(written(path, found), "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("encoder/archive_version", b"0")
    with pytest.raises(GateError, match="each once"):
        open_file("pt2", path, **SHAPE)
    written(path, {"data/weights/weight_9": b"x" * 10_000})
    path.write_bytes(overlapping(path.read_bytes()))
    with pytest.raises(GateError, match="members overlap"):
        open_file("pt2", path, **SHAPE)
    path.write_bytes(pt2.read_bytes()[:-100])
    with pytest.raises(GateError, match=r"is no \.pt2 that loads"):
        open_file("pt2", path, **SHAPE)


def test_a_pt2_of_ours_holds_no_pickle_and_loads_in_pytorch_alone(pt2, encoder, tmp_path):
    found = members(pt2)
    assert found["data/sample_inputs/model.pt"] == b""
    assert not [name for name, data in found.items() if data.startswith((b"PK", b"\x80\x02"))]
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with open_file("pt2", pt2, **SHAPE) as runtime:
        np.testing.assert_allclose(runtime.embed(images), encoder.embed(images), rtol=1e-4, atol=1e-5)
        assert not runtime.accepts((2, 40, 32, 3))
    program = torch.export.load(pt2).module()
    np.testing.assert_allclose(program(torch.from_numpy(images)).detach(), encoder.embed(images), rtol=1e-4, atol=1e-5)
    again = tmp_path / "again.pt2"
    pt2_from_encoder(encoder, again, precision="fp32", max_batch=8, provenance="{}")
    assert again.read_bytes() == pt2.read_bytes()


def test_programs_are_opened_only_when_they_are_named(bundle, photos):
    assert {"pt2", "torchscript"} == NAMED_ONLY
    script = tuple(a for a in bundle.manifest.artifacts if a.format == "torchscript")
    only = replace(bundle, manifest=replace(bundle.manifest, artifacts=script))
    assert choose(only).runtime == "torch"
    assert choose(only, "torchscript").runtime == "torchscript"
    bf16 = tuple(replace(a, precision="bf16") for a in script)
    with pytest.raises(UsageError, match="auto opens no torchscript; name it: --runtime torchscript"):
        choose(replace(only, manifest=replace(only.manifest, artifacts=bf16)), precision="bf16")
    found = verify(bundle.path, images=photos, limit=4)
    assert found.passed
    assert [report.format for report in found.reports] == ["onnx"]
    assert found.left_out == ("encoder.torchscript (torchscript fp32)",)
    with pytest.raises(UsageError, match=r"runtime must be .*; got tflite"):
        verify(bundle.path, images=photos, runtimes=["tflite"])
    with pytest.raises(UsageError, match="has no artifact to prove for pt2; name one of: onnxruntime, torchscript"):
        verify(bundle.path, images=photos, runtimes=["pt2"])


def test_an_artifact_that_was_left_out_is_not_said_to_run_nowhere(bundle, photos, mio, tmp_path):
    path = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    rows = tuple(replace(a, parity=replace(a.parity, verdict="unproven")) for a in bundle.manifest.artifacts)
    save_manifest(path, replace(bundle.manifest, artifacts=rows))
    result = mio("verify", path, "--images", photos, "--limit", 4)
    assert "unproven: encoder.torchscript (torchscript fp32); prove it where it runs, with --images DIR" in result.out
    assert "include it with --all" in result.out
    assert "cannot run here" not in result.out


def test_verify_says_what_it_left_out_and_how_to_include_it(bundle, photos, mio):
    result = mio("verify", bundle.path, "--images", photos, "--limit", 4)
    assert result.code == 0
    note = "not proved again: encoder.torchscript (torchscript fp32) is a program; include it with --all"
    assert note in result.out
    assert mio("verify", bundle.path, "--all").code == 2


def external(graph, location):
    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def in_a_branch(graph, location):
    inner = helper.make_graph([], "inner", [], [])
    inner.initializer.append(helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]))
    external(inner, location)
    graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))


def custom_operator(graph, location):
    graph.node.append(helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context=location))


@pytest.mark.parametrize(
    ("change", "location", "reason"),
    [
        (external, "../../secret", "reads '../../secret', which the manifest does not name beside it"),
        (external, "/etc/passwd", "reads '/etc/passwd', which"),
        (external, "encoder.onnx.data", "reads 'encoder.onnx.data', which"),
        (in_a_branch, "/etc/passwd", "reads '/etc/passwd', which"),
        (custom_operator, "evil.so", "has operators of com.microsoft; only those of ONNX itself are run"),
    ],
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_graph_that_reads_other_files_is_not_opened(bundle, tmp_path, runtime, change, location, reason):
    model = onnx.load(bundle.path / "encoder.onnx")
    change(model.graph, location)
    path = tmp_path / "encoder.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match=reason):
        open_file(runtime, path, **SHAPE)


def field(number, data, beyond=0):
    """A field of protobuf; with ``beyond``, its tag has bits that protobuf drops."""

    def varint(value):
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    return varint(number << 3 | 2 | beyond << 32) + varint(len(data)) + data


def test_a_tag_that_protobuf_reads_as_another_hides_nothing(bundle, tmp_path):
    import onnxruntime

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [2])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2])
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([], "g", [images], [rows]), opset_imports=versions, ir_version=8)
    node = helper.make_node("Gelu", ["images"], ["rows"]).SerializeToString()
    path = tmp_path / "encoder.onnx"
    path.write_bytes(model.SerializeToString() + field(7, field(1, node + field(7, b"com.microsoft", beyond=1))))
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])  # it finds the operator
    with pytest.raises(GateError, match="is damaged: it is no ONNX model"):
        check_onnx(path, ())


@pytest.mark.parametrize("name", ["encoder.ort", "encoder.xml", "encoder.pb", "encoder"])
def test_a_graph_whose_name_would_be_read_by_something_else_is_not_opened(bundle, tmp_path, name):
    path = tmp_path / name
    path.write_bytes((bundle.path / "encoder.onnx").read_bytes())
    with pytest.raises(GateError, match="is no ONNX file by its name"):
        open_file("openvino", path, **SHAPE)


def test_an_onnx_file_is_read_as_onnx_reads_it(bundle, tmp_path):
    path = bundle.path / "encoder.onnx"
    facts = read_onnx(path)
    model = onnx.load(path)
    assert facts.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert facts.external == set()
    check_onnx(path, ())
    for data in (b"", b"\x00", path.read_bytes()[:-5], b"\x3a\xff\xff\xff\xff\x0f"):
        (tmp_path / "x.onnx").write_bytes(data)
        with pytest.raises(GateError, match="is damaged: it is no ONNX model"):
            read_onnx(tmp_path / "x.onnx")


def test_an_artifact_behind_a_link_to_outside_is_not_opened(bundle, tmp_path):
    from mio_export.runtimes import open_runtime

    copy = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    (copy / "encoder.onnx").rename(tmp_path / "outside.onnx")
    (copy / "encoder.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(GateError, match="lies outside the bundle"):
        open_runtime(load_bundle(copy), "onnxruntime")


def test_torch_is_not_imported_to_refuse_a_pickle(pt2, tmp_path):
    path = written(tmp_path / "evil.pt2", members(pt2) | {"data/sample_inputs/model.pt": b"x"})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from mio_export.runtimes.pt2_archive import read_pt2\n"
        f"read_pt2(Path({str(path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert "GateError" in done.stderr
