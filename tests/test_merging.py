"""A collection in parts, the cache, and reading again: nothing is computed twice, and the bytes stay the same."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from mio_export.embedding import embed, merge
from mio_export.errors import MioError, SpaceError, UsageError
from mio_export.store import load_embeddings, read_rows, shard_paths

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
    with pytest.raises(UsageError, match=r"has changed since .*part-1 was begun \(93 files, now 94\)"):
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
        with pytest.raises(UsageError, match=f"was begun with --shard {begun}"):
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
