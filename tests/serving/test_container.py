import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import PIL
import pytest
import typer
import yaml

from mio_export.bundle import broken_files, load_bundle, save_manifest
from mio_export.errors import GateError, UsageError
from mio_export.files import same_files, sha256_file
from mio_export.serving import footprint
from mio_export.serving.container import write_container

SERVE = """
import importlib, sys

class NotInstalled:
    names = set({absent})

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from mio_export.bundle import load_bundle
from mio_export.runtimes import choose
from mio_export.runtimes.opening import open_choice
from mio_export.serving.options import ServeOptions
for module in ("cli.main", "cli.serve", "serving.http", "serving.engine", "serving.server", "serving.protocol"):
    importlib.import_module("mio_export." + module)
import httptools, uvicorn, uvloop, grpc.aio
bundle = load_bundle({path!r})
pixels = bundle.manifest.preprocess.decode(open({photo!r}, "rb").read())
with open_choice(bundle, choose(bundle, "onnxruntime", device="cpu")) as runtime:
    print(runtime.embed(pixels[None]).shape[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundle):
    """What is written unless told otherwise; read only."""
    out = tmp_path_factory.mktemp("container") / "container"
    write_container(bundle, out, runtime="onnxruntime")
    return out


@pytest.fixture
def of_gpu(tmp_path, bundle):
    """A copy of the bundle whose artifacts say that they were proved on a GPU."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "encoder.mio"))
    rows = []
    for row in bundle.manifest.artifacts:
        report = json.loads((path / row.parity.report).read_text())
        report["devices"] = ["cuda"]
        for comparison in report["comparisons"]:
            comparison["device"] = "cuda"
        (path / row.parity.report).write_text(json.dumps(report))
        proof = replace(row.parity, devices=("cuda",), report_sha256=sha256_file(path / row.parity.report))
        rows.append(replace(row, parity=proof))
    save_manifest(path, replace(bundle.manifest, artifacts=tuple(rows)))
    return path


def dockerfile(folder, keyword):
    return re.search(rf"^{keyword} (.*)$", (folder / "Dockerfile").read_text(), re.MULTILINE).group(1)


def service(folder):
    return yaml.safe_load((folder / "compose.yaml").read_text())["services"]["mio"]


def requirements(folder):
    return dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())


def test_the_bundle_inside_is_whole_and_nothing_else(folder, bundle):
    inside = load_bundle(folder / "encoder.mio")
    assert broken_files(inside) == []
    assert inside.manifest == bundle.manifest
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


def test_the_container_runs_mio_serve_as_it_takes_its_options(folder):
    from mio_export.cli.main import app

    command = json.loads(dockerfile(folder, "ENTRYPOINT"))
    assert command[:3] == ["mio", "serve", "/srv/encoder.mio"]
    serve = typer.main.get_command(app).commands["serve"]
    given = serve.make_context("serve", command[2:]).params
    wanted = {"host": "0.0.0.0", "runtime": "onnxruntime", "precision": "fp32", "device": "cpu", "decode": "full"}
    assert {name: given[name] for name in wanted} == wanted


def test_the_container_is_shut_off(folder):
    found = service(folder)
    assert found["ports"] == [f"${{MIO_ADDRESS:-127.0.0.1}}:{port}:{port}" for port in (8000, 8001)]
    assert (found["read_only"], found["cap_drop"], found["tmpfs"]) == (True, ["ALL"], ["/tmp"])
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["environment"] == {"MIO_API_KEY": None}, "passed on, and never written down"
    assert int(found["stop_grace_period"].removesuffix("s")) > 30
    assert "deploy" not in found
    assert dockerfile(folder, "USER") == "10001:10001"


def test_what_decodes_and_embeds_is_pinned(folder):
    import onnxruntime

    found = requirements(folder)
    assert (found["pillow"], found["onnxruntime"]) == (PIL.__version__, onnxruntime.__version__)
    assert not {"torch", "onnxruntime-gpu"} & found.keys()


def test_a_server_needs_nothing_that_is_not_installed(folder, bundle, photos):
    distributions, names = set(), [*requirements(folder), "onnxruntime-gpu"]
    while names:
        name = re.match(r"[A-Za-z0-9._-]+", names.pop()).group().lower().replace("_", "-")
        if name not in distributions:
            distributions.add(name)
            try:
                names += [text for text in requires(name) or () if "extra ==" not in text]
            except ImportError:
                continue
    installed = packages_distributions().items()
    absent = {m for m, found in installed if not {n.lower().replace("_", "-") for n in found} & distributions}
    absent -= {"mio_export"}
    assert "torch" in absent
    photo = str(next(photos.rglob("*.jpg")))
    code = SERVE.format(absent=sorted(absent), path=str(bundle.path), photo=photo)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{bundle.manifest.encoder.embedding_dim}\n", done.stderr


def test_the_same_call_writes_the_same_bytes_and_another_needs_overwrite(mio, bundle, folder, tmp_path):
    out = tmp_path / "container"
    call = ("deploy", "container", bundle.path, "-o", out, "--runtime", "onnxruntime")
    assert mio(*call).code == 0
    assert same_files(out, folder)
    (out / "mio_export-0-py3-none-any.whl").write_bytes(b"a wheel")
    assert mio(*call).code == 0, "the same folder again is no conflict"
    refused = mio(*call, "--decode", "scaled")
    assert refused.code == 2
    assert "exists and is another container" in refused.err
    result = mio(*call, "--decode", "scaled", "--overwrite", "--json")
    assert json.loads(result.out)["decode"] == json.loads((out / "container.json").read_text())["decode"] == "scaled"
    assert json.loads(dockerfile(out, "ENTRYPOINT"))[-1] == "scaled"
    assert (out / "mio_export-0-py3-none-any.whl").read_bytes() == b"a wheel"


def test_other_folders_are_never_replaced(mio, bundle, tmp_path):
    (tmp_path / "letter").write_text("mine")
    result = mio("deploy", "container", bundle.path, "-o", tmp_path, "--overwrite")
    assert result.code == 2
    assert "is no folder of mio deploy container" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


def test_a_changed_bundle_is_refused(mio, bundle, tmp_path):
    path = Path(shutil.copytree(bundle.path, tmp_path / "encoder.mio"))
    data = bytearray((path / "encoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "encoder.onnx").write_bytes(data)
    result = mio("deploy", "container", path, "-o", tmp_path / "new" / "container")
    assert result.code == 3
    assert "is not what was proved; nothing is deployed\n     encoder.onnx: sha256" in result.err
    assert not (tmp_path / "new" / "container").exists()


def test_only_what_was_proved_is_deployed(bundle, of_gpu, tmp_path):
    out = tmp_path / "container"
    with pytest.raises(GateError, match="was proved on cpu, not on cuda"):
        write_container(bundle, out, device="cuda")
    with pytest.raises(GateError, match="was proved on cuda, not on cpu"):
        write_container(of_gpu, out, device="cpu")
    with pytest.raises(UsageError, match="holds no proved int8 artifact"):
        write_container(bundle, out, precision="int8")
    unproven = [replace(row, parity=replace(row.parity, verdict="unproven")) for row in bundle.manifest.artifacts]
    save_manifest(of_gpu, replace(bundle.manifest, artifacts=tuple(unproven)))
    with pytest.raises(UsageError, match="holds no proved onnxruntime artifact"):
        write_container(of_gpu, out, runtime="onnxruntime")
    assert not out.exists()


def test_what_mio_serve_refuses_is_not_written(bundle, tmp_path):
    with pytest.raises(UsageError, match="no proved artifact to serve; export one"):
        write_container(bundle, tmp_path / "c", runtime="torch")
    assert not (tmp_path / "c").exists()


def test_for_a_gpu_that_is_not_here(of_gpu, tmp_path):
    written = write_container(of_gpu, tmp_path / "out", kserve_image="registry.example/encoder:1")
    found = requirements(tmp_path / "out")
    assert "onnxruntime-gpu[cuda,cudnn]" in found
    assert "onnxruntime" not in found
    (gpu,) = service(tmp_path / "out")["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "NVIDIA_VISIBLE_DEVICES=all" in (tmp_path / "out" / "Dockerfile").read_text()
    assert predictor(tmp_path / "out")["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    if written["measured"] is None:
        assert "guesses" in (tmp_path / "out" / "README.md").read_text()


def predictor(folder):
    return yaml.safe_load((folder / "inference_service.yaml").read_text())["spec"]["predictor"]


def test_kserve_is_told_what_was_measured(mio, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "_SECONDS", 0.2)
    call = ("deploy", "container", bundle.path, "-o", tmp_path / "out", "--kserve")
    assert "--kserve needs --image" in mio(*call).err
    assert "must be the name of an image" in mio(*call, "--image", "x\n- y").err
    first = json.loads(mio(*call, "--image", "registry.example/encoder:1", "--json").out)
    assert json.loads(mio(*call, "--image", "registry.example/encoder:1", "--json").out) == first, "it is kept"
    measured = first["measured"]
    assert measured["images_per_s"] > 0
    pod = predictor(tmp_path / "out")
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/encoder:1"
    given = container["resources"]
    assert given["requests"]["cpu"] == given["limits"]["cpu"] == str(measured["num_threads"])
    request, limit = (int(given[kind]["memory"].removesuffix("Mi")) for kind in ("requests", "limits"))
    assert 20 < measured["peak_mib"] < request < limit
    assert measured["peak_mib"] < 300, "not what this process holds, torch and all"
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/v2/health/ready", "readiness": "/v2/health/ready", "liveness": "/v2/health/live"}
    assert pod["terminationGracePeriodSeconds"] > 30
    assert pod["securityContext"]["runAsNonRoot"]
    assert "secretKeyRef" in container["env"][0]["valueFrom"]
