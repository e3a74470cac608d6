"""Proofs of one bundle at once, on several devices, and killed at any moment."""

import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import mio_export.runtimes.selection as selection
from mio_export.bundle import load_bundle, save_manifest
from mio_export.bundle.lock import bundle_lock
from mio_export.errors import GateError, MissingBackendError
from mio_export.evidence import ParityReport
from mio_export.parity import EVERYTHING, verify
from mio_export.parity.verification import _written_down
from mio_export.runtimes import choose, open_runtime
from mio_export.runtimes.opening import open_choice
from mio_export.runtimes.selection import choice_of


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy.mio")


@pytest.fixture
def unproven(copy):
    """A copy whose artifacts claim to have been built where they cannot run."""
    manifest = load_bundle(copy).manifest
    rows = tuple(replace(a, parity=replace(a.parity, verdict="unproven", devices=())) for a in manifest.artifacts)
    save_manifest(copy, replace(manifest, artifacts=rows))
    return copy


def verdicts(path):
    return {row.format: row.parity.verdict for row in load_bundle(path).manifest.artifacts}


def test_two_proofs_at_once_end_with_both_verdicts(unproven, photos):
    together = threading.Barrier(2)
    found = {}

    def run(runtime):
        together.wait()
        found[runtime] = verify(unproven, images=photos, limit=4, runtimes=[runtime])

    threads = [threading.Thread(target=run, args=(runtime,)) for runtime in ("onnxruntime", "torchscript")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["onnxruntime"].passed
    assert found["torchscript"].passed
    assert verdicts(unproven) == {"onnx": "proved", "torchscript": "proved"}
    assert verify(unproven).passed


def test_a_verdict_is_added_to_what_the_manifest_says_by_then(unproven, photos):
    before = load_bundle(unproven)
    proved = verify(unproven, images=photos, limit=4, runtimes=["torchscript"])
    row = before.artifacts(format="onnx", precision="fp32")[0]
    after, unwritten = _written_down(before, [(row, ParityReport.load(unproven / row.parity.report))])
    assert unwritten is None
    assert proved.passed
    assert {artifact.parity.verdict for artifact in after.manifest.artifacts} == {"proved"}
    assert verify(unproven).passed


def on(device, report):
    return replace(report, devices=(device,), comparisons=tuple(replace(c, device=device) for c in report.comparisons))


def test_a_proof_on_another_device_lies_beside_that_on_the_first(copy, mio):
    before = load_bundle(copy)
    row = before.artifacts(format="onnx", precision="fp32")[0]
    cpu = (copy / row.parity.report).read_bytes()
    report = on("cuda", ParityReport.load(copy / row.parity.report))
    after, _ = _written_down(before, [(row, report)])
    proof = load_bundle(copy).artifacts(format="onnx", precision="fp32")[0].parity
    assert after.artifacts(format="onnx", precision="fp32")[0].parity == proof
    assert proof.devices == ("cpu", "cuda")
    assert [ParityReport.load(copy / one.report).devices for one in proof.evidence] == [("cpu",), ("cuda",)]
    assert (copy / proof.report).read_bytes() == cpu
    assert mio("verify", copy).code == 0
    (copy / proof.further[0].report).write_text("{}")
    assert f"{proof.further[0].report}: sha256 is" in mio("verify", copy).err


def test_a_proof_of_an_artifact_that_was_replaced_meanwhile_is_not_written(copy, encoder, photos):
    before = load_bundle(copy)
    row = before.artifacts(format="onnx", precision="fp32")[0]
    report = on("cuda", ParityReport.load(copy / row.parity.report))
    manifest = replace(
        before.manifest, artifacts=tuple(replace(a, notes=("other",)) for a in before.manifest.artifacts)
    )
    save_manifest(copy, manifest)
    after, _ = _written_down(before, [(row, report)])
    assert after.artifacts(format="onnx", precision="fp32")[0].parity.devices == ("cpu",)
    assert verify(copy).passed


def test_who_waits_for_the_lock_of_a_bundle_that_is_exchanged_takes_the_new_ones(copy, tmp_path):
    took = threading.Event()

    def wait():
        with bundle_lock(copy):
            took.set()

    with bundle_lock(copy):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        copy.rename(tmp_path / "old.mio")
        shutil.copytree(tmp_path / "old.mio", copy)
        assert not took.is_set()
    thread.join(10)
    assert took.is_set()


@pytest.fixture
def with_a_gpu(monkeypatch):
    """A machine whose libraries all find a GPU; nothing is opened on it."""
    monkeypatch.setattr(selection, "resolve_device", lambda device, library: "cuda" if device == "auto" else device)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_what_was_proved_on_a_cpu_only_does_not_run_elsewhere(bundle, with_a_gpu, mio, photos, tmp_path, device):
    reason = (
        f"was proved on cpu, not on {device}; prove it there: mio verify {bundle.path} --images DIR --device {device}"
    )
    for precision in ("auto", "fp32"):
        with pytest.raises(GateError, match=reason):
            choose(bundle, "onnxruntime", precision=precision, device=device)
    with pytest.raises(GateError, match=reason):
        open_runtime(bundle, device=device)
    refused = mio("embed", bundle.path, photos, "-o", tmp_path / "out", "--device", device, "--runtime", "onnxruntime")
    assert refused.code == 3
    assert reason in refused.err
    assert choose(bundle, "onnxruntime").device == "cpu"
    named = choose(bundle, "onnxruntime")
    with pytest.raises(GateError, match=f"was proved on cpu, not on {device}"):
        open_choice(bundle, replace(named, device=device))


def test_an_artifact_that_nobody_proved_does_not_run(unproven):
    with pytest.raises(GateError, match=r"is unproven; prove it there: mio verify NAME\.mio --images DIR --device cpu"):
        choice_of(load_bundle(unproven).artifacts(format="onnx", precision="fp32")[0])


def test_the_encoder_itself_runs_where_it_is_asked_to(bundle, with_a_gpu):
    assert choose(bundle, "torch", device="cuda").device == "cuda"


def test_a_device_that_is_not_there_is_a_missing_backend(bundle):
    from mio_export.runtimes.devices import has_cuda

    if has_cuda():
        pytest.skip("a CUDA device is visible")
    with pytest.raises(MissingBackendError, match="no CUDA device is visible here"):
        choose(bundle, "torch", device="cuda")
    row = bundle.artifacts(format="onnx", precision="fp32")[0]
    on_a_gpu = replace(row, parity=replace(row.parity, devices=("cpu", "cuda")))
    with pytest.raises(MissingBackendError, match="no CUDA device is visible here"):
        choice_of(on_a_gpu, device="cuda")
    with pytest.raises(MissingBackendError, match="no CUDA device is visible here"):
        choice_of(replace(row, format="openvino"), device="cuda")  # runs on no GPU, so that no proof there could help


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_what_was_proved_on_a_cpu_only_is_refused_where_there_is_no_gpu_too(bundle, photos, tmp_path, mio, device):
    refused = mio("embed", bundle.path, photos, "-o", tmp_path / "out", "--device", device)
    assert refused.code == 3
    assert f"not on {device}; prove it there: mio verify {bundle.path} --images DIR --device {device}" in refused.err


@pytest.mark.slow
def test_a_killed_proof_leaves_a_bundle_that_verifies(bundle, photos, tmp_path):
    draw = random.Random(0)
    path = tmp_path / "copy.mio"
    command = [Path(sys.executable).parent / "mio", "verify", path, "--images", photos, "--all", "--limit", "4"]
    duration = None
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(bundle.path, path)
        manifest = load_bundle(path).manifest
        rows = tuple(replace(a, parity=replace(a.parity, verdict="unproven", devices=())) for a in manifest.artifacts)
        save_manifest(path, replace(manifest, artifacts=rows))
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if duration is None:
            assert process.wait() == 0
            duration = time.monotonic() - began
            continue
        time.sleep(draw.uniform(0.5, 1.05) * duration)
        process.kill()
        process.wait()
        assert verify(path).passed
    assert verify(path, images=photos, limit=4, runtimes=EVERYTHING).passed
    assert set(verdicts(path).values()) == {"proved"}


@pytest.mark.slow
def test_two_processes_that_prove_one_bundle_end_with_both_verdicts(unproven, photos):
    mio = [Path(sys.executable).parent / "mio", "verify", unproven, "--images", photos, "--limit", "4", "--runtime"]
    for _ in range(5):
        processes = [
            subprocess.Popen([*mio, name], stdout=subprocess.DEVNULL) for name in ("onnxruntime", "torchscript")
        ]
        assert [process.wait() for process in processes] == [0, 0]
        assert set(verdicts(unproven).values()) == {"proved"}
        assert verify(unproven).passed
        manifest = load_bundle(unproven).manifest
        rows = tuple(replace(a, parity=replace(a.parity, verdict="unproven", devices=())) for a in manifest.artifacts)
        save_manifest(unproven, replace(manifest, artifacts=rows))
