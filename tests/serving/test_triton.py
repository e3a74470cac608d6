import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import triton_server
import yaml
from google.protobuf import text_format

from mio_export import embed, load_embeddings
from mio_export.bundle import load_bundle, runtime_of, save_manifest, space_fingerprint
from mio_export.bundle.sidecar import Profile, Sidecar, write_sidecar
from mio_export.errors import GateError, SpaceError, UsageError
from mio_export.files import sha256_file
from mio_export.preprocess import Preprocess
from mio_export.runtimes.opening import open_file
from mio_export.serving import RemoteEncoder, verify_server, write_repository
from mio_export.serving.messages import message_class
from mio_export.serving.triton.files import CONTRACT

ROOT = Path(__file__).parents[2]
BACKENDS = ("onnxruntime", "pytorch", "tensorrt", "python")
MODELS = ("encoder", "encoder_pixels", "encoder_decode", "encoder_encode", "encoder_finish")
ENDLESS = b"P3\n3000 3000\n255\n" + b"1 2 3 " * 4_000_000
"""Plain text, which Pillow reads in Python, for about as many seconds as it has megabytes."""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, bundle):
    """One repository of each backend; read only."""
    folder = tmp_path_factory.mktemp("repositories")
    return {backend: write_repository(bundle, folder / backend, backend=backend) for backend in BACKENDS}


@pytest.fixture
def doctored(tmp_path, bundle):
    """Copy the bundle with another manifest: ``doctored(artifact=..., manifest=...)``, both functions."""

    def make(*, artifact=lambda row: row, manifest=lambda manifest: manifest):
        path = Path(shutil.copytree(bundle.path, tmp_path / "doctored.mio"))
        changed = replace(bundle.manifest, artifacts=tuple(artifact(row) for row in bundle.manifest.artifacts))
        save_manifest(path, manifest(changed))
        fit_evidence(path)
        return path

    return make


def fit_evidence(path):
    """Let each report say what a proof of the doctored artifact would say."""
    manifest, rows = load_bundle(path).manifest, []
    for row in manifest.artifacts:
        file = path / row.parity.report
        report = json.loads(file.read_text())
        compared = [c for c in report["comparisons"] if c["device"] == report["devices"][0]]
        report |= {"artifact": row.file, "format": row.format, "runtime": runtime_of(row.format)}
        report |= {"options": dict(row.options), "devices": row.parity.devices}
        report["comparisons"] = [{**c, "device": device} for device in row.parity.devices for c in compared]
        report["evidence"] |= {"artifact_sha256": row.sha256, "companions": dict(row.companions)}
        file.write_text(json.dumps(report))
        rows.append(replace(row, parity=replace(row.parity, report_sha256=sha256_file(file))))
    save_manifest(path, replace(manifest, artifacts=tuple(rows)))


def read_config(repository, model):
    text = (repository.path / "models" / model / "config.pbtxt").read_text()
    return text_format.Parse(text, message_class("ModelConfig")())


def tensors(declared):
    names = message_class("ModelInput").DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return [(tensor.name, names[tensor.data_type].name, list(tensor.dims)) for tensor in declared]


def parameters(config):
    return {entry.key: entry.value.string_value for entry in config.parameters}


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_the_encoder_is_declared_as_its_graph(repositories, bundle, backend):
    deployed = repositories[backend]
    config = read_config(deployed, "encoder_encode")
    graph = onnx.load(deployed.path / "models/encoder_encode/1/model.onnx").graph
    for declared, values, kind in (
        (config.input, graph.input, "TYPE_UINT8"),
        (config.output, graph.output, "TYPE_FP32"),
    ):
        dims = [dim.dim_value for dim in values[0].type.tensor_type.shape.dim][1:]
        assert tensors(declared) == [(values[0].name, kind, dims)]
    assert (deployed.path / "models/encoder_encode/1/model.onnx").read_bytes() == (
        bundle.path / "encoder.onnx"
    ).read_bytes()


def test_torchscript_is_declared_by_number(repositories, bundle):
    config = read_config(repositories["pytorch"], "encoder_encode")
    assert (config.platform, config.backend) == ("pytorch_libtorch", "pytorch")
    assert tensors(config.input) == [("INPUT__0", "TYPE_UINT8", [32, 32, 3])]
    assert tensors(config.output) == [("OUTPUT__0", "TYPE_FP32", [bundle.manifest.encoder.embedding_dim])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_model_says_what_it_serves(repositories, bundle, backend):
    deployed = repositories[backend]
    file = "encoder.torchscript" if backend == "pytorch" else "encoder.onnx"
    for model in MODELS:
        config = read_config(deployed, model)
        assert config.max_batch_size == deployed.max_batch == bundle.manifest.max_batch == 32
        said = parameters(config)
        assert said.pop("graph_optimization_level", "all") == "all"
        assert said == deployed.parameters
    names = {"space", "artifact", "artifact_sha256", "precision", "runtime", "device", "decode", "versions"}
    assert said.keys() == names
    assert (said["space"], said["precision"], said["decode"]) == (bundle.manifest.space, "fp32", "full")
    assert (said["artifact"], said["artifact_sha256"]) == (file, sha256_file(bundle.path / file))
    assert said["runtime"] == {"pytorch": "torchscript", "tensorrt": "tensorrt"}.get(backend, "onnxruntime")
    assert said["device"] == ("cuda" if backend == "tensorrt" else "cpu")
    encoder = read_config(deployed, "encoder_encode")
    assert [(group.count, group.kind) for group in encoder.instance_group] == [(1, 1 if backend == "tensorrt" else 2)]
    assert encoder.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warmup.batch_size for warmup in encoder.model_warmup] == [1, 32]


def test_the_models_that_are_asked_have_the_tensors_of_the_protocol(repositories):
    for model, images in (("encoder", ("TYPE_STRING", [1])), ("encoder_pixels", ("TYPE_UINT8", [32, 32, 3]))):
        config = read_config(repositories["pytorch"], model)
        assert tensors(config.input) == [("images", *images)]
        assert tensors(config.output) == [("embedding", "TYPE_FP32", [256]), ("error", "TYPE_STRING", [1])]


def test_the_container_installs_the_versions_that_are_said(repositories):
    for backend in BACKENDS:
        versions = json.loads(repositories[backend].parameters["versions"])
        dockerfile = (repositories[backend].path / "Dockerfile").read_text()
        (installed,) = re.findall(r"^RUN pip install .*", dockerfile, re.MULTILINE)
        pinned = dict(re.findall(r"(\S+)==(\S+)", installed))
        assert pinned.keys() >= {"pillow"}
        assert ("onnxruntime" in pinned) == (backend == "python") == ("onnxruntime" in versions)
        assert pinned.items() <= versions.items()
        assert f"tritonserver:{versions['triton']}-py3" in dockerfile


def test_the_options_of_the_proof_travel(doctored, tmp_path):
    level = {"graph_optimization_level": "basic"}
    path = doctored(artifact=lambda row: replace(row, options=level) if row.format == "onnx" else row)
    own = write_repository(path, tmp_path / "own")
    assert read_config(own, "doctored_encode").optimization.graph.level == -1
    python = write_repository(path, tmp_path / "python", backend="python")
    assert parameters(read_config(python, "doctored_encode"))["graph_optimization_level"] == "basic"


def test_external_weights_come_along(doctored, tmp_path):
    path = doctored()
    manifest = load_bundle(path).manifest
    model = onnx.load(path / "encoder.onnx")
    onnx.save(model, path / "encoder.onnx", save_as_external_data=True, location="encoder.onnx.data")
    row = replace(
        manifest.artifacts[0],
        sha256=sha256_file(path / "encoder.onnx"),
        companions={"encoder.onnx.data": sha256_file(path / "encoder.onnx.data")},
    )
    save_manifest(path, replace(manifest, artifacts=(row, *manifest.artifacts[1:])))
    fit_evidence(path)
    deployed = write_repository(path, tmp_path / "repository")
    graph = deployed.path / "models/doctored_encode/1/model.onnx"
    beside = ("encoder.onnx.data",)
    with open_file("onnxruntime", graph, image_shape=(32, 32, 3), embedding_dim=256, companions=beside) as runtime:
        assert runtime.embed(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 256)


def test_on_a_gpu_nothing_is_rounded_to_tf32(doctored, tmp_path):
    path = doctored(artifact=lambda row: replace(row, parity=replace(row.parity, devices=("cpu", "cuda"))))
    deployed = write_repository(path, tmp_path / "repository")
    assert deployed.parameters["device"] == "cuda"
    config = read_config(deployed, "doctored_encode")
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, [(entry.key, entry.value) for entry in cuda.parameters]) == ("cuda", [("use_tf32", "0")])
    assert config.instance_group[0].kind == 1
    service = yaml.safe_load((deployed.path / "compose.yaml").read_text())["services"]["triton"]
    assert service["environment"] == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_the_container_is_open_to_this_machine_alone_and_may_do_little(repositories):
    service = yaml.safe_load((repositories["onnxruntime"].path / "compose.yaml").read_text())["services"]["triton"]
    assert service["ports"] == [f"${{TRITON_ADDRESS:-127.0.0.1}}:{port}:{port}" for port in (8000, 8001, 8002)]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["volumes"] == ["./models:/models:ro"]
    assert service["command"].endswith("--http-max-input-size=67108864")
    assert "deploy" not in service
    assert "USER triton-server" in (repositories["onnxruntime"].path / "Dockerfile").read_text()


def test_another_user_may_read_every_file(repositories):
    for path in repositories["onnxruntime"].path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_decoding_needs_numpy_and_pillow_only(repositories, photos):
    version = repositories["onnxruntime"].path / "models/encoder_decode/1"
    shipped = {path.relative_to(version) for path in (version / "mio_export").rglob("*.py")}
    assert shipped == {path.relative_to(ROOT) for name in CONTRACT for path in (ROOT / "mio_export").glob(name)}
    for name in shipped:
        assert (version / name).read_bytes() == (ROOT / name).read_bytes()
    photo = photos / "flower/12.jpg"
    code = f"""
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, {str(version)!r})
from mio_export import decoding, limits, preprocess
assert Path(preprocess.__file__).is_relative_to({str(version)!r}), preprocess.__file__
values = json.loads(Path({str(version / "contract.json")!r}).read_text())
contract = values["preprocess"]
contract = preprocess.Preprocess(**dict(contract, mean=tuple(contract["mean"]), std=tuple(contract["std"])))
with decoding.Decoder(contract, limits=limits.Limits(**values["limits"]), isolated=True) as decoder:
    pixels = decoder.decode(Path({str(photo)!r}).read_bytes())
assert not {{"torch", "pydantic", "onnxruntime", "pyarrow"}} & set(sys.modules)
print(hashlib.sha256(pixels.tobytes()).hexdigest())
"""
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    expected = Preprocess(image_size=32, resize_size=36).decode(photo.read_bytes())
    assert found.stdout.strip() == hashlib.sha256(expected.tobytes()).hexdigest()


def test_without_an_engine_the_graph_and_a_script_are_deployed(repositories, bundle):
    deployed = repositories["tensorrt"]
    assert deployed.notes[0].startswith("there is no engine yet")
    assert (deployed.path / "engine/model.onnx").read_bytes() == (bundle.path / "encoder.onnx").read_bytes()
    assert not (deployed.path / "models/encoder_encode/1/model.plan").exists()
    script = deployed.path / "build_engine.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert "--saveEngine=models/encoder_encode/1/model.plan" in script.read_text()
    assert "--maxShapes=images:32x32x32x3" in script.read_text()


def as_engine(path, *, library, verdict="proved", max_batch=16):
    """Turn the ONNX row of a bundle into an engine's; deploying never opens an engine, so any bytes will do."""
    manifest = load_bundle(path).manifest
    engine = path / "encoder.engine"
    engine.write_bytes(b"an engine")
    write_sidecar(
        engine,
        Sidecar(
            library=library,
            library_version="10.13.3.9",
            capability="8.9",
            profile=Profile(min=1, opt=8, max=max_batch),
            engine_sha256=sha256_file(engine),
            provenance=json.loads(manifest.common_json()),
        ),
    )
    row = manifest.artifacts[0]
    row = replace(
        row,
        file=engine.name,
        format=library,
        sha256=sha256_file(engine),
        companions={"encoder.engine.json": sha256_file(path / "encoder.engine.json")},
        capability="8.9",
        tools={library: "10.13.3.9"},
        parity=replace(row.parity, verdict=verdict, devices=("cuda",)),
    )
    save_manifest(path, replace(manifest, artifacts=(row,)))
    fit_evidence(path)


def test_a_proved_engine_is_deployed_for_its_own_batches(doctored, tmp_path):
    path = doctored()
    as_engine(path, library="tensorrt")
    deployed = write_repository(path, tmp_path / "repository", backend="tensorrt")
    encoder = deployed.path / "models/doctored_encode/1"
    assert (encoder / "model.plan").read_bytes() == b"an engine"
    assert (encoder / "model.plan.json").read_bytes() == (path / "encoder.engine.json").read_bytes()
    assert (deployed.parameters["device"], deployed.max_batch) == ("cuda", 16)
    assert not (deployed.path / "build_engine.sh").exists()
    assert "compute capability 8.9 with TensorRT 10.13.3.9" in (deployed.path / "README.md").read_text()


def test_an_engine_that_nobody_proved_is_not_deployed(doctored, tmp_path):
    path = doctored()
    as_engine(path, library="tensorrt", verdict="unproven")
    with pytest.raises(GateError, match="no proved tensorrt or onnx fp32 artifact"):
        write_repository(path, tmp_path / "repository", backend="tensorrt")


def test_an_engine_of_tensorrt_for_rtx_is_not_deployed(doctored, tmp_path):
    path = doctored()
    as_engine(path, library="tensorrt-rtx")
    with pytest.raises(UsageError, match=r"for Triton; it holds: tensorrt-rtx fp32 \(proved\)"):
        write_repository(path, tmp_path / "repository", backend="tensorrt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "openvino"}, "backend must be onnxruntime, pytorch, tensorrt or python; got 'openvino'"),
        ({"precision": "int8"}, r"no proved onnx int8 artifact for Triton; it holds: onnx fp32 \(proved\), torch"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda; got 'tpu'"),
        ({"decode": "fast"}, "decode must be full or scaled; got 'fast'"),
    ],
)
def test_a_wrong_choice_is_named(bundle, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        write_repository(bundle, tmp_path / "repository", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_proved_there_is_deployed(bundle, doctored, tmp_path):
    with pytest.raises(GateError, match=r"runs encoder.onnx on cpu, not on cuda; it was proved on cpu: mio verify"):
        write_repository(bundle, tmp_path / "repository", device="cuda")
    path = doctored(artifact=lambda row: replace(row, parity=replace(row.parity, devices=("cpu", "cuda"))))
    with pytest.raises(GateError, match=r"--backend python runs encoder.onnx on cpu, not on cuda"):
        write_repository(path, tmp_path / "repository", backend="python", device="cuda")


def test_what_nobody_proved_is_not_deployed(doctored, tmp_path):
    path = doctored(artifact=lambda row: replace(row, parity=replace(row.parity, verdict="unproven")))
    with pytest.raises(GateError, match=r"it holds: onnx fp32 \(unproven\)"):
        write_repository(path, tmp_path / "repository")


def test_a_tampered_bundle_is_refused_and_nothing_is_written(mio, doctored, tmp_path):
    path = doctored()
    with (path / "encoder.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff\x00")
    result = mio("deploy", "triton", path, "-o", tmp_path / "new" / "repository")
    assert result.code == 3
    assert result.err.startswith(f"mio: {path} is not what was proved; nothing is deployed\n     encoder.onnx: sha256")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["doctored.mio"]


def test_an_artifact_whose_evidence_does_not_fit_is_not_deployed(mio, bundle, tmp_path, forge):
    path = Path(shutil.copytree(bundle.path, tmp_path / "forged.mio"))
    report = path / "parity" / "onnx-fp32.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"verdict": "refused", "problems": ["error 1"]}))
    forge(path)
    result = mio("deploy", "triton", path, "-o", tmp_path / "repository")
    assert result.code == 3
    assert "is refused; nothing is deployed" in result.err
    assert "says refused (error 1), the manifest says proved" in result.err
    assert not (tmp_path / "repository").exists()


def test_a_graph_that_reads_other_files_is_not_deployed(bundle, tmp_path, forge):
    path = Path(shutil.copytree(bundle.path, tmp_path / "forged.mio"))
    model = onnx.load(path / "encoder.onnx")
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    (path / "encoder.onnx").write_bytes(model.SerializeToString())
    forge(path)
    with pytest.raises(GateError, match="reads '/etc/passwd', which the manifest does not name beside it"):
        write_repository(path, tmp_path / "repository")


def test_a_graph_that_disagrees_with_the_manifest_is_refused(doctored, tmp_path):
    def narrower(manifest):
        encoder = replace(manifest.encoder, embedding_dim=100)
        parts = {"weights_sha256": manifest.weights_sha256, "preprocess": manifest.preprocess}
        return replace(manifest, encoder=encoder, space=space_fingerprint(encoder=encoder, **parts))

    path = doctored(manifest=narrower)
    with pytest.raises(GateError, match=r"its tensors are \[.*\('embeddings', 1, 0, 256\)\], not .*, 0, 100\)"):
        write_repository(path, tmp_path / "repository")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["doctored.mio"]


def test_an_artifact_that_changes_while_it_is_copied_is_not_deployed(bundle, tmp_path, monkeypatch):
    copy = shutil.copyfile

    def changing(source, target):
        copy(source, target)
        if Path(target).name == "model.onnx":
            with Path(target).open("ab") as file:
                file.write(b"\0")

    monkeypatch.setattr(shutil, "copyfile", changing)
    with pytest.raises(GateError, match=r"encoder\.onnx changed while it was copied"):
        write_repository(bundle, tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []


def test_what_a_template_says_must_be_known_to_triton(bundle, tmp_path, monkeypatch):
    from mio_export.serving.triton import files

    shutil.copytree(files._HERE / "templates", tmp_path / "here" / "templates")
    shutil.copy(files._HERE / "model.py", tmp_path / "here")
    template = tmp_path / "here" / "templates" / "models" / "decode.pbtxt"
    template.write_text(template.read_text().replace("input {", "inputs {", 1))
    monkeypatch.setattr(files, "_HERE", tmp_path / "here")
    with pytest.raises(text_format.ParseError, match="no field named"):
        write_repository(bundle, tmp_path / "repository")
    assert [entry.name for entry in tmp_path.iterdir()] == ["here"]


def test_another_repository_is_not_overwritten_silently(mio, bundle, tmp_path):
    out = tmp_path / "repository"
    assert mio("deploy", "triton", bundle.path, "-o", out).code == 0
    assert mio("deploy", "triton", bundle.path, "-o", out).code == 0, "the same repository again is no conflict"
    before = (out / "models/encoder_encode/config.pbtxt").read_bytes()
    refused = mio("deploy", "triton", bundle.path, "-o", out, "--backend", "python")
    assert refused.code == 2
    assert "exists and is another repository; choose another -o, or add --overwrite" in refused.err
    assert (out / "models/encoder_encode/config.pbtxt").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]
    assert mio("deploy", "triton", bundle.path, "-o", out, "--backend", "python", "--overwrite").code == 0
    assert (out / "models/encoder_encode/1/model.py").is_file()


def test_a_folder_of_somebody_else_is_never_replaced(mio, bundle, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = mio("deploy", "triton", bundle.path, "-o", tmp_path, "--overwrite")
    assert result.code == 2
    assert "is not a repository of mio deploy" in result.err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_says_what_it_wrote(mio, bundle, tmp_path):
    result = mio("deploy", "triton", bundle.path, "-o", tmp_path / "repository", "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert written["models"] == ["encoder", "encoder_pixels"]
    assert written["parameters"]["space"] == bundle.manifest.space
    assert str(tmp_path) not in (tmp_path / "repository/README.md").read_text()


# from here on with the real server, from an environment of its own


@pytest.fixture(scope="session")
def stock_python():
    """The Python that has nvidia-pytriton and tritonclient, or a skip."""
    if not triton_server.PYTHON.is_file():
        pytest.skip(f"there is no {triton_server.PYTHON}: make builds it, MIO_TRITON_PYTHON names another")
    return triton_server.PYTHON


def ask(python, code, *arguments, data=b""):
    """Run code in the environment of the stock client; return what it writes."""
    command = [python, "-W", "ignore", "-c", code, *map(str, arguments)]
    found = subprocess.run(command, input=data, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr.decode()
    return found.stdout


def test_the_stock_client_reads_every_config_as_we_do(stock_python, repositories):
    code = """
import json, sys
from pathlib import Path
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
same = {}
for path, wire in json.loads(sys.argv[1]):
    read = text_format.Parse(Path(path).read_text(), model_config_pb2.ModelConfig())
    same[path] = read == model_config_pb2.ModelConfig.FromString(bytes.fromhex(wire))
print(json.dumps(same))
"""
    models = [(done, model) for done in repositories.values() for model in MODELS]
    wires = {
        str(done.path / "models" / model / "config.pbtxt"): read_config(done, model).SerializeToString().hex()
        for done, model in models
    }
    same = json.loads(ask(stock_python, code, json.dumps([*wires.items()])))
    assert same == dict.fromkeys(wires, True)
    assert len(same) == 20


@pytest.fixture(scope="module")
def other(bundle, tmp_path_factory):
    """The same bundle under another name, which is served with the other way to decode."""
    return load_bundle(shutil.copytree(bundle.path, tmp_path_factory.mktemp("other") / "other.mio"))


@pytest.fixture(scope="module")
def server(stock_python, repositories, other, tmp_path_factory):
    """A server of both, that gives an image a second."""
    folder = tmp_path_factory.mktemp("server")
    repository = Path(shutil.copytree(repositories["python"].path, folder / "repository"))
    contract = repository / "models/encoder_decode/1/contract.json"
    contract.write_text(contract.read_text().replace('"decode_s": 10.0', '"decode_s": 1.0'))
    scaled = write_repository(other, folder / "scaled", backend="python", decode="scaled")
    with triton_server.running(repository, folder, scaled.path / "models") as running:
        yield running


def url(server, protocol, name="encoder"):
    return f"{protocol}://127.0.0.1:{server.http_port if protocol == 'http' else server.grpc_port}/{name}"


@pytest.mark.parametrize("protocol", ["http", pytest.param("grpc", marks=pytest.mark.slow)])
def test_a_deployed_repository_is_held_to_the_gate(server, bundle, photos, protocol):
    assert verify_server(bundle.path, url(server, protocol), images=photos).problems == ()


def test_a_deployed_repository_that_decodes_scaled_is_held_to_the_gate(server, other, photos, mio):
    result = mio("verify", other.path, "--server", url(server, "http", "other"), "--images", photos)
    assert result.code == 0, result.err


def test_a_server_of_another_space_is_refused(server):
    with pytest.raises(SpaceError, match="another embedding space"):
        RemoteEncoder(url(server, "http"), space="0" * 64)


def cosine(a, b):
    return ((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


@pytest.mark.parametrize(("name", "decode"), [("encoder", "full"), ("other", "scaled")])
def test_the_server_gives_the_vectors_of_mio_embed(server, bundle, photos, tmp_path, name, decode):
    embed(bundle.path, photos, tmp_path / "store", decode=decode)
    store = load_embeddings(tmp_path / "store")
    with RemoteEncoder(url(server, "grpc", name)) as encoder:
        assert encoder.parameters["decode"] == decode
        found, errors = encoder.embed_files([(photos / key).read_bytes() for key in store.keys])
    assert errors == [None] * 24
    assert cosine(found, store.vectors) >= 0.99999
    distances = np.linalg.norm(found - store.vectors, axis=1) / np.linalg.norm(store.vectors, axis=1)
    assert distances.max() < 1e-4, "the other decode mode is 1e-3 away"


STOCK = """
import sys
import numpy as np
import importlib
address, protocol, kind, *paths = sys.argv[1:]
triton = importlib.import_module("tritonclient." + protocol)
client = triton.InferenceServerClient(address)
if kind == "files":
    data = np.array([[open(path, "rb").read()] for path in paths] + [[b"text"]], dtype=object)
else:
    data = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(-1, 32, 32, 3)
images = triton.InferInput("images", list(data.shape), "BYTES" if kind == "files" else "UINT8")
images.set_data_from_numpy(data)
answer = client.infer("encoder" if kind == "files" else "encoder_pixels", [images])
vectors, errors = answer.as_numpy("embedding"), answer.as_numpy("error")
assert vectors.shape == (len(data), 256) and errors.shape == (len(data), 1)
if kind == "files":
    assert b"not an image" in errors[-1, 0] and np.isnan(vectors[-1]).all()
    vectors, errors = vectors[:-1], errors[:-1]
assert errors.tolist() == [[b""]] * len(vectors)
sys.stdout.buffer.write(vectors.tobytes())
"""


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_stock_client_gets_what_ours_gets(stock_python, server, bundle, photos, protocol):
    paths = sorted(photos.rglob("*.jpg"))
    address = url(server, protocol).split("/")[2]
    pixels = np.stack([bundle.manifest.preprocess.decode(path.read_bytes()) for path in paths])
    with RemoteEncoder(url(server, protocol)) as encoder:
        expected = encoder.embed(pixels)
    for kind, arguments, data in (("files", paths, b""), ("pixels", [], pixels.tobytes())):
        answer = ask(stock_python, STOCK, address, protocol, kind, *arguments, data=data)
        found = np.frombuffer(answer, np.float32).reshape(24, -1)
        assert cosine(found, expected) >= 0.999999


def test_a_bad_image_answers_for_itself_and_its_neighbours_are_untouched(server, photos):
    good = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[:3]]
    with RemoteEncoder(url(server, "http")) as encoder:
        expected, _ = encoder.embed_files(good)
        start = time.monotonic()
        vectors, errors = encoder.embed_files([good[0], b"", good[1][:500], ENDLESS, good[1], b"text", good[2]])
        assert time.monotonic() - start < 5
    assert [error is None for error in errors] == [True, False, False, False, True, False, True]
    assert "the file is empty" in errors[1]
    assert "decoding takes more than 1 seconds" in errors[3]
    assert "not an image that Pillow can read" in errors[5]
    assert np.isnan(vectors[[1, 2, 3, 5]]).all()
    assert cosine(vectors[[0, 4, 6]], expected) >= 0.999999


def test_requests_that_meet_in_a_batch_get_their_own_answers(server, photos):
    files = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    with RemoteEncoder(url(server, "grpc")) as encoder:
        expected, _ = encoder.embed_files(files)

    def client(number):
        rng = np.random.default_rng(number)
        with RemoteEncoder(url(server, "grpc")) as encoder:
            for _ in range(20):
                chosen = rng.integers(0, 25, rng.integers(1, 6))  # the last is no image
                vectors, errors = encoder.embed_files([[*files, b"text"][index] for index in chosen])
                assert [error is not None for error in errors] == [index == 24 for index in chosen]
                for index, vector in zip(chosen, vectors, strict=True):
                    assert (
                        np.isnan(vector).all()
                        if index == 24
                        else cosine(vector[None], expected[index][None]) > 0.999999
                    )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))


def test_bytes_that_are_no_tensor_are_refused_without_a_trace(server):
    inputs = [{"name": "images", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}]
    head = json.dumps({"inputs": inputs}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    connection.request("POST", "/v2/models/encoder/infer", head + b"\xff\xff\xff\x7fxx", headers)
    answer = connection.getresponse()
    assert 400 <= answer.status < 500
    assert b"Traceback" not in answer.read()
    connection.close()


CLOSED = ("/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/status", "/v2/repository/index")


@pytest.mark.parametrize("path", CLOSED)
def test_what_would_change_the_server_is_closed(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
    connection.request("POST" if path.endswith("index") else "GET", path)
    answer = connection.getresponse()
    assert answer.status == 403, answer.read()
    assert b"restricted" in answer.read()
    connection.close()


@pytest.mark.parametrize("method", ["LogSettings", "TraceSetting", "SystemSharedMemoryStatus", "RepositoryIndex"])
def test_it_is_closed_over_grpc_too(server, method):
    address = f"127.0.0.1:{server.grpc_port}"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError, match="restricted"):
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"", timeout=10)


def test_a_server_with_other_versions_does_not_start(stock_python, repositories, tmp_path):
    repository = Path(shutil.copytree(repositories["python"].path, tmp_path / "repository"))
    for config in repository.glob("models/*/config.pbtxt"):
        config.write_text(re.sub(r'(\\"pillow\\": )\\"[\d.]+', r'\1\\"1.1.7', config.read_text()))
    refused = pytest.raises(AssertionError, match=r"needed: pip install pillow==1\.1\.7")
    with refused, triton_server.running(repository, tmp_path):
        pass


def test_a_server_whose_model_has_died_ends_and_does_not_go_on_saying_that_it_is_ready(server):
    """The last test of this file: the server ends."""
    os.kill(server.models()[0], signal.SIGKILL)
    assert server.process.wait(10) == 1
    assert "1 of 8 Python models died; the server is ended" in server.log.read_text()
    assert not server.is_ready()
