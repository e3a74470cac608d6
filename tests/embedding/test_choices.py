"""What ``mio embed`` settles by itself: whose vector a duplicate gets, how JPEGs are decoded, what is fastest."""

import os
import shutil
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.embedding import embed
from mio_export.errors import GateError, MissingBackendError, UsageError
from mio_export.exporting import export
from mio_export.models import build_encoder
from mio_export.preprocess import Preprocess
from mio_export.runtimes import opening
from mio_export.runtimes.onnxruntime import OnnxRuntime
from mio_export.runtimes.openvino import OpenVINORuntime
from mio_export.store import load_embeddings, read_rows, shard_paths


class Said(Progress):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture
def copies(tmp_path, photos):
    """40 different images, then 60 copies of them under other names, spread over all."""
    folder = tmp_path / "copies"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index:03d}-a.png")
    for index in range(60):
        shutil.copy(folder / f"{index % 40:03d}-a.png", folder / f"{index % 40:03d}-b{index // 40}.png")
    return folder


@pytest.mark.parametrize("shard_size", [7, 1000])
def test_equal_files_are_computed_once(bundle, copies, tmp_path, forwards, shard_size):
    options = {"runtime": "onnxruntime", "decode": "full", "shard_size": shard_size, "batch_size": 8}
    result = embed(bundle.path, copies, tmp_path / "out", **options)
    assert sum(forwards) == 40
    assert (result.num_ok, result.num_duplicates, result.num_failed) == (100, 60, 0)
    rows = {row.key: row for row in read_rows(tmp_path / "out")}
    assert rows["000-a.png"].status == "ok"
    assert (rows["000-b0.png"].status, rows["000-b0.png"].reason) == ("duplicate", "same bytes as 000-a.png")
    store = load_embeddings(tmp_path / "out")
    vectors = dict(zip(store.keys, store.vectors, strict=True))
    assert len(vectors) == 100
    for index in range(40):
        assert np.array_equal(vectors[f"{index:03d}-b0.png"], vectors[f"{index:03d}-a.png"])
    assert len({vector.tobytes() for vector in store.vectors}) == 40


def test_a_later_run_computes_no_content_again(bundle, copies, tmp_path, forwards):
    options = {"runtime": "onnxruntime", "decode": "full"}
    embed(bundle.path, copies, tmp_path / "out", **options)
    forwards.clear()
    shutil.copy(copies / "005-a.png", copies / "999.png")
    os.utime(copies / "007-a.png", (1, 1))  # its time changed, its bytes did not
    result = embed(bundle.path, copies, tmp_path / "out", **options)
    assert sum(forwards) == 0
    assert result.num_embedded == 2
    rows = {row.key: row for row in read_rows(tmp_path / "out")}
    assert rows["999.png"].reason == "same bytes as 005-a.png"
    assert rows["007-a.png"].status == "ok"


def test_the_bytes_do_not_depend_on_interruptions(bundle, copies, tmp_path):
    options = {"runtime": "onnxruntime", "decode": "full", "shard_size": 9}
    embed(bundle.path, copies, tmp_path / "whole", **options)
    embed(bundle.path, copies, tmp_path / "parts", **options)
    for path in shard_paths(tmp_path / "parts")[3:]:
        path.unlink()
    embed(bundle.path, copies, tmp_path / "parts", **options)
    whole, parts = shard_paths(tmp_path / "whole"), shard_paths(tmp_path / "parts")
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in parts]


def test_a_copy_of_a_broken_file_is_broken_too(bundle, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"no image")
    Image.new("RGB", (40, 40)).save(folder / "c.png")
    embed(bundle.path, folder, tmp_path / "out")
    rows = [(row.key, row.status, row.stage) for row in read_rows(tmp_path / "out")]
    assert rows == [("a.png", "failed", "decode"), ("b.png", "failed", "decode"), ("c.png", "ok", None)]


@pytest.mark.parametrize(
    ("limit", "refused"), [("1", True), ("2", False), ("10%", True), ("50%", False), ("100%", False)]
)
def test_too_many_failures_are_refused_and_nothing_is_lost(bundle, copies, tmp_path, mio, limit, refused):
    small = tmp_path / "small"
    small.mkdir()
    for name in ("000-a.png", "001-a.png", "002-a.png"):
        shutil.copy(copies / name, small / name)
    for name in ("x.png", "y.png"):
        (small / name).write_bytes(b"no image " + name.encode())
    result = mio("embed", bundle.path, small, "-o", tmp_path / "out", "--max-failures", limit)
    assert result.code == (3 if refused else 0)
    if refused:
        assert f"2 of 5 files failed, more than {limit}" in result.err
    assert len(load_embeddings(tmp_path / "out").keys) == 3


@pytest.mark.parametrize("limit", ["x", "-1", "101%", "1.5", "nan%", "inf%", "1e400%", "-1%", "nan", "inf", "%", ""])
def test_a_limit_that_is_none_is_a_usage_error(bundle, photos, tmp_path, limit):
    with pytest.raises(UsageError, match="max_failures must be a number of files or a share such as 5%"):
        embed(bundle.path, photos, tmp_path / "out", max_failures=limit)


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory):
    """Twelve JPEGs of 1280x840: the two photographs, magnified and shifted."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("data") / "large"
    folder.mkdir()
    for index in range(12):
        photo = Image.fromarray(load_sample_images().images[index % 2]).resize((1400, 934), Image.Resampling.BICUBIC)
        photo.crop((10 * index, 5 * index, 10 * index + 1280, 5 * index + 840)).save(folder / f"{index:02d}.jpg")
    return folder


def test_large_jpegs_are_decoded_scaled_and_the_store_says_so(bundle, large_photos, tmp_path):
    said = Said()
    result = embed(bundle.path, large_photos, tmp_path / "auto", progress=said)
    assert result.info.decode == "scaled"
    assert any(line.startswith("large JPEGs are decoded at a fraction of their size: cosine ") for line in said.lines)
    embed(bundle.path, large_photos, tmp_path / "full", decode="full")
    scaled, full = (load_embeddings(tmp_path / name).vectors for name in ("auto", "full"))
    cosines = (scaled * full).sum(1) / np.linalg.norm(scaled, axis=1) / np.linalg.norm(full, axis=1)
    assert not np.array_equal(scaled, full)
    assert cosines.min() >= 0.995
    assert pq.read_schema(shard_paths(tmp_path / "auto")[0]).metadata[b"mio.decode"] == b"scaled"
    again = embed(bundle.path, large_photos, tmp_path / "auto")  # what was settled is kept
    assert (again.info.decode, again.num_embedded) == ("scaled", 0)


class Touchy(torch.nn.Module):
    """A grey level more or less makes another embedding of it."""

    def forward(self, pixels):
        return torch.sin(400 * torch.nn.functional.avg_pool2d(pixels, 8)).flatten(1)[:, :64]


def test_an_encoder_that_scaled_decoding_would_mislead_gets_full_decoding(large_photos, photos, tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("small", Preprocess(image_size=64, resize_size=64), stem="small").eval()
    from dataclasses import replace

    encoder.backbone = Touchy()
    encoder.spec = replace(encoder.spec, embedding_dim=64)
    path = tmp_path / "touchy.mio"
    export(encoder, path, images=photos, max_batch=8)
    said = Said()
    result = embed(path, large_photos, tmp_path / "out", progress=said)
    assert result.info.decode == "full"
    assert any("scaled decoding moves embeddings too far" in line for line in said.lines)


def test_small_images_leave_nothing_to_scale(bundle, photos, tmp_path):
    assert embed(bundle.path, photos, tmp_path / "out").info.decode in ("full", "scaled")
    assert embed(bundle.path, photos, tmp_path / "full", decode="full").info.decode == "full"
    with pytest.raises(UsageError, match="decode must be auto, full or scaled, got 'half'"):
        embed(bundle.path, photos, tmp_path / "x", decode="half")


@pytest.fixture(scope="module")
def two_runtimes(tmp_path_factory, encoder, photos):
    """A bundle that ONNX Runtime and OpenVINO run, and TorchScript."""
    path = tmp_path_factory.mktemp("bundle") / "encoder.mio"
    return export(encoder, path, formats=("onnx", "openvino", "torchscript"), images=photos, max_batch=32).bundle


def slowed(monkeypatch, runtime):
    original = runtime._run

    def run(self, images):
        time.sleep(0.05)
        return original(self, images)

    monkeypatch.setattr(runtime, "_run", run)


def test_auto_takes_the_fastest_proved_artifact_once(two_runtimes, photos, tmp_path, monkeypatch):
    said, bundle = Said(), two_runtimes.path
    slowed(monkeypatch, OpenVINORuntime)
    assert embed(bundle, photos, tmp_path / "a", progress=said).info.runtime == "onnxruntime"
    assert any(line.startswith("the fastest proved artifact here: onnxruntime") for line in said.lines)
    monkeypatch.undo()
    slowed(monkeypatch, OnnxRuntime)
    assert embed(bundle, photos, tmp_path / "b").info.runtime == "openvino"
    assert embed(bundle, photos, tmp_path / "a").info.runtime == "onnxruntime"  # what was settled is kept


def test_each_artifact_is_opened_and_hashed_once(two_runtimes, large_photos, tmp_path, monkeypatch):
    hashed, opened, closed = [], [], []

    def counted(module, name, calls, label):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **options: (calls.append(label(args)), original(*args, **options))[1]
        )

    counted(opening, "sha256_file", hashed, lambda args: args[0].name)
    counted(opening, "open_file", opened, lambda args: args[0])
    for runtime in (OnnxRuntime, OpenVINORuntime):
        counted(runtime, "close", closed, lambda args: type(args[0]).__name__)
    said = Said()
    embed(two_runtimes.path, large_photos, tmp_path / "out", progress=said)  # measures, compares decoding, embeds
    assert [line.partition(":")[0] for line in said.lines[:2]] == [
        "the fastest proved artifact here",
        "large JPEGs are decoded at a fraction of their size",
    ]
    assert sorted(opened) == ["onnxruntime", "openvino"]
    assert hashed == ["encoder.onnx"]  # both read the same file
    assert sorted(closed) == ["OnnxRuntime", "OpenVINORuntime"]
    for calls in (hashed, opened, closed):
        calls.clear()
    assert embed(two_runtimes.path, large_photos, tmp_path / "out").num_embedded == 0
    assert (hashed, opened, closed) == ([], [], [])


def test_what_is_open_is_closed_when_the_run_is_refused(two_runtimes, photos, tmp_path, monkeypatch):
    open_now = []
    for runtime in (OnnxRuntime, OpenVINORuntime):
        monkeypatch.setattr(
            runtime,
            "__init__",
            lambda self, *args, f=runtime.__init__, **kw: (f(self, *args, **kw), open_now.append(self))[0],
        )
        monkeypatch.setattr(runtime, "close", lambda self, f=runtime.close: (open_now.remove(self), f(self))[1])
    with pytest.raises(UsageError, match="batch size must be 1 to 32"):
        embed(two_runtimes.path, photos, tmp_path / "out", batch_size=33)
    assert open_now == []


def test_auto_never_opens_what_may_hold_code(two_runtimes, photos, tmp_path, monkeypatch):
    opened, original = [], opening.open_file
    monkeypatch.setattr(
        opening,
        "open_file",
        lambda runtime, *args, **options: (opened.append(runtime), original(runtime, *args, **options))[1],
    )
    slowed(monkeypatch, OnnxRuntime)
    slowed(monkeypatch, OpenVINORuntime)
    embed(two_runtimes.path, photos, tmp_path / "a")
    embed(two_runtimes.path, photos, tmp_path / "b", shard="1/1")
    assert set(opened) == {"onnxruntime", "openvino"}
    few = tmp_path / "few"
    shutil.copytree(photos / "temple", few / "temple")
    assert embed(two_runtimes.path, few, tmp_path / "named", runtime="torchscript").info.runtime == "torchscript"
    assert embed(two_runtimes.path, few, tmp_path / "named").num_embedded == 0  # nothing is opened
    shutil.copytree(photos / "flower", few / "flower")
    with pytest.raises(
        UsageError, match=r"created with torchscript, .* if you trust the bundle, add --runtime torchscr"
    ):
        embed(two_runtimes.path, few, tmp_path / "named")
    assert embed(two_runtimes.path, few, tmp_path / "named", runtime="torchscript").num_embedded == 12


def test_a_part_takes_the_first_runtime_that_is_installed_and_proved(two_runtimes, photos, tmp_path, monkeypatch):
    slowed(monkeypatch, OnnxRuntime)  # nothing is measured
    assert embed(two_runtimes.path, photos, tmp_path / "a", shard="1/1").info.runtime == "onnxruntime"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert embed(two_runtimes.path, photos, tmp_path / "b", shard="1/1").info.runtime == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert embed(two_runtimes.path, photos, tmp_path / "c", shard="1/1").info.runtime == "torch"
    with pytest.raises(UsageError, match="holds no proved int8 artifact"):
        embed(two_runtimes.path, photos, tmp_path / "d", shard="1/1", precision="int8")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingBackendError, match="runtime onnxruntime needs onnxruntime, which is not installed: pip"):
        embed(two_runtimes.path, photos, tmp_path / "e", shard="1/1")


def test_a_refused_run_says_which_limit(bundle, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    with pytest.raises(GateError, match=r"1 of 1 files failed, more than 0%"):
        embed(bundle.path, folder, tmp_path / "out", max_failures="0%")
