"""Bundles whose parts do not belong together: each is hashed again, so that no hash and no digest is broken."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save

from mio_export.bundle import load_bundle, space_fingerprint
from mio_export.errors import GateError
from mio_export.evidence import ParityReport
from mio_export.evidence.check import GOLDEN_NAMES
from mio_export.parity import verify
from mio_export.runtimes import open_runtime


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy.mio")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(copy):
    return json.loads((copy / "manifest.json").read_text())


def save_manifest(copy, values):
    """Write a manifest with its files' real hashes and its own digest."""
    for row in values["artifacts"]:
        row["sha256"] = sha256(copy / row["file"])
        for proof in (row["parity"], *row["parity"].get("further", [])):
            proof["report_sha256"] = sha256(copy / proof["report"])
    values["files"] = {name: sha256(copy / name) for name in values["files"]}
    values["weights_sha256"] = sha256(copy / "encoder.safetensors")
    write_digested(copy, values)
    manifest = load_bundle(copy).manifest
    values["space"] = space_fingerprint(
        weights_sha256=manifest.weights_sha256, encoder=manifest.encoder, preprocess=manifest.preprocess
    )
    write_digested(copy, values)


def write_digested(copy, values):
    text = json.dumps({name: value for name, value in values.items() if name != "digest"}, sort_keys=True)
    values["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(values))


def in_manifest(change):
    def tamper(copy):
        values = read(copy)
        change(values)
        save_manifest(copy, values)

    return tamper


def in_manifest_that_does_not_load(change):
    def tamper(copy):
        values = read(copy)
        change(values)
        write_digested(copy, values)

    return tamper


def in_row(**values):
    return in_manifest(lambda manifest: manifest["artifacts"][0].update(values))


def in_proof(**values):
    return in_manifest(lambda manifest: manifest["artifacts"][0]["parity"].update(values))


def in_report(change):
    def tamper(copy):
        path = copy / "parity" / "onnx-fp32.json"
        report = json.loads(path.read_text())
        change(report)
        path.write_text(json.dumps(report))
        save_manifest(copy, read(copy))

    return tamper


def in_comparison(**values):
    return in_report(lambda report: report["comparisons"][0].update(values))


def report_text(text):
    def tamper(copy):
        (copy / "parity" / "onnx-fp32.json").write_text(text)
        save_manifest(copy, read(copy))

    return tamper


def other_artifact(copy):
    model = onnx.load(copy / "encoder.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = weight.raw_data[::-1]
    onnx.save(model, copy / "encoder.onnx")
    save_manifest(copy, read(copy))


def other_weights(copy):
    path = copy / "encoder.safetensors"
    tensors = load_file(path)
    path.write_bytes(save({name: np.asarray(tensor + 1) for name, tensor in tensors.items()}))
    save_manifest(copy, read(copy))


def swapped_reports(copy):
    values = read(copy)
    first, second = values["artifacts"]
    first["parity"], second["parity"] = second["parity"], first["parity"]
    save_manifest(copy, values)


def shared_report(copy):
    values = read(copy)
    values["artifacts"][1]["parity"] = values["artifacts"][0]["parity"]
    save_manifest(copy, values)


def no_golden(copy):
    (copy / "parity" / "golden.safetensors").unlink()
    values = read(copy)
    values["files"] = {}
    save_manifest(copy, values)


def golden_changed(copy):
    path = copy / "parity" / "golden.safetensors"
    tensors = load_file(path)
    tensors["pixels"] = np.where(tensors["pixels"] < 255, tensors["pixels"] + 1, 255).astype(np.uint8)
    names = b"\n".join([b"colour"] * len(tensors["pixels"])).decode()
    path.write_bytes(save(tensors, metadata={"names": names}))
    save_manifest(copy, read(copy))


def extra_file(copy):
    (copy / "evil.onnx").write_bytes(b"x")


def linked_outside(copy):
    outside = copy.with_name("outside.onnx")
    (copy / "encoder.onnx").rename(outside)
    (copy / "encoder.onnx").symlink_to(outside)


def golden_rewritten(change, **options):
    def tamper(copy):
        path = copy / "parity" / "golden.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.write_bytes(save(tensors, **options))
        save_manifest(copy, read(copy))

    return tamper


def artifact_rewritten(name, change):
    """Change an artifact and let its report name the new hash."""

    def tamper(copy):
        change(copy / name)
        values = read(copy)
        (row,) = (row for row in values["artifacts"] if row["file"] == name)
        report = json.loads((copy / row["parity"]["report"]).read_text())
        report["evidence"]["artifact_sha256"] = sha256(copy / name)
        (copy / row["parity"]["report"]).write_text(json.dumps(report))
        save_manifest(copy, values)

    return tamper


def says_of_itself(text):
    """Let the TorchScript archive say something else of itself."""

    def change(path):
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, text if name.endswith("/mio-export.json") else data)

    return artifact_rewritten("encoder.torchscript", change)


def a_link(name):
    def tamper(copy):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(copy.with_name("outside"))

    return tamper


NAMES = {"names": "\n".join(GOLDEN_NAMES)}
TAMPERED = {
    "golden images without names": (golden_rewritten(lambda t: None), "golden.safetensors is damaged"),
    "a golden number for images": (
        golden_rewritten(lambda t: t.update(pixels=np.zeros((), np.uint8)), metadata=NAMES),
        "golden.safetensors is damaged",
    ),
    "golden embeddings that are none": (
        golden_rewritten(lambda t: t.update(embeddings=t["embeddings"] * np.nan), metadata=NAMES),
        "golden.safetensors is damaged: .*embeddings finite float64",
    ),
    "golden images of another size": (
        golden_rewritten(lambda t: t.update(pixels=t["pixels"][:, :8]), metadata=NAMES),
        r"holds images of shape .*, the contract gives \(32, 32, 3\)",
    ),
    "a contract of images that no memory holds": (
        in_manifest(lambda m: m["preprocess"].update(image_size=10**6, resize_size=10**6)),
        r"holds images of shape .*, the contract gives \(1000000, 1000000, 3\)",
    ),
    "an artifact that says a list of itself": (says_of_itself(b"[]"), "is not the JSON that it should be"),
    "one that says nothing readable": (says_of_itself(b"\xff"), "encoder.torchscript is damaged: .*utf-8"),
    "one that says it in depth": (says_of_itself(b"[" * 100_000), "is not the JSON that it should be"),
    "one that says too much": (says_of_itself(b" " * 17 * 1024**2), "it says 17,825,792 bytes of itself"),
    "a graph that is none": (
        artifact_rewritten("encoder.onnx", lambda path: path.write_bytes(b"x")),
        "encoder.onnx is damaged: it is no ONNX model",
    ),
    "a requirement that nobody knows": (
        in_manifest_that_does_not_load(lambda m: m["requirements"].update(more=1.0)),
        "damaged: --require knows .*; got 'more'",
    ),
    "proved nowhere": (in_proof(devices=[]), "the manifest says that it ran on no device"),
    "a capability that is a path": (
        in_manifest_that_does_not_load(lambda m: m["artifacts"][0].update(capability="../x")),
        "damaged: capability is a number such as 8.9",
    ),
    "another training": (
        in_manifest(lambda m: m.update(training={"recipe": {}, "data": {"num_images": 1, "sha256": ""}, "last": {}})),
        "says of itself another training than the manifest",
    ),
    "a link in the place of a report to come": (a_link("parity/onnx-bf16.json"), "does not name it"),
    "a link in the place of the page": (a_link("report.html"), "report.html: the manifest does not name it"),
    "a link in the place of the lock": (a_link("parity/.lock"), "parity/.lock: the manifest does not name it"),
    "another encoder's artifact": (other_artifact, "parity/onnx-fp32.json is of another .*: sha256 of the artifact"),
    "another encoder's weights": (other_weights, "onnx-fp32.json is of another .*: sha256 of the weights"),
    "reports swapped": (swapped_reports, "torchscript-fp32.json is of another .*: artifact encoder.torchscript"),
    "one report for two": (shared_report, "parity/onnx-fp32.json: is the report of 2 proofs"),
    "the weights as a report": (in_proof(report="encoder.safetensors"), "encoder.safetensors: no parity report lies"),
    "an empty report": (report_text("{}"), "parity/onnx-fp32.json is no parity report"),
    "no JSON": (report_text("[" * 100_000), "parity/onnx-fp32.json is no parity report"),
    "NaN": (report_text('{"verdict": "proved", "own_rms_error": NaN}'), "onnx-fp32.json is no parity report"),
    "a refused report": (
        in_report(lambda r: r.update(verdict="refused", problems=["relative error 1"])),
        "says refused .relative error 1., the manifest says proved",
    ),
    "a verdict that was rewritten": (
        in_report(lambda r: r.update(problems=["relative error 1"])),
        "says 'proved' of itself, its contents say 'refused'",
    ),
    "an unknown key": (in_report(lambda r: r.update(more=1)), "onnx-fp32.json is damaged: more: Unexpected"),
    "a missing key": (in_report(lambda r: r.pop("shapes")), "onnx-fp32.json is damaged: shapes: "),
    "nothing compared": (in_report(lambda r: r.update(comparisons=[])), "its contents say 'refused'"),
    "a batch left out": (in_report(lambda r: r["comparisons"].pop()), "compared on cpu at 1, 2, 17; max_batch 32"),
    "no rows": (in_comparison(num_rows=0), "batch 1 on cpu: nothing was compared"),
    "a number beyond the budget": (in_comparison(min_cosine=0.9), "batch 1 on cpu: row .*: cosine 0.9000000 is below"),
    "an error that is left out": (in_comparison(max_relative_error=None), "relative error inf is above"),
    "an impossible number": (
        in_comparison(rms_relative_error=-1.0),
        "batch 1 on cpu: holds numbers that no comparison",
    ),
    "a wider budget": (
        in_report(lambda r: r["budget"].update(min_cosine=0.5)),
        "another budget than its precision has: min_cosine 0.5, not 0.999999",
    ),
    "a wider error budget": (
        in_report(lambda r: r["budget"].update(max_row_error=0.5)),
        "another budget than its precision has: max_row_error 0.5",
    ),
    "a golden image left out": (
        in_report(lambda r: r["golden"].pop("CMYK")),
        "is of the golden images .*, not of all 10",
    ),
    "a golden image beyond": (
        in_report(lambda r: r["golden"].update(CMYK=0.1)),
        "golden image CMYK: relative error 1.0e-01",
    ),
    "a shape accepted": (
        in_report(lambda r: r["shapes"].update({"height 40": "accepted"})),
        "images of height 40 are rej",
    ),
    "other golden images": (
        in_report(lambda r: r["evidence"].update(golden_sha256="0" * 64)),
        "onnx-fp32.json: is of other golden images",
    ),
    "no images": (in_report(lambda r: r["evidence"].update(images_sha256="")), "names no images"),
    "a device that it was not run on": (
        in_proof(devices=["cpu", "cuda"]),
        "the manifest says that it ran on cpu, cuda; its reports are of cpu",
    ),
    "an invented device": (in_report(lambda r: r.update(devices=["cpu", "abacus"])), "names the devices cpu, abacus"),
    "a larger batch": (
        in_manifest(lambda m: m.update(max_batch=4096)),
        "max_batch 4096 of the manifest needs 1, 2, 17, 4096",
    ),
    "a requirement dropped": (in_report(lambda r: r["requirements"].update(top1=1.0)), "requirements"),
    "a requirement added": (in_manifest(lambda m: m["requirements"].update({"recall@10": 1.0})), "requirements"),
    "another runtime option": (in_row(options={"graph_optimization_level": "basic"}), "options"),
    "another precision": (in_row(precision="fp16"), "precision fp32, the manifest says fp16"),
    "a file named beside it": (in_row(companions={"encoder.torchscript": ""}), "encoder.torchscript: sha256 is"),
    "a name that no file can have": (in_row(companions={"a\0b": ""}), "cannot be read .embedded null byte"),
    "a name that is too long": (in_row(companions={"a" * 5000: ""}), "a{200}: cannot be read .File name too long"),
    "another contract": (
        in_manifest(lambda m: m["preprocess"].update(resize_size=64)),
        "preprocessing: golden image colour differs by",
    ),
    "another mean": (
        in_manifest(lambda m: m["preprocess"].update(mean=[0.1, 0.2, 0.3])),
        "encoder.onnx: says of itself another preprocess, space than the manifest",
    ),
    "embeddings said to be normalised": (
        in_manifest(lambda m: m["encoder"].update(normalize=True)),
        "encoder.torchscript: says of itself another encoder, space than the manifest",
    ),
    "golden images dropped": (no_golden, "does not name parity/golden.safetensors"),
    "golden images changed": (golden_changed, "parity/golden.safetensors: "),
    "no artifacts": (in_manifest(lambda m: m.update(artifacts=[])), "manifest.json: lists no artifact"),
    "an artifact twice": (in_manifest(lambda m: m["artifacts"].append(m["artifacts"][0])), "lists encoder.onnx twice"),
    "a file that is not named": (extra_file, "evil.onnx: the manifest does not name it"),
    "a link to outside": (linked_outside, "encoder.onnx: lies outside the bundle"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_bundle_whose_parts_do_not_belong_together_is_refused_without_running_it(copy, mio, name):
    tamper, reason = TAMPERED[name]
    tamper(copy)
    found = mio("verify", copy)
    assert found.code == 3, found
    assert re.search(reason, found.err), found.err
    assert "Traceback" not in found.err


def test_every_refusal_is_json_for_machines(copy, mio):
    extra_file(copy)
    (copy / "evil.onnx").rename(copy / "more.onnx")
    late = mio("verify", copy, "--json")
    (copy / "manifest.json").write_text("{}")
    early = mio("verify", copy, "--json")
    for found, reason in ((late, "more.onnx: the manifest does not name it"), (early, "manifest.json is damaged")):
        assert found.code == 3
        values = json.loads(found.out)
        assert values["passed"] is False
        assert reason in values["problems"][0]


def test_an_untouched_bundle_passes_without_torch_or_onnx(bundle):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = sys.modules['onnx'] = None\n"
        f"from mio_export import verify; found = verify({str(bundle.path)!r}); assert found.passed, found\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env=os.environ)


def test_a_bundle_of_schema_1_with_reports_of_its_time_is_read(copy):
    values = read(copy)
    values["schema_version"] = 1
    for row in values["artifacts"]:
        del row["parity"]["further"]
        path = copy / row["parity"]["report"]
        report = json.loads(path.read_text())
        del report["schema_version"], report["own_row_error"]
        path.write_text(json.dumps(report))
    save_manifest(copy, values)
    found = verify(copy)
    assert found.passed, found


def test_a_report_of_a_newer_program_is_named_with_both_versions(copy, mio):
    in_report(lambda report: report.update(schema_version=99))(copy)
    assert "has schema version 99, this mio-export reads up to 1" in mio("verify", copy).err


def test_a_report_is_read_as_it_was_written(bundle):
    for artifact in bundle.manifest.artifacts:
        path = bundle.path / artifact.parity.report
        assert json.loads(json.dumps(ParityReport.load(path).to_dict())) == json.loads(path.read_text())


def test_an_artifact_whose_evidence_does_not_fit_is_not_opened(copy):
    in_report(lambda report: report.update(verdict="refused", problems=["relative error 1"]))(copy)
    with pytest.raises(GateError, match=r"says refused .*, the manifest says proved"):
        open_runtime(copy, "onnxruntime")
    with open_runtime(copy, "torchscript") as runtime:  # its own evidence fits
        assert runtime.embedding_dim == 256
