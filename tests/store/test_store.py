"""The store itself: numbers and names of shards, what may lie in one, reading beside a writer, locks."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mio_export.store.snapshot as snapshot_module
from mio_export.errors import GateError, MioError, SpaceError, UsageError
from mio_export.layouts import write_layout
from mio_export.store import (
    Row,
    Snapshot,
    Span,
    StoreInfo,
    iter_columns,
    load_embeddings,
    load_with_rows,
    locate,
    locked,
    next_number,
    prune,
    read_info,
    read_rows,
    read_vectors,
    shard_path,
    shard_paths,
    shared_lock,
    write_info,
    write_shard,
)

INFO = StoreInfo(
    bundle="encoder",
    space="a space",
    artifact_file="encoder.onnx",
    artifact_sha256="an artifact",
    precision="fp32",
    runtime="onnxruntime",
    device="cpu",
    embedding_dim=2,
    normalized=False,
    batch_size=1,
    shard_size=10,
    spans=(Span(first_shard=0, versions={"pillow": "13.0"}),),
)


def row(key, status="ok"):
    sha256 = key.encode().hex().rjust(64, "0")
    return Row(key=key, size=1, mtime_ns=0, sha256=sha256, status=status, stage=None, reason=None)


def add(folder, number, values, info=INFO):
    """Write a shard with a vector for each key, of two equal numbers; None: a file that failed."""
    rows = [row(key, "failed" if value is None else "ok") for key, value in values.items()]
    vectors = np.array([[value] * 2 for value in values.values() if value is not None], np.float32).reshape(-1, 2)
    write_shard(shard_path(folder, number), info, rows, vectors)


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    write_info(folder, INFO)
    add(folder, 0, {f"{i}.jpg": float(i) for i in range(6)} | {"6.jpg": None, "7.jpg": None})
    return folder


def loaded(folder):
    found = load_embeddings(folder)
    assert (found.vectors[:, 0] == found.vectors[:, 1]).all()
    return dict(zip(found.keys, found.vectors[:, 0].tolist(), strict=True))


def test_beyond_a_million_shards_the_last_one_is_still_the_last(store, tmp_path):
    add(store, 999_999, {"0.jpg": 10.0})
    assert next_number(store, None) == 1_000_000
    add(store, 1_000_000, {"0.jpg": 20.0, "1.jpg": None})
    assert [path.name for path in shard_paths(store)] == [
        "shard-000000.parquet",
        "shard-999999.parquet",
        "shard-1000000.parquet",
    ]
    assert next_number(store, None) == 1_000_001
    assert loaded(store) == {"0.jpg": 20.0, "2.jpg": 2.0, "3.jpg": 3.0, "4.jpg": 4.0, "5.jpg": 5.0}
    write_layout(store, tmp_path / "layout", layout="list")
    table = pq.read_table(tmp_path / "layout")
    assert dict(zip(table["key"].to_pylist(), table["embedding"].to_pylist(), strict=True))["0.jpg"] == [20.0, 20.0]
    assert prune(store, frozenset({"0.jpg"})) == 7
    assert [path.name for path in shard_paths(store)] == ["shard-1000000.parquet"]
    assert loaded(store) == {"0.jpg": 20.0}


def test_the_duckdb_recipe_of_the_documentation_takes_the_row_of_the_last_shard(store):
    import duckdb

    add(store, 999_999, {"0.jpg": 10.0})
    add(store, 1_000_000, {"0.jpg": 20.0})
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    recipe = text.split('duckdb -c "')[1].split('"')[0]
    recipe = recipe.replace("OUT", str(store)).replace("SELECT key, reason", "SELECT key, embedding[1]")
    found = dict(duckdb.sql(recipe).fetchall())
    assert found["0.jpg"] == 20.0
    assert len(found) == 8


@pytest.mark.parametrize("name", ["shard-backup.parquet", "shard-000000 (copy).parquet", "shard-0000000.parquet"])
def test_a_file_that_is_only_named_like_a_shard_is_one_clear_line_everywhere(store, tmp_path, name):
    shutil.copy(shard_path(store, 0), store / name)
    calls = [
        lambda: load_embeddings(store),
        lambda: read_rows(store),
        lambda: prune(store, frozenset()),
        lambda: write_layout(store, tmp_path / "layout"),
        lambda: next_number(store, None),
    ]
    for call in calls:
        with pytest.raises(GateError) as raised:
            call()
        assert str(raised.value) == (
            f"{store / name} is not named as a shard is (shard-000000.parquet and so on); move it out of the store"
        )


def test_a_shard_that_is_a_link_to_nothing_is_no_change_by_a_writer(store, tmp_path):
    shard_path(store, 1).symlink_to(tmp_path / "gone.parquet")
    for call in (load_embeddings, read_rows, Snapshot, lambda folder: write_layout(folder, tmp_path / "layout")):
        with pytest.raises(GateError, match=r"shard-000001\.parquet is a link to something that is not there; make it"):
            call(store)


@pytest.mark.parametrize("name", ["space", "artifact_sha256", "precision", "decode", "runtime"])
def test_a_shard_of_another_identity_is_named_wherever_it_is_met(store, tmp_path, name):
    other = {"decode": "scaled"}.get(name, "another")
    add(store, 1, {"x.jpg": 9.0}, replace(INFO, **{name: other}))
    before = {path: path.read_bytes() for path in shard_paths(store)}
    calls = [
        lambda: load_embeddings(store),
        lambda: load_with_rows(store),
        lambda: read_rows(store),
        lambda: list(iter_columns(store, INFO, ["key"])),
        lambda: locate(store, INFO),
        lambda: read_vectors(shard_path(store, 1), INFO),
        lambda: prune(store, frozenset()),
        lambda: write_layout(store, tmp_path / "layout"),
    ]
    for call in calls:
        with pytest.raises(SpaceError) as raised:
            call()
        assert str(raised.value) == (
            f"{shard_path(store, 1)} holds vectors of another {name.replace('_', ' ')} than store.json says:"
            f" {other}, not {getattr(INFO, name)[:12]}; move it out of the store"
        )
        assert raised.value.exit_code == 4
    assert {path: path.read_bytes() for path in shard_paths(store)} == before


def relabelled(path, changes):
    """Change the metadata of a shard, as another program would write it; None removes an entry."""
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, **{f"mio.{name}".encode(): value for name, value in changes.items()}}
    kept = {name: value for name, value in metadata.items() if value is not None}
    pq.write_table(table.replace_schema_metadata(kept), path)


def test_a_shard_that_says_nothing_of_itself_is_refused(store):
    relabelled(shard_path(store, 0), dict.fromkeys(("space", "artifact_sha256", "precision", "decode", "runtime")))
    with pytest.raises(
        SpaceError, match=r"another space and artifact sha256 and .* than store.json says: none and none and"
    ):
        load_embeddings(store)


def test_only_a_store_of_an_earlier_version_has_shards_that_name_no_runtime(store):
    relabelled(shard_path(store, 0), {"runtime": None})
    with pytest.raises(SpaceError, match=r"another runtime than store.json says: none, not onnxruntime"):
        load_embeddings(store)
    text = json.loads((store / "store.json").read_text()) | {"schema_version": 1}
    del text["spans"]
    (store / "store.json").write_text(json.dumps(text))
    info = read_info(store)
    assert (info.schema_version, info.spans) == (2, (Span(first_shard=0, versions={}),))
    assert loaded(store)["5.jpg"] == 5.0
    relabelled(shard_path(store, 0), {"runtime": b"openvino"})
    with pytest.raises(SpaceError, match=r"another runtime than store.json says: openvino, not onnxruntime"):
        load_embeddings(store)


def meanwhile(monkeypatch, change, *, times):
    """Let something happen each time before a shard is opened, at first so many times."""
    original, left = snapshot_module.opened, [times]

    def opened(*arguments, **options):
        if left[0]:
            left[0] -= 1
            change()
        return original(*arguments, **options)

    monkeypatch.setattr(snapshot_module, "opened", opened)
    monkeypatch.setattr(snapshot_module, "_FIRST_PAUSE_S", 0.001)


@pytest.mark.parametrize("nth", [0, 1])
def test_a_reader_beside_a_prune_gets_rows_that_belong_together(store, monkeypatch, nth):
    calls = iter(range(9))

    def pruning():
        if next(calls) == nth:  # before the keys are read, or between keys and vectors
            prune(store, frozenset(f"{i}.jpg" for i in range(1, 8)))

    meanwhile(monkeypatch, pruning, times=3)
    embeddings, rows = load_with_rows(store)
    assert dict(zip(embeddings.keys, embeddings.vectors[:, 0].tolist(), strict=True)) == {
        f"{i}.jpg": float(i) for i in range(1, 6)
    }
    assert sorted(rows) == [f"{i}.jpg" for i in range(1, 8)]


def test_shards_are_read_by_arrow_alone(store, tmp_path, monkeypatch):
    """Arrow's threads may let go of a Python file only when the interpreter ends, which aborts the process."""
    named = store.rename(tmp_path / os.fsdecode(b"\xff"))
    snapshot = Snapshot(named)

    def never(*_args, **_options):
        raise AssertionError

    monkeypatch.setattr(Path, "open", never)
    rows, vectors = snapshot.read_shard(snapshot.shards[0])
    assert len(rows) == len(vectors) == 8
    assert read_vectors(shard_path(named, 0), INFO)[:6, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_shard_that_is_removed_or_comes_back_as_another_is_noticed(store, monkeypatch):
    add(store, 1, {"x.jpg": 9.0})
    meanwhile(monkeypatch, shard_path(store, 1).unlink, times=1)
    assert "x.jpg" not in loaded(store)


def test_a_reader_of_a_store_that_changes_each_time_gives_up_in_one_line(store, monkeypatch):
    meanwhile(monkeypatch, lambda: add(store, 0, {"0.jpg": 1.0}), times=99)
    with pytest.raises(MioError, match=r"^[^\n]*store changed each time while it was read; once its writer is done"):
        load_embeddings(store)


def test_new_shards_do_not_disturb_a_reader(store, monkeypatch):
    number = iter(range(1, 100))
    meanwhile(monkeypatch, lambda: add(store, next(number), {"0.jpg": 50.0}), times=99)
    assert loaded(store)["0.jpg"] == 0.0
    assert next(number) == 3  # keys and vectors were read once


def test_readers_beside_real_prunes_never_see_another_keys_vector(store, monkeypatch):
    monkeypatch.setattr(snapshot_module, "_FIRST_PAUSE_S", 0.001)
    keep, stop = frozenset(f"{i}.jpg" for i in range(1, 8)), threading.Event()

    def write():
        while not stop.wait(0.005):
            add(store, 0, {f"{i}.jpg": float(i) for i in range(8)})
            prune(store, keep)

    writer = threading.Thread(target=write)
    writer.start()
    num_read = 0
    try:
        for _ in range(20):
            try:
                found = load_embeddings(store)
            except MioError as error:
                assert "changed each time" in str(error)  # noqa: PT017
                continue
            assert found.vectors[:, 0].tolist() == [float(key[0]) for key in found.keys]
            num_read += 1
    finally:
        stop.set()
        writer.join()
    assert num_read


DAMAGE = {
    "no column status": lambda table: table.drop_columns(["status"]),
    "a row has no key": lambda table: table.set_column(0, "key", pa.array([None] * 8, pa.string())),
    r"its embeddings are .*\[1\], must be lists of 2 32-bit floats": lambda table: table.set_column(
        7, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float32)), 1)
    ),
}


def test_a_width_that_no_vector_has_is_one_line(store):
    write_info(store, replace(read_info(store), embedding_dim=2**40))
    with pytest.raises(GateError, match=r"must be lists of 1,099,511,627,776 32-bit floats"):
        load_embeddings(store)


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_shard_is_one_line(store, tmp_path, message):
    path = shard_path(store, 0)
    table = pq.read_table(path)
    pq.write_table(DAMAGE[message](table).replace_schema_metadata(table.schema.metadata), path)
    for call in (lambda: load_embeddings(store), lambda: write_layout(store, tmp_path / "layout")):
        with pytest.raises(GateError, match=rf"^[^\n]*shard-000000.parquet is damaged: [^\n]*{message}[^\n]*$"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim must be 1 or more, got 0"),
        ({"shard_size": -1}, "shard_size must be 1 or more, got -1"),
        ({"decode": "half"}, "decode must be full or scaled, got 'half'"),
        ({"bundle": "a\0b"}, "a name holds a null byte"),
        ({"spans": [{"first_shard": 3, "versions": {}}, {"first_shard": 3, "versions": {}}]}, "spans must begin at 0"),
        ({"spans": [{"first_shard": 0, "versions": {"pillow": 13}}]}, "spans.0.versions.pillow"),
        ({"part": {"index": 3, "count": 2, "num_files": 9, "listing_sha256": ""}}, "part.index must be at most"),
        ({"part": {"index": 1, "count": 0, "num_files": 9, "listing_sha256": ""}}, "part.count must be 1 or more"),
        ({"schema_version": 1e999}, "not the JSON that it should be"),
    ],
)
def test_a_damaged_description_is_one_line(store, changes, message):
    text = json.loads((store / "store.json").read_text()) | changes
    (store / "store.json").write_text(json.dumps(text))
    with pytest.raises(GateError, match=rf"^[^\n]*store.json is damaged: [^\n]*{message}[^\n]*$"):
        load_embeddings(store)


def test_a_description_that_is_nested_without_end_is_one_line(store):
    (store / "store.json").write_text("[" * 100_000)
    with pytest.raises(GateError, match=r"store.json is damaged: not the JSON that it should be"):
        load_embeddings(store)


def test_what_is_no_store_is_said(tmp_path):
    for call in (load_embeddings, read_rows, Snapshot):
        with pytest.raises(UsageError, match=r"is not an embedding store \(it holds no store.json\)"):
            call(tmp_path)


HOLD = """
import sys
from pathlib import Path
from mio_export.store import locked, shared_lock
with (shared_lock if sys.argv[2] == "shared" else locked)(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def held_elsewhere(folder, kind="writing"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_writer_keeps_writers_and_readers_out_and_a_reader_only_writers(store):
    with locked(store):
        pass
    for kind, free in (("writing", ()), ("shared", (shared_lock,))):
        with held_elsewhere(store, kind):
            for lock in (locked, shared_lock):
                if lock in free:
                    with lock(store):
                        pass
                else:
                    with pytest.raises(MioError, match="is being written by another process"), lock(store):
                        pytest.fail("both hold it")
    with locked(store):
        pass


def test_a_lock_on_a_file_that_was_replaced_is_taken_again(store, monkeypatch):
    """Another process exchanges the folder between the opening of the lock file and its locking."""
    import mio_export.store.locking as locking

    original, replaced = locking._lock, []

    def lock(descriptor, folder):
        if not replaced:
            replaced.append((store / ".lock").rename(store / "old"))
        original(descriptor, folder)

    monkeypatch.setattr(locking, "_lock", lock)
    with locked(store):
        monkeypatch.undo()
        with pytest.raises(MioError, match="is being written by another process"), locked(store):
            pytest.fail("two writers")


def test_a_lock_that_is_only_read_makes_no_file(store):
    with shared_lock(store):
        assert sorted(path.name for path in store.iterdir()) == ["shard-000000.parquet", "store.json"]
