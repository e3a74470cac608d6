import itertools
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from mio_export import embed, load_embeddings
from mio_export.errors import GateError, MioError, SpaceError, UsageError
from mio_export.layouts import write_layout
from mio_export.store import FAILED, OK, Row, prune, read_info, read_rows, shard_paths, write_info, write_shard

IDENTITY = ("space", "artifact_sha256", "precision", "decode", "runtime")


@pytest.fixture(scope="module")
def store(bundle, photos, tmp_path_factory):
    """24 photos and a broken one; then one was replaced by another, one broke, one is new. Read only."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("layouts") / "photos")
    (folder / "broken.jpg").write_bytes(b"no image")
    out = folder.parent / "store"
    embed(bundle.path, folder, out, shard_size=10)
    (folder / "temple" / "00.jpg").write_bytes((folder / "flower" / "20.jpg").read_bytes())
    (folder / "temple" / "01.jpg").write_bytes(b"no longer an image")
    shutil.copy(folder / "flower" / "12.jpg", folder / "zebra.jpg")
    embed(bundle.path, folder, out)
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def by_key(keys, vectors):
    return dict(zip(keys, vectors, strict=True))


def expected(store):
    embeddings = load_embeddings(store)
    return by_key(embeddings.keys, embeddings.vectors)


def assert_same_vectors(got, store, dtype="float32"):
    wanted = expected(store)
    assert got.keys() == wanted.keys()
    for key, vector in got.items():
        np.testing.assert_array_equal(vector, wanted[key].astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["fixed-size-list", "list"])
def test_duckdb_reads_every_key_once_with_the_vector_that_counts(store, out, layout, dtype):
    import duckdb

    result = write_layout(store, out, layout=layout, dtype=dtype)
    assert (result.num_vectors, result.num_failed) == (24, 2)
    table = duckdb.sql(f"SELECT key, status, reason, embedding FROM read_parquet('{out}/*.parquet')").fetchall()
    assert sorted(row[0] for row in table) == sorted(row.key for row in read_rows(store))
    failed = {key: reason for key, status, reason, _ in table if status == FAILED}
    assert failed.keys() == {"broken.jpg", "temple/01.jpg"}
    assert all(failed.values())
    assert {key for key, *_, vector in table if vector is None} == failed.keys()
    vectors = {key: np.array(vector, np.float32) for key, *_, vector in table if vector is not None}
    assert_same_vectors(vectors, store, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["fixed-size-list", "list"])
def test_the_folder_is_one_parquet_data_set_of_the_type_asked_for(store, out, layout, dtype):
    write_layout(store, out, layout=layout, dtype=dtype)
    table = pq.read_table(out)  # a folder: there is nothing in it but Parquet
    element = "halffloat" if dtype == "float16" else "float"
    dim = read_info(store).embedding_dim
    length = f"[{dim}]" if layout == "fixed-size-list" else ""
    kind = "fixed_size_list" if layout == "fixed-size-list" else "list"
    assert str(table.schema.field("embedding").type) == f"{kind}<element: {element}>{length}"
    assert table.column_names == pq.read_schema(shard_paths(store)[0]).names
    for path in out.iterdir():
        metadata = pq.read_schema(path).metadata
        assert [metadata[f"mio.{name}".encode()].decode() for name in IDENTITY] == [
            getattr(read_info(store), name) for name in IDENTITY
        ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_reads_clip_retrievals_layout_with_rows_that_line_up(store, out, dtype):
    result = write_layout(store, out, layout="clip-retrieval", dtype=dtype)
    assert (result.num_vectors, result.num_failed) == (24, 2)
    arrays = sorted((out / "img_emb").iterdir())
    tables = sorted((out / "metadata").iterdir())
    assert [path.name for path in arrays] == [f"img_emb_{number}.npy" for number in range(len(arrays))]
    assert [path.name for path in tables] == [f"metadata_{number}.parquet" for number in range(len(arrays))]
    vectors = [np.load(path) for path in arrays]
    assert {array.dtype for array in vectors} == {np.dtype(dtype)}
    keys = [pq.read_table(path).column("image_path").to_pylist() for path in tables]
    assert [len(names) for names in keys] == [len(array) for array in vectors]
    assert_same_vectors(by_key(itertools.chain(*keys), np.concatenate(vectors)), store, dtype)
    identity = json.loads((out / "identity.json").read_text())
    assert {name: identity[name] for name in IDENTITY} == {name: getattr(read_info(store), name) for name in IDENTITY}
    assert identity["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.filterwarnings("default")  # theirs
def test_embedding_reader_which_clip_retrieval_and_autofaiss_read_with(synthetic, out, dtype):
    from embedding_reader import EmbeddingReader

    store = synthetic(num_shards=16)  # twelve with vectors: after nine, names and numbers may sort differently
    write_layout(store, out, layout="clip-retrieval", dtype=dtype)
    reader = EmbeddingReader(
        embeddings_folder=str(out / "img_emb"),
        metadata_folder=str(out / "metadata"),
        meta_columns=["image_path"],
        file_format="parquet_npy",
    )
    got = {}
    for vectors, rows in reader(batch_size=7, show_progress=False):
        got |= by_key(rows["image_path"], vectors)
    assert list(got) == sorted(got)
    assert_same_vectors(got, store, dtype)


@pytest.fixture
def synthetic(store, tmp_path):
    """Make a store of random vectors, three rows a shard; in every fourth shard all files failed."""

    def make(*, num_shards=2, scale=1.0):
        folder = tmp_path / "synthetic"
        folder.mkdir()
        info = replace(read_info(store), embedding_dim=5)
        write_info(folder, info)
        random = np.random.default_rng(0)
        for shard in range(num_shards):
            bad = shard % 4 == 3
            rows = [
                Row(
                    key=f"{shard:02d}-{row}.jpg",
                    size=1,
                    mtime_ns=1,
                    sha256=None if bad else "0" * 64,
                    status=FAILED if bad else OK,
                    stage="read" if bad else None,
                    reason="cannot be read" if bad else None,
                )
                for row in range(3)
            ]
            vectors = scale * random.standard_normal((0 if bad else 3, 5)).astype(np.float32)
            write_shard(folder / f"shard-{shard:06d}.parquet", info, rows, vectors)
        return folder

    return make


def test_batches_smaller_than_a_shard_give_the_same(store, tmp_path, monkeypatch):
    for layout in ("fixed-size-list", "list", "clip-retrieval"):
        write_layout(store, tmp_path / layout / "whole", layout=layout)
        monkeypatch.setattr("mio_export.layouts.rows.BATCH_ROWS", 3)
        write_layout(store, tmp_path / layout / "small", layout=layout)
        monkeypatch.undo()
        whole, small = ((tmp_path / layout / name) for name in ("whole", "small"))
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.*"))
        assert files == sorted(path.relative_to(small) for path in small.rglob("*.*"))
        for file in files:
            if file.suffix == ".parquet":
                assert pq.read_table(whole / file).equals(pq.read_table(small / file))
            else:
                assert (whole / file).read_bytes() == (small / file).read_bytes()


def test_float16_says_how_far_it_moves_the_vectors(synthetic, out):
    store = synthetic()
    result = write_layout(store, out, dtype="float16")
    wanted = load_embeddings(store).vectors.astype(np.float64)
    half = wanted.astype(np.float16).astype(np.float64)
    cosines = (wanted * half).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(half, axis=1)
    assert 0.99999 < result.min_cosine < 1
    assert result.min_cosine == pytest.approx(cosines.min(), abs=1e-12)
    assert f"at least {result.min_cosine:.8f}" in result.summary(out)[-1]


def test_float16_that_makes_zeros_of_small_vectors_shows(synthetic, out):
    assert write_layout(synthetic(scale=1e-9), out, dtype="float16").min_cosine == 0


def test_float32_moves_nothing(synthetic, out):
    assert write_layout(synthetic(), out).min_cosine is None


def test_a_value_too_large_for_float16_is_refused_and_nothing_is_left(synthetic, out):
    store = synthetic(scale=1e5)
    with pytest.raises(
        GateError, match=r"^00-\d.jpg has a value of [\d,]+, too large for float16 \(at most 65,504\); use"
    ):
        write_layout(store, out, layout="clip-retrieval", dtype="float16")
    assert [path.name for path in out.parent.iterdir()] == ["synthetic"]
    write_layout(store, out, layout="clip-retrieval", dtype="float32")


def test_an_existing_out_is_refused_and_stays(store, out):
    out.mkdir()
    with pytest.raises(UsageError, match=f"^{out} exists; choose another -o$"):
        write_layout(store, out)
    assert list(out.iterdir()) == []


def test_wrong_arguments_are_refused(store, out, tmp_path):
    with pytest.raises(UsageError, match=r"layout must be one of fixed-size-list, list, clip-retrieval, got 'csv'"):
        write_layout(store, out, layout="csv")
    with pytest.raises(UsageError, match=r"dtype must be one of float32, float16, got 'int8'"):
        write_layout(store, out, dtype="int8")
    with pytest.raises(UsageError, match=r"is not an embedding store"):
        write_layout(tmp_path, out)
    assert not out.exists()


def test_a_store_without_vectors_is_refused(synthetic, out):
    with pytest.raises(MioError, match=r"holds no embeddings; why its files failed: mio inspect"):
        write_layout(synthetic(num_shards=0), out)


def test_a_shard_of_another_space_is_refused(synthetic, out):
    store = synthetic(num_shards=3)
    write_info(store, replace(read_info(store), precision="int8"))
    with pytest.raises(
        SpaceError,
        match=r"shard-000000.parquet holds vectors of another precision than store.json says: fp32, not int8",
    ):
        write_layout(store, out)


def test_a_damaged_shard_is_refused_in_one_line(synthetic, out):
    store = synthetic()
    path = shard_paths(store)[1]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(GateError, match=r"^[^\n]*shard-000001.parquet cannot be read: [^\n]*$"):
        write_layout(store, out)
    assert not out.exists()


def test_a_store_pruned_meanwhile_is_noticed(synthetic, out, monkeypatch):
    import mio_export.layouts.writing as writing

    store = synthetic()
    find = writing.find_shards

    def then_another_writes(snapshot):
        shards = find(snapshot)
        prune(store, frozenset(row.key for row in read_rows(store)[1:]))
        return shards

    monkeypatch.setattr(writing, "find_shards", then_another_writes)
    with pytest.raises(MioError, match=r"shard-000000.parquet changed while it was read"):
        write_layout(store, out)
    assert not out.exists()
