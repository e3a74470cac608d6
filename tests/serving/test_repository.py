import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mio_export import embed, load_embeddings
from mio_export.bundle import load_bundle, runtime_of, save_manifest, space_fingerprint
from mio_export.errors import GateError, UsageError
from mio_export.files import sha256_file
from mio_export.preprocess import Preprocess
from mio_export.runtimes.registry import open_file
from mio_export.serving.repository import write_repository
from mio_export.serving.repository_check import check_repository
from mio_export.serving.repository_config import data_type, from_text
from mio_export.serving.repository_models import CONTRACT
from mio_export.sidecar import Profile, Sidecar, write_sidecar

ROOT = Path(__file__).parents[2]
BACKENDS = ("onnxruntime", "pytorch", "tensorrt", "python")


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
    return from_text((repository.path / "models" / model / "config.pbtxt").read_text())


def tensors(declared):
    return [(tensor.name, data_type(tensor), list(tensor.dims)) for tensor in declared]


def parameters(config):
    return {entry.key: entry.value.string_value for entry in config.parameters}


@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_the_encoder_is_declared_as_its_graph(repositories, bundle, backend):
    deployed = repositories[backend]
    config = read_config(deployed, "encoder-encoder")
    graph = onnx.load(deployed.path / "models/encoder-encoder/1/model.onnx").graph
    for declared, values, kind in (
        (config.input, graph.input, "TYPE_UINT8"),
        (config.output, graph.output, "TYPE_FP32"),
    ):
        dims = [dim.dim_value for dim in values[0].type.tensor_type.shape.dim][1:]
        assert tensors(declared) == [(values[0].name, kind, dims)]
    assert (deployed.path / "models/encoder-encoder/1/model.onnx").read_bytes() == (
        bundle.path / "encoder.onnx"
    ).read_bytes()


def test_torchscript_is_declared_by_number(repositories, bundle):
    config = read_config(repositories["pytorch"], "encoder-encoder")
    assert (config.platform, config.backend) == ("pytorch_libtorch", "pytorch")
    assert tensors(config.input) == [("INPUT__0", "TYPE_UINT8", [32, 32, 3])]
    assert tensors(config.output) == [("OUTPUT__0", "TYPE_FP32", [bundle.manifest.encoder.embedding_dim])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_model_says_what_it_serves(repositories, bundle, backend):
    deployed = repositories[backend]
    file = "encoder.torchscript" if backend == "pytorch" else "encoder.onnx"
    assert deployed.models == ("encoder", "encoder-decoder", "encoder-encoder")
    for model in deployed.models:
        config = read_config(deployed, model)
        assert config.max_batch_size == bundle.manifest.max_batch == 32
        assert {
            "space": bundle.manifest.space,
            "artifact_sha256": sha256_file(bundle.path / file),
            "precision": "fp32",
            "decode": "full",
        }.items() <= parameters(config).items()
    encoder = read_config(deployed, "encoder-encoder")
    assert [(group.count, group.kind) for group in encoder.instance_group] == [(1, 1 if backend == "tensorrt" else 2)]
    assert encoder.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warmup.batch_size for warmup in encoder.model_warmup] == [1, 32]


def test_the_options_of_the_proof_travel(doctored, tmp_path):
    level = {"graph_optimization_level": "basic"}
    path = doctored(artifact=lambda row: replace(row, options=level) if row.format == "onnx" else row)
    own = write_repository(path, tmp_path / "own")
    assert read_config(own, "encoder-encoder").optimization.graph.level == -1
    python = write_repository(path, tmp_path / "python", backend="python")
    assert parameters(read_config(python, "encoder-encoder"))["graph_optimization_level"] == "basic"


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
    graph = deployed.path / "models/encoder-encoder/1/model.onnx"
    beside = ("encoder.onnx.data",)
    with open_file("onnxruntime", graph, image_shape=(32, 32, 3), embedding_dim=256, companions=beside) as runtime:
        assert runtime.embed(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 256)


def test_on_a_gpu_nothing_is_rounded_to_tf32(doctored, tmp_path):
    path = doctored(artifact=lambda row: replace(row, parity=replace(row.parity, devices=("cpu", "cuda"))))
    deployed = write_repository(path, tmp_path / "repository")
    assert deployed.device == "cuda"
    config = read_config(deployed, "encoder-encoder")
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, [(entry.key, entry.value) for entry in cuda.parameters]) == ("cuda", [("use_tf32", "0")])
    assert config.instance_group[0].kind == 1
    compose = (deployed.path / "compose.yaml").read_text()
    assert 'NVIDIA_TF32_OVERRIDE: "0"' in compose
    assert "capabilities: [gpu]" in compose


def test_the_ports_are_open_to_this_machine_alone_unless_an_address_is_named(repositories):
    compose = (repositories["onnxruntime"].path / "compose.yaml").read_text()
    ports = re.findall(r'- "(.*):(\d+):\2" # (\w+)', compose)
    assert {address for address, _, _ in ports} == {"${TRITON_ADDRESS:-127.0.0.1}"}
    assert [port for _, port, _ in ports] == ["8000", "8001", "8002"]


def test_the_decoder_needs_numpy_and_pillow_only(repositories, photos):
    version = repositories["onnxruntime"].path / "models/encoder-decoder/1"
    for name in CONTRACT:
        assert (version / "mio_export" / name).read_bytes() == (ROOT / "mio_export" / name).read_bytes()
    photo = photos / "flower/12.jpg"
    code = f"""
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, {str(version)!r})
from mio_export import preprocess
assert Path(preprocess.__file__).is_relative_to({str(version)!r}), preprocess.__file__
values = json.loads(Path({str(version / "preprocess.json")!r}).read_text())
contract = preprocess.Preprocess(**dict(values, mean=tuple(values["mean"]), std=tuple(values["std"])))
pixels = contract.decode(Path({str(photo)!r}).read_bytes())
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
    assert not (deployed.path / "models/encoder-encoder/1/model.plan").exists()
    script = deployed.path / "build_engine.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert "--saveEngine=models/encoder-encoder/1/model.plan" in script.read_text()
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
    assert (deployed.path / "models/encoder-encoder/1/model.plan").read_bytes() == b"an engine"
    assert (deployed.device, deployed.max_batch) == ("cuda", 16)
    assert not (deployed.path / "build_engine.sh").exists()
    assert "compute capability 8.9 with TensorRT 10.13.3.9" in (deployed.path / "README.md").read_text().replace(
        "\n", " "
    )


def test_an_engine_that_nobody_proved_is_not_deployed(doctored, tmp_path):
    path = doctored()
    as_engine(path, library="tensorrt", verdict="unproven")
    with pytest.raises(UsageError, match="needs a proved engine, or the ONNX graph"):
        write_repository(path, tmp_path / "repository", backend="tensorrt")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_of_tensorrt_for_rtx_is_refused_with_the_reason(doctored, tmp_path, backend):
    path = doctored()
    as_engine(path, library="tensorrt-rtx")
    with pytest.raises(UsageError, match="TensorRT for RTX is another format, which it cannot load"):
        write_repository(path, tmp_path / "repository", backend=backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "openvino"}, "backend must be onnxruntime, pytorch, tensorrt, python; got 'openvino'"),
        ({"precision": "int8"}, "holds no onnx int8 artifact; it holds: onnx fp32, torchscript fp32"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda; got 'tpu'"),
        ({"decode": "fast"}, "decode must be full or scaled; got 'fast'"),
        ({"backend": "python", "device": "cuda"}, "runs on the CPU"),
    ],
)
def test_a_wrong_choice_is_named(bundle, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        write_repository(bundle, tmp_path / "repository", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_proved_there_is_deployed(bundle, doctored, tmp_path):
    with pytest.raises(GateError, match="was proved on cpu, not on cuda; run there: mio verify"):
        write_repository(bundle, tmp_path / "repository", device="cuda")
    path = doctored(artifact=lambda row: replace(row, parity=replace(row.parity, verdict="unproven")))
    with pytest.raises(GateError, match="is unproven; only proved ones are deployed"):
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


def test_a_graph_that_disagrees_with_the_manifest_is_refused_before_the_rename(doctored, tmp_path):
    def narrower(manifest):
        encoder = replace(manifest.encoder, embedding_dim=100)
        parts = {"weights_sha256": manifest.weights_sha256, "preprocess": manifest.preprocess}
        return replace(manifest, encoder=encoder, space=space_fingerprint(encoder=encoder, **parts))

    path = doctored(manifest=narrower)
    for backend in ("onnxruntime", "pytorch", "tensorrt", "python"):
        with pytest.raises(GateError, match=r"output \w+ TYPE_FP32 \[100\] in config.pbtxt, \w+ TYPE_FP32 \[\d+\] in"):
            write_repository(path, tmp_path / "repository", backend=backend)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["doctored.mio"]


@pytest.mark.parametrize(
    ("model", "old", "new", "problem"),
    [
        ("encoder-encoder", "dims: 3\n", "dims: 1\n", "input images TYPE_UINT8 [32, 32, 1] in config.pbtxt, images"),
        ("encoder-encoder", "TYPE_UINT8", "TYPE_FP32", "input images TYPE_FP32"),
        ("encoder-encoder", 'name: "embeddings"', 'name: "vectors"', "output vectors"),
        ("encoder-encoder", "max_batch_size: 32", "", "Triton would take 4"),
        ("encoder-encoder", "max_batch_size: 32", "max_batch_size: 8", "takes 8 of 32 at once"),
        ("encoder-encoder", '"model.onnx"', '"other.onnx"', "1/other.onnx is missing"),
        ("encoder-decoder", "dims: 3\n", "dims: 1\n", "preprocess.json"),
        ("encoder-decoder", 'name: "encoder-decoder"', 'name: "decoder"', "its name is 'decoder'"),
        ("encoder", '"encoder-decoder"', '"decoder"', "step decoder is no model of this repository"),
        (
            "encoder",
            'key: "images"\n      value: "pixels"\n    }\n    output',
            'key: "x" }\n    output',
            "is given x nothing",
        ),
        ("encoder", 'string_value: "', 'string_value: "0', "of different embedding spaces"),
        ("encoder", 'value: "embeddings"', 'value: "vectors"', "its output is to be embeddings"),
        ("encoder", "TYPE_FP32", "TYPE_UINT8", "its output is to be embeddings TYPE_UINT8"),
        ("encoder", "input {", "inputs {", "no field named"),
    ],
)
def test_a_repository_that_was_written_wrong_is_found(repositories, tmp_path, model, old, new, problem):
    folder = Path(shutil.copytree(repositories["onnxruntime"].path, tmp_path / "repository"))
    assert check_repository(folder) == []
    path = folder / "models" / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    problems = check_repository(folder)
    assert problem in "\n".join(problems)


def test_another_file_than_the_proved_one_is_found(repositories, tmp_path):
    for backend, file in (("onnxruntime", "model.onnx"), ("pytorch", "model.pt"), ("python", "model.onnx")):
        folder = Path(shutil.copytree(repositories[backend].path, tmp_path / backend))
        with (folder / "models/encoder-encoder/1" / file).open("ab") as opened:
            opened.write(b"\0\0")
        assert check_repository(folder) == [f"encoder-encoder: {file} is not the artifact that artifact_sha256 names"]


def test_a_graph_with_a_fixed_batch_is_found(repositories, bundle, tmp_path):
    folder = Path(shutil.copytree(repositories["onnxruntime"].path, tmp_path / "repository"))
    path = folder / "models/encoder-encoder/1/model.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    config = folder / "models/encoder-encoder/config.pbtxt"
    config.write_text(config.read_text().replace(sha256_file(bundle.path / "encoder.onnx"), sha256_file(path)))
    assert "the batch of images is fixed at 2" in "\n".join(check_repository(folder))


def test_another_repository_is_not_overwritten_silently(mio, bundle, tmp_path):
    out = tmp_path / "repository"
    assert mio("deploy", "triton", bundle.path, "-o", out).code == 0
    assert mio("deploy", "triton", bundle.path, "-o", out).code == 0, "the same repository again is no conflict"
    before = (out / "models/encoder-encoder/config.pbtxt").read_bytes()
    refused = mio("deploy", "triton", bundle.path, "-o", out, "--backend", "python")
    assert refused.code == 2
    assert "exists and is another repository; choose another -o, or add --overwrite" in refused.err
    assert (out / "models/encoder-encoder/config.pbtxt").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]
    assert mio("deploy", "triton", bundle.path, "-o", out, "--backend", "python", "--overwrite").code == 0
    assert (out / "models/encoder-encoder/1/model.py").is_file()


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
    assert written["models"] == ["encoder", "encoder-decoder", "encoder-encoder"]
    assert written["space"] == bundle.manifest.space
    assert str(tmp_path) not in (tmp_path / "repository/README.md").read_text()


# from here on with the real server and its client, in an environment of their own


@pytest.fixture(scope="session")
def serve_python():
    """The Python that has nvidia-pytriton, or a skip."""
    path = Path(os.environ.get("MIO_SERVE_PYTHON") or ROOT / ".venv-serve/bin/python")
    if not path.is_file():
        pytest.skip(f"no environment with nvidia-pytriton: {path} is not there (MIO_SERVE_PYTHON names another)")
    return path


def ask(python, code, *arguments):
    """Run code in the server's environment; return what it prints as JSON."""
    found = subprocess.run(
        [python, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_the_stock_client_reads_every_config_as_we_do(serve_python, repositories):
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
    configs = [path for done in repositories.values() for path in sorted(done.path.glob("models/*/config.pbtxt"))]
    wires = [[str(path), from_text(path.read_text()).SerializeToString().hex()] for path in configs]
    same = ask(serve_python, code, json.dumps(wires))
    assert same == {str(path): True for path in configs}
    assert len(same) == 12


@pytest.fixture(scope="module")
def server(serve_python, repositories, bundle, tmp_path_factory):
    """The address of a server with the repository of the Python backend, and with another that decodes scaled."""
    code = """
import json, pathlib, pytriton, sys, sysconfig
print(json.dumps([str(pathlib.Path(pytriton.__file__).parent / "tritonserver"), sysconfig.get_config_var("LIBDIR"),
    f"{sys.version_info[0]}.{sys.version_info[1]}"]))
"""
    distribution, libraries, version = ask(serve_python, code)
    folder = tmp_path_factory.mktemp("server")
    stub = Path(distribution) / "python_backend_stubs" / version / "triton_python_backend_stub"
    backends = shutil.copytree(Path(distribution) / "backends", folder / "backends")
    shutil.copy(stub, backends / "python" / stub.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    other = Path(shutil.copytree(bundle.path, folder / "other.mio"))
    save_manifest(other, replace(bundle.manifest, name="other"))
    scaled = write_repository(other, folder / "scaled", backend="python", decode="scaled")
    command = [
        f"{distribution}/bin/tritonserver",
        f"--model-repository={repositories['python'].path / 'models'}",
        f"--model-repository={scaled.path / 'models'}",
        f"--backend-directory={backends}",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=0",
        "--allow-metrics=0",
        f"--backend-config=python,shm-region-prefix-name=mio-test-{port}",
    ]
    environment = {
        **os.environ,
        "PATH": f"{serve_python.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{Path(distribution).parents[1] / 'nvidia_pytriton.libs'}:{libraries}",
    }
    with log.open("w") as opened:
        process = subprocess.Popen(command, env=environment, stdout=opened, stderr=subprocess.STDOUT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/v2/health/ready", process, log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(url, process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    pytest.fail(log.read_text()[-3000:])


ASK = """
import json, sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException
client = triton.InferenceServerClient(sys.argv[1], concurrency=8)
def files(*paths):
    data = np.array([[open(path, "rb").read()] for path in paths], dtype=object)
    tensor = triton.InferInput("files", list(data.shape), "BYTES")
    tensor.set_data_from_numpy(data)
    return [tensor]
"""


@pytest.mark.parametrize(("model", "decode"), [("encoder", "full"), ("other", "scaled")])
def test_the_server_gives_the_vectors_of_mio_embed(serve_python, server, bundle, photos, tmp_path, model, decode):
    embed(bundle.path, photos, tmp_path / "store", decode=decode)
    store = load_embeddings(tmp_path / "store")
    code = ASK + 'print(json.dumps(client.infer(sys.argv[2], files(*sys.argv[3:])).as_numpy("embeddings").tolist()))'
    found = np.array(ask(serve_python, code, server, model, *(photos / key for key in store.keys)), np.float32)
    assert found.shape == store.vectors.shape == (24, bundle.manifest.encoder.embedding_dim)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(store.vectors, axis=1)
    assert ((found * store.vectors).sum(axis=1) / norms).min() >= 0.99999
    errors = np.linalg.norm(found - store.vectors, axis=1) / np.linalg.norm(store.vectors, axis=1)
    assert errors.max() < 1e-4, "the other decode mode is 1e-3 away"


def test_a_broken_file_fails_its_own_request_only(serve_python, server, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    code = (
        ASK
        + """
requests = [client.async_infer("encoder", files(path)) for path in sys.argv[2:]]
answers = []
for request in requests:
    try:
        answers.append(list(request.get_result().as_numpy("embeddings").shape))
    except InferenceServerException as error:
        answers.append(f"{error.status()} {error.message()}")
print(json.dumps(answers))
"""
    )
    good = photos / "flower/12.jpg"
    answers = ask(serve_python, code, server, good, tmp_path / "broken.jpg", good)
    assert answers[0] == answers[2] == [1, 256]
    assert answers[1].startswith("400 ")
    assert "file 0 of 1 cannot be decoded: not an image that Pillow can read" in answers[1]


def test_the_smoke_test_passes_and_can_fail(serve_python, server, repositories, tmp_path):
    folder = Path(shutil.copytree(repositories["python"].path, tmp_path / "repository"))
    script = [serve_python, "-W", "ignore", folder / "smoke_test.py", server]
    passed = subprocess.run(script, capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert passed.stdout.splitlines()[-1].startswith("passed")
    expected = json.loads((folder / "smoke/expected.json").read_text())
    turned = {name: row[::-1] for name, row in expected["embeddings"].items()}
    for change in ({"embeddings": turned}, {"parameters": {**expected["parameters"], "space": "another"}}):
        (folder / "smoke/expected.json").write_text(json.dumps({**expected, **change}))
        failed = subprocess.run(script, capture_output=True, text=True, check=False)
        assert failed.returncode == 1, failed.stderr
        assert failed.stdout.splitlines()[-1].startswith("FAILED")
