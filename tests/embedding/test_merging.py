"""A collection in parts, the cache, and reading again: nothing is computed twice, and the bytes stay the same."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import PIL
import pytest
from PIL import Image

from mio_export.embedding import embed, merge, merging
from mio_export.embedding.pipeline import StageTimer
from mio_export.embedding.store_writer import StoreWriter
from mio_export.errors import MioError, SpaceError, UsageError
from mio_export.store import (
    Row,
    load_embeddings,
    locked,
    prune,
    read_info,
    read_rows,
    shard_paths,
    write_info,
)

OPTIONS = {"runtime": "onnxruntime", "decode": "full"}


@pytest.fixture
def images(tmp_path):
    """60 different images, 30 copies of some of them in other shards, and 3 broken files."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index:03d}.png")
    for index in range(30):
        shutil.copy(folder / f"{2 * index:03d}.png", folder / f"{59 - index:03d}-copy.png")
    for index in range(3):
        (folder / f"{20 * index:03d}-broken.png").write_bytes(b"no image")
    return folder


def contents(out):
    return {path.name: path.read_bytes() for path in [*shard_paths(out), out / "store.json"]}


def in_parts(bundle, images, folder, count, **options):
    parts = [folder / f"part-{index}" for index in range(1, count + 1)]
    for index, part in enumerate(parts, 1):
        embed(bundle.path, images, part, shard=f"{index}/{count}", **OPTIONS | options)
    return parts


@pytest.mark.parametrize("count", [1, 4])
def test_merged_parts_have_the_bytes_of_one_run(bundle, images, tmp_path, count):
    embed(bundle.path, images, tmp_path / "whole", shard_size=7, batch_size=4, **OPTIONS)
    parts = in_parts(bundle, images, tmp_path, count, shard_size=7, batch_size=4)
    assert sum(len(read_rows(part)) for part in parts) == 93
    result = merge(reversed(parts), tmp_path / "merged")
    assert (result.num_stores, result.num_files, result.num_ok, result.num_failed) == (count, 93, 90, 3)
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    assert {row.status for row in read_rows(tmp_path / "merged")} == {"ok", "duplicate", "failed"}


def test_a_part_resumes_and_tries_its_failed_files_again(bundle, images, tmp_path):
    parts = in_parts(bundle, images, tmp_path, 3, shard_size=7)
    whole = contents(parts[1])
    shard_paths(parts[1])[-1].unlink()
    embed(bundle.path, images, parts[1], shard="2/3", **OPTIONS)
    assert contents(parts[1]) == whole
    broken = [row.key for row in read_rows(parts[0]) if row.status == "failed"]
    shutil.copy(images / "001.png", images / broken[0])
    result = embed(bundle.path, images, parts[0], shard="1/3", retry_failed=True)
    assert (result.num_embedded, result.num_failed) == (len(broken), len(broken) - 1)
    assert merge(parts, tmp_path / "merged").num_failed == 2
    (images / "new.png").touch()
    with pytest.raises(UsageError, match=r"has changed since .*part-1 was created \(93 files, now 94\)"):
        embed(bundle.path, images, parts[0], shard="1/3")


def test_what_does_not_fit_together_is_not_merged(bundle, images, photos, tmp_path, mio):
    parts = in_parts(bundle, images, tmp_path, 3, shard_size=7)
    embed(bundle.path, photos, tmp_path / "photos", **OPTIONS)
    embed(bundle.path, photos, tmp_path / "other", shard="3/3", **OPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = {
        "part 2 of 3 is missing": [parts[0], parts[2]],
        "are both part 1/3": [parts[0], parts[0], parts[2]],
        "is no part": [parts[0], tmp_path / "photos"],
        "parts of different collections": [parts[0], parts[1], tmp_path / "other"],
        "is not an embedding store": [photos],
        "is in both": [tmp_path / "photos", tmp_path / "photos"],
    }
    for message, given in cases.items():
        with pytest.raises(UsageError, match=message):
            merge(given, tmp_path / "merged")
    with pytest.raises(UsageError, match="exists"):
        merge(parts, tmp_path / "full")
    shard_paths(parts[2])[-1].unlink()
    with pytest.raises(UsageError, match=r"part-3 is not finished: \d+ of its files have no row"):
        merge(parts, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    result = mio("merge", parts[0], "-o", tmp_path / "merged")
    assert (result.code, result.err) == (2, "mio: part 2, 3 of 3 is missing\n")


def test_stores_of_different_collections_are_merged(bundle, images, photos, tmp_path):
    embed(bundle.path, photos, tmp_path / "photos", **OPTIONS)
    embed(bundle.path, images, tmp_path / "a", **OPTIONS)
    merge([tmp_path / "photos", tmp_path / "a"], tmp_path / "both")
    both = load_embeddings(tmp_path / "both")
    assert both.keys == sorted(load_embeddings(tmp_path / "photos").keys + load_embeddings(tmp_path / "a").keys)
    info = json.loads((tmp_path / "a" / "store.json").read_text()) | {"precision": "int8"}
    (tmp_path / "a" / "store.json").write_text(json.dumps(info))
    with pytest.raises(SpaceError, match="vectors of different precision: int8 and fp32"):
        merge([tmp_path / "photos", tmp_path / "a"], tmp_path / "again")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4"])
def test_a_shard_that_is_none_is_a_usage_error(bundle, photos, tmp_path, text):
    with pytest.raises(UsageError, match="--shard is I/N"):
        embed(bundle.path, photos, tmp_path / "out", shard=text)


def test_a_store_is_gone_on_with_as_it_was_begun(bundle, images, tmp_path):
    embed(bundle.path, images, tmp_path / "out", shard="1/2", **OPTIONS)
    for shard, begun in ((None, "1/2"), ("2/2", "1/2")):
        with pytest.raises(UsageError, match=f"was created with --shard {begun}"):
            embed(bundle.path, images, tmp_path / "out", shard=shard, **OPTIONS)


def test_what_a_cache_holds_is_not_computed(bundle, images, tmp_path, forwards):
    cache = tmp_path / "cache"
    embed(bundle.path, images, tmp_path / "first", cache=cache, **OPTIONS)
    assert sum(forwards) == 60
    forwards.clear()
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in images.iterdir():
        shutil.copy(path, renamed / f"new-{path.name}")
    embed(bundle.path, renamed, tmp_path / "second", cache=cache, shard_size=9, **OPTIONS)
    assert forwards == []
    first, second = load_embeddings(tmp_path / "first"), load_embeddings(tmp_path / "second")
    assert second.keys == [f"new-{key}" for key in first.keys]
    assert np.array_equal(first.vectors, second.vectors)


def test_a_cache_is_of_one_identity(bundle, images, tmp_path, forwards):
    embed(bundle.path, images, tmp_path / "first", cache=tmp_path / "cache", **OPTIONS)
    forwards.clear()
    embed(bundle.path, images, tmp_path / "second", cache=tmp_path / "cache", **OPTIONS | {"decode": "scaled"})
    assert sum(forwards) == 60


def test_a_damaged_cache_is_one_line(bundle, images, tmp_path):
    embed(bundle.path, images, tmp_path / "first", cache=tmp_path / "cache", **OPTIONS)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"no database" * 1000)
    with pytest.raises(MioError, match=r"the cache .*sqlite cannot be used: .*; delete it, or leave --cache out"):
        embed(bundle.path, images, tmp_path / "second", cache=tmp_path / "cache", **OPTIONS)


@pytest.mark.parametrize("kept", [bytes(8), b"\0\0\0", "text", np.full(256, np.nan, np.float32).tobytes()])
def test_what_a_damaged_cache_holds_reaches_no_store(bundle, images, tmp_path, kept):
    embed(bundle.path, images, tmp_path / "first", cache=tmp_path / "cache", **OPTIONS)
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE vectors SET vector = ?", (kept,))
    with pytest.raises(
        MioError, match=r"sqlite is damaged: it holds .* no vector of 256 finite numbers; delete it, or"
    ):
        embed(bundle.path, images, tmp_path / "second", cache=tmp_path / "cache", **OPTIONS)
    assert shard_paths(tmp_path / "second") == []


def test_bytes_that_changed_behind_size_and_time_are_found(bundle, images, tmp_path, forwards):
    embed(bundle.path, images, tmp_path / "out", **OPTIONS)
    path = images / "007.png"
    status = path.stat()
    pixels = np.asarray(Image.open(path)).copy()
    data = bytearray(path.read_bytes())
    Image.fromarray(255 - pixels).save(path)
    changed = path.read_bytes()[: len(data)].ljust(len(data), b"\0")
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    forwards.clear()
    assert embed(bundle.path, images, tmp_path / "out", **OPTIONS).num_embedded == 0
    result = embed(bundle.path, images, tmp_path / "out", rehash=True, **OPTIONS)
    assert result.num_embedded == 1
    assert embed(bundle.path, images, tmp_path / "out", rehash=True, **OPTIONS).num_embedded == 0


def test_progress_as_json_is_an_object_a_line(mio, bundle, images, tmp_path):
    result = mio("embed", bundle.path, images, "-o", tmp_path / "out", "--progress", "json")
    objects = [json.loads(line) for line in result.err.splitlines()]
    state = [found for found in objects if found.get("task") == "embedding"][-1]
    assert (state["done"], state["total"], state["failed"], state["eta_s"]) == (93, 93, 3, 0)
    assert state["per_s"] > 0
    assert mio("embed", bundle.path, images, "-o", tmp_path / "out", "--progress", "tty").code == 2


def test_a_store_or_a_merge_of_another_runtime_is_refused(bundle, images, photos, tmp_path, mio):
    for name, runtime, source in (("a", "onnxruntime", images), ("b", "torch", photos)):
        embed(bundle.path, source, tmp_path / name, runtime=runtime, decode="full")
    info = json.loads((tmp_path / "b" / "store.json").read_text())
    info |= {"artifact_sha256": json.loads((tmp_path / "a" / "store.json").read_text())["artifact_sha256"]}
    (tmp_path / "b" / "store.json").write_text(json.dumps(info))
    result = mio("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both")
    assert result.code == 4
    assert "hold vectors of different runtime: torch and onnxruntime" in result.err
    (images / "new.png").write_bytes((images / "000.png").read_bytes())
    result = mio("embed", bundle.path, images, "-o", tmp_path / "a", "--runtime", "torch")
    assert result.code == 4
    assert "holds vectors of encoder.onnx in onnxruntime, not of encoder.safetensors in torch" in result.err
    assert not (tmp_path / "both").exists()


def test_a_foreign_shard_is_named_by_every_command_and_never_relabelled(bundle, images, photos, tmp_path, mio):
    for name, options in (("a", {}), ("scaled", {"decode": "scaled"})):
        embed(bundle.path, photos, tmp_path / name, **OPTIONS | options)
    shutil.copy(shard_paths(tmp_path / "scaled")[0], tmp_path / "a" / "shard-000001.parquet")
    commands = [
        ("embed", bundle.path, photos, "-o", tmp_path / "a"),
        ("embed", bundle.path, photos, "-o", tmp_path / "a", "--prune"),
        ("merge", tmp_path / "a", "-o", tmp_path / "merged"),
        ("merge", tmp_path / "a", "-o", tmp_path / "merged", "--layout", "list"),
        ("search", tmp_path / "a", "--key", "temple/00.jpg"),
        ("search", tmp_path / "a", "--html", tmp_path / "gallery.html"),
        ("inspect", tmp_path / "a"),
    ]
    for command in commands:
        result = mio(*command)
        assert (result.code, result.err) == (
            4,
            f"mio: {tmp_path}/a/shard-000001.parquet holds vectors of another decode than store.json says:"
            " scaled, not full; move it out of the store\n",
        ), command
    assert not (tmp_path / "merged").exists()


def test_merging_waits_for_nobody_and_disturbs_nobody(bundle, photos, tmp_path, mio):
    embed(bundle.path, photos, tmp_path / "a", **OPTIONS)
    out = tmp_path / "out"
    with locked(out):
        result = mio("merge", tmp_path / "a", "-o", out)
        assert (result.code, result.err) == (
            1,
            f"mio: {out} is being written by another process; wait for it, or choose another -o\n",
        )
        assert [path.name for path in out.iterdir()] == [".lock"]
    with locked(tmp_path / "a"):
        assert "a is being written by another process" in mio("merge", tmp_path / "a", "-o", out).err
    assert mio("merge", tmp_path / "a", "-o", out).code == 0
    assert contents(out) == contents(tmp_path / "a")


def test_the_lock_of_the_output_is_held_until_the_merge_is_done(bundle, photos, tmp_path, monkeypatch):
    """Also after the folder was exchanged, and for a process that looks at it then."""
    import mio_export.files as files

    embed(bundle.path, photos, tmp_path / "a", **OPTIONS)
    out, original, refused = tmp_path / "out", files._take_place, []

    def take_place(new, path):
        for moment in ("before", "after"):
            with pytest.raises(MioError, match="is being written by another process"), locked(out):
                pytest.fail("two writers")
            with pytest.raises((MioError, UsageError), match=r"is being written by another process|exists"):
                merge([tmp_path / "a"], out)
            refused.append(moment)
            if moment == "before":
                original(new, path)

    monkeypatch.setattr(files, "_take_place", take_place)
    merge([tmp_path / "a"], out)
    assert refused == ["before", "after"]
    assert contents(out) == contents(tmp_path / "a")
    with locked(out):
        pass


def test_of_two_merges_at_once_one_is_done_and_the_other_refused_in_one_line(bundle, images, tmp_path):
    parts = in_parts(bundle, images, tmp_path, 2, shard_size=3)
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()", "merge", *map(str, parts)]
    runs = [
        subprocess.Popen([*command, "-o", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert sorted(run.returncode for run in runs) in ([0, 1], [0, 2]), errors
    said = next(error for run, error in zip(runs, errors, strict=True) if run.returncode)
    assert said.splitlines()[-1].startswith(f"mio: {tmp_path}/out ")
    assert len(read_rows(tmp_path / "out")) == 93


def test_a_merge_that_fails_leaves_nothing_behind(bundle, images, tmp_path, monkeypatch):
    parts = in_parts(bundle, images, tmp_path, 2, shard_size=7)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_append", fail)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_killed_merge_changes_nothing_and_can_be_done_again(bundle, images, tmp_path):
    parts = in_parts(bundle, images, tmp_path, 2, shard_size=1)
    before = [contents(part) for part in parts]
    command = [sys.executable, "-c", "from mio_export.cli.main import main; main()", "merge", *map(str, parts)]
    run = subprocess.Popen([*command, "-o", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(tmp_path.glob(".out.tmp-*/shard-*")):
        time.sleep(0.001)
    run.kill()
    run.wait()
    assert not shard_paths(tmp_path / "out")
    merge(parts, tmp_path / "out")
    assert [contents(part) for part in parts] == before
    assert len(read_rows(tmp_path / "out")) == 93


def test_parts_stay_as_they_are_and_may_lie_where_nothing_can_be_written(bundle, images, tmp_path):
    parts = in_parts(bundle, images, tmp_path, 2, shard_size=7)
    (parts[0] / ".lock").unlink()
    names = [sorted(path.name for path in part.iterdir()) for part in parts]
    for part in parts:
        part.chmod(0o555)
    merge(parts, tmp_path / "out")
    assert [sorted(path.name for path in part.iterdir()) for part in parts] == names


def test_a_part_without_a_lock_that_changes_meanwhile_is_noticed(bundle, photos, tmp_path, monkeypatch):
    embed(bundle.path, photos, tmp_path / "a", shard_size=8, **OPTIONS)
    (tmp_path / "a" / ".lock").unlink()
    append = merging._append

    def then_another_prunes(*arguments):
        append(*arguments)
        prune(tmp_path / "a", frozenset(row.key for row in read_rows(tmp_path / "a")[1:]))

    monkeypatch.setattr(merging, "_append", then_another_prunes)
    with pytest.raises(MioError, match="changed while it was"):
        merge([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merged_stores_keep_the_versions_that_computed_them(bundle, images, photos, tmp_path, mio):
    embed(bundle.path, images, tmp_path / "a", shard_size=40, **OPTIONS)
    embed(bundle.path, photos, tmp_path / "b", shard_size=40, **OPTIONS)
    info = read_info(tmp_path / "b")
    write_info(tmp_path / "b", replace(info, spans=(replace(info.spans[0], versions={"pillow": "12.0.0"}),)))
    result = mio("merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both")
    assert "different versions computed its vectors; which ones: mio inspect" in result.out
    spans = read_info(tmp_path / "both").spans
    assert [span.first_shard for span in spans] == [0, 3]
    assert spans[1].versions == {"pillow": "12.0.0"}


def test_a_merge_goes_behind_a_link(bundle, photos, tmp_path):
    embed(bundle.path, photos, tmp_path / "a", **OPTIONS)
    (tmp_path / "current").symlink_to("v1")
    merge([tmp_path / "a"], tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert contents(tmp_path / "v1") == contents(tmp_path / "a")
    (tmp_path / "next").symlink_to("v2")
    embed(bundle.path, photos, tmp_path / "next", **OPTIONS)
    assert contents(tmp_path / "v2") == contents(tmp_path / "a")


def test_a_store_without_a_single_row_may_be_begun_with_other_choices(bundle, photos, tmp_path, monkeypatch):
    from mio_export.runtimes.onnxruntime import OnnxRuntime

    def interrupt(self, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntime, "_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(bundle.path, photos, tmp_path / "out", shard="1/2", **OPTIONS)
    assert json.loads((tmp_path / "out" / "store.json").read_text())["runtime"] == "onnxruntime"
    info = embed(bundle.path, photos, tmp_path / "out", runtime="torch", decode="full", batch_size=3).info
    assert (info.runtime, info.batch_size, info.part) == ("torch", 3, None)
    assert read_info(tmp_path / "out") == info


def test_a_cache_is_of_one_runtime_and_of_one_set_of_versions(bundle, images, tmp_path, forwards, monkeypatch):
    cache = {"cache": tmp_path / "cache"}
    embed(bundle.path, images, tmp_path / "torch", runtime="torch", decode="full", **cache)
    embed(bundle.path, images, tmp_path / "first", **cache, **OPTIONS)
    assert sum(forwards) == 60
    monkeypatch.setattr(PIL, "__version__", "12.0.0")
    embed(bundle.path, images, tmp_path / "second", **cache, **OPTIONS)
    assert sum(forwards) == 120


def test_inspect_counts_duplicates_as_embedded(bundle, images, tmp_path, mio):
    embed(bundle.path, images, tmp_path / "out", **OPTIONS)
    lines = mio("inspect", tmp_path / "out").out.splitlines()
    assert any("93 files: 90 embedded, 3 failed" in line for line in lines)
    assert any("30 have the bytes, and so the vector, of another file" in line for line in lines)
    assert not any("same bytes as" in line for line in lines)


def test_a_content_that_fails_in_the_runtime_fails_for_every_file_that_holds_it(bundle, photos, tmp_path):
    embed(bundle.path, photos, tmp_path / "real", **OPTIONS)
    (tmp_path / "out").mkdir()
    info = read_info(tmp_path / "real")
    failed = Row(key="a", size=1, mtime_ns=0, sha256="0" * 64, status="failed", stage="embed", reason="gave NaN")
    good = replace(failed, key="c", sha256="1" * 64, status="ok", stage=None, reason=None)
    with StoreWriter(tmp_path / "out", info, StageTimer()) as writer:
        rows = [failed, replace(failed, key="b", status="ok", stage=None, reason=None), good]
        writer.append(rows, {"1" * 64: np.ones(info.embedding_dim, np.float32)})
    write_info(tmp_path / "out", info)
    assert read_rows(tmp_path / "out") == [failed, replace(failed, key="b"), good]
    assert load_embeddings(tmp_path / "out").vectors.tolist() == [[1.0] * info.embedding_dim]
