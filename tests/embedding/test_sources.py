"""The same images out of six kinds of source, in any batches and on any number of threads: the same table."""

import io
import tarfile
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mio_export.embedding import embed
from mio_export.exporting import export
from mio_export.runtimes.onnxruntime import OnnxRuntime
from mio_export.store import load_embeddings, read_rows

OPTIONS = {"runtime": "onnxruntime", "decode": "full"}


def contents(count):
    """Images by key: PNG and JPEG, every tenth a copy, every fiftieth cut off."""
    rng = np.random.default_rng(0)
    files = {}
    for index in range(count):
        suffix, file = ("png", "jpg")[index % 2], io.BytesIO()
        image = rng.integers(0, 256, (20 + index % 7, 24, 3), dtype=np.uint8)
        Image.fromarray(image).save(file, {"png": "PNG", "jpg": "JPEG"}[suffix])
        key, data = f"{'äbc'[index % 3]}/{index:04d}.{suffix}", file.getvalue()
        if index % 10 == 9:
            data = list(files.values())[index // 2]
        files[key] = data[: len(data) // 2] if index % 50 == 25 else data
    return files


def as_folder(files, path):
    for key, data in files.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(data)
    return path


def as_tar(files, path):
    with tarfile.open(path, "w") as tar:
        for key, data in files.items():
            info = tarfile.TarInfo(f"./{key}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_zip(files, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in files.items():
            archive.writestr(key, data)
    return path


def as_parquet(files, path):
    pq.write_table(pa.table({"key": list(files), "image": list(files.values())}), path, row_group_size=100)
    return path


def as_list(files, path):
    as_folder(files, path.parent)
    path.write_text("# images\n" + "".join(f"{key}\n" for key in files))
    return path


def as_url(files, path):
    for key, data in files.items():
        fsspec.filesystem("memory").pipe_file(f"/{path.name}/{key}", data)
    return f"memory://{path.name}"


@pytest.fixture
def memory():
    """The file system in memory, empty again afterwards."""
    yield
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def table(bundle, source, out):
    embed(bundle.path, source, out, shard_size=64, **OPTIONS)
    rows = [(row.key, row.size, row.sha256, row.status, row.stage, row.reason) for row in read_rows(out)]
    return rows, load_embeddings(out).vectors


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_six_sources_of_the_same_images_give_the_same_table(bundle, tmp_path, memory, count):
    files = contents(count)
    sources = {
        "list": as_list(files, tmp_path / "listed" / "images.txt") if (tmp_path / "listed").mkdir() is None else None,
        "tar": as_tar(files, tmp_path / "images.tar"),
        "zip": as_zip(files, tmp_path / "images.zip"),
        "parquet": as_parquet(files, tmp_path / "images.parquet"),
        "url": as_url(files, tmp_path / "images"),
    }
    rows, vectors = table(bundle, as_folder(files, tmp_path / "folder"), tmp_path / "of folder")
    assert {row[3] for row in rows} == {"ok", "duplicate", "failed"}
    assert [row[0] for row in rows] == sorted(files, key=str.encode)
    for name, source in sources.items():
        other_rows, other_vectors = table(bundle, source, tmp_path / f"of {name}")
        assert other_rows == rows, name
        assert np.array_equal(other_vectors, vectors), name


def differences(bundle, folder, tmp_path, monkeypatch, batch_sizes, threads):
    """Return the largest difference of any element from batches of one on one thread."""
    first, worst = None, 0.0
    for num_threads in threads:
        for module in ("embedding.run", "runtimes.onnxruntime"):
            monkeypatch.setattr(f"mio_export.{module}.num_threads", lambda count=num_threads: count)
        for batch_size in batch_sizes:
            out = tmp_path / f"{num_threads}-{batch_size}"
            embed(bundle.path, folder, out, batch_size=batch_size, **OPTIONS)
            vectors = load_embeddings(out).vectors
            first = vectors if first is None else first
            worst = max(worst, float(np.abs(vectors - first).max()))
    print(f"largest difference {worst:.2e}, largest value {np.abs(first).max():.2f}")  # noqa: T201
    return worst


def test_batches_and_threads_do_not_change_vectors(bundle, photos, tmp_path, monkeypatch):
    assert differences(bundle, photos, tmp_path, monkeypatch, (1, 7, 32), (1, 2)) <= 1e-5


@pytest.mark.slow
def test_batches_up_to_64_on_up_to_4_threads_do_not_change_vectors(encoder, photos, tmp_path, monkeypatch):
    bundle = export(encoder, tmp_path / "e.mio", formats=("onnx",), images=photos, max_batch=64).bundle
    folder = as_folder(contents(200), tmp_path / "images")
    assert differences(bundle, folder, tmp_path, monkeypatch, (1, 7, 64), (1, 2, 4)) <= 1e-5


@pytest.mark.slow
def test_of_1000_files_with_600_copies_400_are_computed_and_none_after_renaming(bundle, tmp_path, monkeypatch):
    files = list(contents(1200).values())
    different = list(dict.fromkeys(data for index, data in enumerate(files) if index % 50 != 25))[:400]
    old, new = ({f"{name}{index:04d}.png": different[index % 400] for index in range(1000)} for name in ("a", "z"))
    counted = []
    original = OnnxRuntime._run
    monkeypatch.setattr(
        OnnxRuntime, "_run", lambda self, images: (counted.append(len(images)), original(self, images))[1]
    )
    for files, name, forwards in ((old, "old", 400), (new, "new", 0)):
        counted.clear()
        options = {"cache": tmp_path / "cache", "shard_size": 128, **OPTIONS}
        result = embed(bundle.path, as_folder(files, tmp_path / name), tmp_path / f"of {name}", **options)
        assert (result.num_ok, result.num_duplicates, sum(counted)) == (1000, 600, forwards)
