import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from mio_export.benchmark import Absent, BenchResult, Contender, Speed, bench
from mio_export.bundle import load_bundle, save_manifest
from mio_export.embedding import measure
from mio_export.errors import UsageError
from mio_export.runtimes import Runtime, choose
from mio_export.runtimes.machine import Machine, processor_of
from mio_export.runtimes.timing import embedding_of, timed_rounds

ROW = Contender(runtime="torch", format="torch", precision="fp32", device="cpu", verdict="reference")
MACHINE = Machine(processor="A processor", features=("avx2",), num_threads=2, gpu=None)


def speed(runtime, precision, rate, *, verdict="proved", spread=1.0):
    contender = replace(ROW, runtime=runtime, precision=precision, verdict=verdict)
    return Speed(contender=contender, images_per_s=rate, low=rate - spread, high=rate + spread, rates=(rate,))


def result(*speeds, absent=()):
    eager = speed("torch", "fp32", 100.0, verdict="reference")
    return BenchResult(bundle="x", batch_size=1, num_rounds=5, speeds=(eager, *speeds), absent=absent, machine=MACHINE)


@pytest.fixture
def copy(bundle, tmp_path):
    return load_bundle(shutil.copytree(bundle.path, tmp_path / "copy.mio"))


def test_every_artifact_is_measured_beside_the_encoder(bundle):
    found = bench(bundle, batch_size=4, seconds=0.2, device="cpu", runtimes=("onnxruntime", "torchscript"))
    assert [s.contender.name for s in found.speeds] == ["torch fp32", "onnxruntime fp32", "torchscript fp32"]
    assert [s.contender.verdict for s in found.speeds] == ["reference", "proved", "proved"]
    assert found.absent == ()
    for measured in found.speeds:
        assert len(measured.rates) == found.num_rounds >= 5
        assert min(measured.rates) <= measured.low <= measured.images_per_s <= measured.high <= max(measured.rates)
        assert measured.images_per_s == np.median(measured.rates)
    assert json.loads(json.dumps(found.to_dict()))["speeds"][1]["contender"]["device"] == "cpu"
    assert found.machine.num_threads >= 1


class Slow(Runtime):
    def _run(self, images):
        time.sleep(0.02)
        return np.zeros((len(images), 1), np.float32)


def test_a_rate_counts_images_not_batches():
    slow = Slow(image_shape=(1, 1, 1), embedding_dim=1, device="cpu")
    rates = timed_rounds([embedding_of(slow, np.zeros((8, 1, 1, 1), np.uint8))], rounds=2, turn_s=0.1)
    assert rates.shape == (2, 1)
    assert ((rates > 100) & (rates <= 8 / 0.02)).all()


def test_each_work_has_its_own_column_whatever_the_order_of_a_round():
    done = []

    def work(number):
        return lambda: (done.append(number), time.sleep(0.002), 10**number)[2]

    rates = timed_rounds([work(number) for number in range(4)], rounds=5)
    assert (np.diff(np.log10(rates), axis=1) > 0).all()
    assert done[::2] == done[1::2]  # each turn begins with a call that is not timed
    rounds = [tuple(done[start : start + 8 : 2]) for start in range(0, 40, 8)]
    assert {tuple(sorted(order)) for order in rounds} == {(0, 1, 2, 3)}
    assert len(set(rounds)) > 1


def test_a_collection_is_measured_stage_by_stage(bundle, photos):
    found = measure(bundle, photos, batch_size=8, seconds=0.2, device="cpu")
    assert found.choice == choose(bundle, "onnxruntime")
    assert 8 <= found.num_images <= 24
    assert min(found.decoding, found.inference, found.end_to_end) > 0
    assert found.limited_by in ("decode", "infer")


def test_what_does_not_run_is_listed_with_its_reason(copy):
    (copy.path / "encoder.onnx").write_bytes(b"x")
    found = bench(copy, batch_size=2, seconds=0.05, device="cpu")
    assert [s.contender.runtime for s in found.speeds] == ["torch"]  # TorchScript is opened only when it is named
    assert "onnxruntime fp32 does not run here: " in found.findings()[-1]
    assert "is not the file that was proved (its sha256 differs)" in found.findings()[-1]


def test_an_unproven_artifact_is_not_run_and_listed_with_the_reason(copy):
    artifacts = tuple(replace(a, parity=replace(a.parity, verdict="unproven")) for a in copy.manifest.artifacts)
    save_manifest(copy.path, replace(copy.manifest, artifacts=artifacts))
    found = bench(copy.path, batch_size=2, seconds=0.05, device="cpu")
    assert [row[-1] for row in found.table()[1]] == ["reference"]
    assert "encoder.onnx (onnx fp32) is unproven; prove it there: mio verify" in found.findings()[-1]
    assert found.findings()[0] == "no proved artifact runs here"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 33}, "batch_size must be 1 to 32, the largest batch that the bundle was proved at; got 33"),
        ({"batch_size": 0}, "batch_size must be 1 to 32, .* got 0"),
        ({"seconds": 0.0}, "seconds must be above 0 and finite, got 0.0"),
        ({"seconds": float("inf")}, "seconds must be above 0 and finite, got inf"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda, got 'tpu'"),
        ({"runtimes": ["tflite"]}, "runtime must be onnxruntime, .*; got tflite"),
    ],
)
def test_what_cannot_be_measured_is_refused(bundle, values, message):
    with pytest.raises(UsageError, match=message):
        bench(bundle, **values)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (150.0, "1.50 times eager torch fp32 (a lead beyond the intervals)"),
        (101.0, "1.01 times eager torch fp32 (within the intervals, so no lead)"),
        (50.0, "0.50 times eager torch fp32 (slower, beyond the intervals)"),
    ],
)
def test_the_fastest_is_named_with_its_lead(rate, said):
    assert result(speed("onnxruntime", "fp32", rate)).findings() == [f"fastest proved: onnxruntime fp32, {said}"]


def test_a_rival_within_the_intervals_is_named_and_a_faster_unproven_one_is_not():
    rows = [speed("a", "fp32", 150.0), speed("b", "fp32", 149.0), speed("c", "fp32", 200.0, verdict="unproven")]
    assert result(*rows).findings()[0].endswith("(a lead beyond the intervals); b fp32 may be as fast")


@pytest.mark.parametrize(("rate", "how"), [(70.0, "slower"), (149.0, "no faster"), (200.0, None)])
def test_it_says_where_int8_does_not_pay(rate, how):
    found = result(speed("onnxruntime", "fp32", 150.0), speed("onnxruntime", "int8", rate))
    rates = f"(onnxruntime int8: {rate} against 150.0 images/s)"
    assert found.findings()[1:] == ([f"int8 is {how} than fp32 here {rates}"] if how else [])


def test_what_is_absent_comes_last():
    absent = Absent(contender=replace(ROW, runtime="openvino"), reason="it is not installed")
    assert result(absent=(absent,)).findings()[-1] == "openvino fp32 does not run here: it is not installed"


def test_a_processor_is_read_with_what_it_can_do():
    core = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx512f avx512_vnni\n\n"
    assert processor_of(core + core.replace("Some", "Other")) == ("Some CPU", ("avx2", "avx512f", "avx512_vnni"))
    assert processor_of("")[1] is None
    assert MACHINE.describe() == "A processor; avx2; 2 threads"


def test_the_command_prints_a_table_and_what_it_says(mio, bundle):
    printed = mio("bench", bundle.path, "--seconds", "0.05", "--batch-size", "2", "--device", "cpu")
    assert printed.code == 0, printed.err
    assert "images/s at batch 2: median of " in printed.out
    assert "onnxruntime fp32  " in printed.out
    assert "\nfastest proved: " in printed.out
    values = json.loads(mio("bench", bundle.path, "--seconds", "0.05", "--batch-size", "2", "--json").out)
    assert values["findings"][0].startswith("fastest proved: ")
    refused = mio("bench", bundle.path, "--batch-size", "64")
    assert refused.code == 2
    assert "batch_size must be 1 to 32" in refused.err


def test_with_images_each_stage_and_what_limits_is_measured(mio, bundle, photos, tmp_path):
    result = mio("bench", bundle.path, "--seconds", "0.5", "--images", photos, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["images"]
    assert found["num_images"] == 24
    assert found["limited_by"] == ("decode" if found["decoding"] < found["inference"] else "infer")
    assert 0 < found["end_to_end"] < 1.2 * min(found["decoding"], found["inference"])
    text = mio("bench", bundle.path, "--seconds", "0.5", "--images", photos).out
    assert "decode alone" in text
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    result = mio("bench", bundle.path, "--seconds", "0.5", "--images", tmp_path / "bad")
    assert result.code == 3
    assert result.err.endswith("bad can be read\n")
