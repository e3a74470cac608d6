import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mio_export.bundle import load_bundle, save_manifest
from mio_export.embedding import embed
from mio_export.errors import GateError, MioError, SpaceError, UsageError
from mio_export.exporting import export
from mio_export.runtimes import open_runtime
from mio_export.store import load_embeddings, locked, read_rows, shard_paths

MIO = [sys.executable, "-c", "from mio_export.cli.main import main; main()"]


def state(out):
    """The bytes of every shard and of store.json."""
    return {path.name: path.read_bytes() for path in [*shard_paths(out), out / "store.json"]}


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture
def folder(photos, tmp_path):
    """A copy of the photos that a test may change."""
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "store"


def test_every_photo_gets_the_row_that_a_batch_of_one_gives(bundle, photos, out):
    result = embed(bundle.path, photos, out, batch_size=7, shard_size=10)
    assert (result.num_files, result.num_ok, result.num_failed, result.num_embedded) == (24, 24, 0, 24)
    store = load_embeddings(out)
    assert store.keys == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    assert store.vectors.dtype == np.float32
    with open_runtime(bundle) as runtime:
        for key, vector in zip(store.keys, store.vectors, strict=True):
            alone = runtime.embed(bundle.manifest.preprocess.decode((photos / key).read_bytes())[None])[0]
            assert cosine(vector, alone) >= 0.99999


def test_shards_hold_the_columns_and_the_identity_of_the_space(bundle, photos, out):
    embed(bundle.path, photos, out, shard_size=10, runtime="onnxruntime")
    assert [pq.read_metadata(path).num_rows for path in shard_paths(out)] == [10, 10, 4]
    table = pq.read_table(shard_paths(out)[0])
    assert table.column_names == ["key", "size", "mtime_ns", "sha256", "status", "stage", "reason", "embedding"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    assert table.schema.metadata[b"mio.space"].decode() == bundle.manifest.space
    assert (
        table.schema.metadata[b"mio.artifact_sha256"].decode()
        == bundle.artifacts(format="onnx", precision="fp32")[0].sha256
    )


def test_the_same_work_has_the_same_bytes(bundle, photos, tmp_path):
    for name in ("a", "b"):
        embed(bundle.path, photos, tmp_path / name, shard_size=10, runtime="onnxruntime")
    assert state(tmp_path / "a") == state(tmp_path / "b")


def test_a_second_run_opens_no_runtime(bundle, photos, out, monkeypatch):
    embed(bundle.path, photos, out)
    before = state(out)
    monkeypatch.setattr("mio_export.runtimes.opening.open_choice", lambda *_: pytest.fail("a runtime was opened"))
    result = embed(bundle.path, photos, out)
    assert result.num_embedded == 0
    assert state(out) == before


def test_new_changed_and_vanished_files(bundle, folder, out):
    embed(bundle.path, folder, out)
    first = state(out)
    shutil.copy(folder / "temple" / "00.jpg", folder / "new.jpg")
    (folder / "temple" / "01.jpg").unlink()
    shutil.copy(folder / "flower" / "12.jpg", folder / "temple" / "02.jpg")
    result = embed(bundle.path, folder, out)
    assert (result.num_embedded, result.num_files, result.num_vanished) == (2, 24, 1)
    after = state(out)
    assert {name: after[name] for name in first} == first  # old shards are as they were
    store = load_embeddings(out)
    vectors = dict(zip(store.keys, store.vectors, strict=True))
    assert "temple/01.jpg" in vectors  # kept until it is pruned
    assert cosine(vectors["temple/02.jpg"], vectors["flower/12.jpg"]) > 0.99999
    result = embed(bundle.path, folder, out, prune_vanished=True)
    assert (result.num_embedded, result.num_pruned, result.num_vanished) == (0, 1, 1)
    rows = [row for path in shard_paths(out) for row in pq.read_table(path).column("key").to_pylist()]
    assert len(rows) == len(set(rows)) == 24
    assert embed(bundle.path, folder, out).num_vanished == 0


def test_a_prune_that_is_killed_halfway_keeps_the_rows_that_count(bundle, folder, out, monkeypatch):
    from mio_export.store import pruning

    embed(bundle.path, folder, out, shard_size=8)
    for path in sorted(folder.rglob("*.jpg"))[:3]:
        os.utime(path, ns=(1, 1))
    embed(bundle.path, folder, out)
    before = read_rows(out)
    (folder / "flower" / "12.jpg").unlink()
    write = pruning.write_table
    calls = []

    def die_at_the_second(path, table):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, table)

    monkeypatch.setattr(pruning, "write_table", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed(bundle.path, folder, out, prune_vanished=True)
    left = {row.key: row for row in read_rows(out)}
    assert all(left[row.key] == row for row in before if row.key in left)  # no older row has come back
    monkeypatch.undo()
    embed(bundle.path, folder, out, prune_vanished=True)
    assert [row.key for row in read_rows(out)] == [row.key for row in before if row.key != "flower/12.jpg"]


def test_shards_without_their_description_are_not_added_to(bundle, photos, out):
    embed(bundle.path, photos, out)
    (out / "store.json").unlink()
    with pytest.raises(GateError, match=r"holds shards but no store.json"):
        embed(bundle.path, photos, out)


def test_nothing_is_pruned_while_a_folder_cannot_be_listed(bundle, folder, out, monkeypatch):
    embed(bundle.path, folder, out)
    before = state(out)
    real = os.scandir

    def scandir(path):
        if os.fsencode(path).endswith(b"temple"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        MioError, match=r"nothing is pruned while (.|\n)*temple: cannot be listed \(Permission denied\)"
    ):
        embed(bundle.path, folder, out, prune_vanished=True)
    assert embed(bundle.path, folder, out).notes == ("temple: cannot be listed (Permission denied)",)
    assert state(out) == before


def test_a_touched_file_is_embedded_again(bundle, folder, out):
    embed(bundle.path, folder, out)
    os.utime(folder / "temple" / "00.jpg", ns=(1, 1))
    assert embed(bundle.path, folder, out).num_embedded == 1


def test_failed_files_are_tried_again_only_when_asked(bundle, folder, out):
    good = (folder / "temple" / "00.jpg").read_bytes()
    (folder / "temple" / "00.jpg").write_bytes(good[:100])
    assert embed(bundle.path, folder, out).num_failed == 1
    assert embed(bundle.path, folder, out).num_embedded == 0
    assert embed(bundle.path, folder, out, retry_failed=True).num_embedded == 1
    (folder / "temple" / "00.jpg").write_bytes(good)
    result = embed(bundle.path, folder, out)
    assert (result.num_embedded, result.num_failed) == (1, 0)


def test_another_space_artifact_or_setting_is_refused(bundle, encoder, photos, out, tmp_path, mio):
    embed(bundle.path, photos, out, batch_size=8, runtime="onnxruntime")
    before = state(out)
    encoder_2 = encoder.untrained(seed=1)
    other = export(encoder_2, tmp_path / "other.mio", images=photos, max_batch=32).bundle
    with pytest.raises(SpaceError, match="holds vectors of another embedding space"):
        embed(other.path, photos, out)
    with pytest.raises(SpaceError, match=r"holds vectors of encoder.onnx .* not of encoder.torchscript"):
        embed(bundle.path, photos, out, runtime="torchscript")
    with pytest.raises(UsageError, match="was created with --batch-size 8, got 4"):
        embed(bundle.path, photos, out, batch_size=4)
    assert embed(bundle.path, photos, out).info.batch_size == 8
    assert mio("embed", other.path, photos, "-o", out).code == 4
    assert state(out) == before


def test_a_batch_beyond_the_proved_range_is_refused(bundle, photos, out):
    with pytest.raises(UsageError, match="batch size must be 1 to 32"):
        embed(bundle.path, photos, out, batch_size=33)
    with pytest.raises(UsageError, match="batch size must be 1 to 32"):
        embed(bundle.path, photos, out, batch_size=0)


def test_a_second_writer_is_refused(bundle, photos, out, mio):
    with locked(out), pytest.raises(MioError, match="is being written by another process"):
        embed(bundle.path, photos, out)
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from mio_export.store import locked\n"
         "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)", str(out)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        process.stdout.readline()
        result = mio("embed", bundle.path, photos, "-o", out)
        assert result.code == 1
        assert "is being written by another process" in result.err
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert mio("embed", bundle.path, photos, "-o", out).code == 0  # a killed writer's lock is gone


def test_an_empty_folder_and_a_folder_without_images(bundle, tmp_path, mio):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = mio("embed", bundle.path, empty, "-o", tmp_path / "out")
    assert result.code == 1
    assert "no images found in" in result.err
    (empty / "notes.txt").write_text("x")
    result = mio("embed", bundle.path, empty, "-o", tmp_path / "out")
    assert result.code == 1
    assert "1 files are not images and were left out: .txt (1)" in result.err
    assert not (tmp_path / "out").exists()


def test_if_every_file_fails_the_exit_status_says_so_and_the_rows_are_there(bundle, tmp_path, mio):
    bad = tmp_path / "bad"
    bad.mkdir()
    for index in range(40):
        (bad / f"{index}.jpg").write_bytes(b"x" * index)
    result = mio("embed", bundle.path, bad, "-o", tmp_path / "out")
    assert result.code == 3
    assert "all 40 files failed" in result.err
    assert "Traceback" not in result.err
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 40
    assert all(row.status == "failed" and row.reason for row in rows)
    assert load_embeddings(tmp_path / "out").vectors.shape == (0, bundle.manifest.encoder.embedding_dim)
    assert mio("embed", bundle.path, bad, "-o", tmp_path / "out").code == 3


def test_a_full_disk_is_one_line_and_resumable(bundle, photos, out):
    command = [*MIO, "embed", str(bundle.path), str(photos), "-o", str(out), "--shard-size", "8"]
    limited = subprocess.run(
        ["prlimit", "--fsize=4000", *command], capture_output=True, text=True, check=False, timeout=120
    )
    assert limited.returncode == 1
    assert limited.stderr.strip().splitlines()[-1].startswith("mio: ")
    assert "File too large" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert shard_paths(out) == []
    assert embed(bundle.path, photos, out).num_ok == 24


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_cleanly(bundle, many, out, number, code):
    process = start(bundle, many, out)
    wait_for_shards(process, out, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1].startswith("mio: interrupted")
    assert "Traceback" not in errors
    assert not [path for path in out.iterdir() if ".tmp" in path.name]
    done = len(shard_paths(out))
    assert 2 <= done < 125
    assert embed(bundle.path, many, out).num_embedded == 1000 - 8 * done


@pytest.fixture(scope="session")
def many(tmp_path_factory, photo_crops):
    """1,000 small images of their own."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(1000):
        crop = photo_crops[index % 24]
        crop.crop((index % 61, index % 53, index % 61 + 64, index % 53 + 64)).save(folder / f"{index:04d}.jpg")
    return folder


def start(bundle, source, out):
    command = [*MIO, "embed", str(bundle.path), str(source), "-o", str(out), "--shard-size", "8", "--batch-size", "3"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(process, out, count):
    deadline = time.monotonic() + 60
    while len(shard_paths(out)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_bundle_whose_artifact_gives_nan_fails_every_file_and_says_so(bundle, photos, out, monkeypatch, mio):
    from mio_export.runtimes.onnxruntime import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "_run", lambda self, images: np.full((len(images), 256), np.nan, np.float32))
    result = mio("embed", bundle.path, photos, "-o", out, "--runtime", "onnxruntime", "--decode", "full")
    assert result.code == 3
    assert "all 24 files failed" in result.err
    rows = list(read_rows(out))
    assert {(row.status, row.stage) for row in rows} == {("failed", "embed")}
    assert {row.reason for row in rows} == {"its embedding has NaN or infinite values, computed alone too"}


def test_a_newer_schema_is_refused_with_both_versions(bundle, photos, out, tmp_path, mio):
    copy = shutil.copytree(bundle.path, tmp_path / "copy.mio")
    save_manifest(copy, replace(load_bundle(copy).manifest, schema_version=9))
    result = mio("embed", copy, photos, "-o", out)
    assert result.code == 1
    assert "has schema version 9, this mio-export reads up to 2" in result.err


def test_one_name_in_two_folders_stays_two_rows(bundle, tmp_path, out):
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "src" / name / "x.png")
    embed(bundle.path, tmp_path / "src", out)
    store = load_embeddings(out)
    assert store.keys == ["a/x.png", "b/x.png"]
    assert cosine(*store.vectors) < 0.9999
