"""What one image can do to the others of a run: nothing, whether its embedding overflows or memory ends at it."""

import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mio_export.decoding import Decoder
from mio_export.embedding.pipeline import Embedder, StageTimer
from mio_export.embedding.run import embed
from mio_export.errors import OutOfMemoryError
from mio_export.preprocess import Preprocess
from mio_export.runtimes import open_runtime
from mio_export.runtimes.onnxruntime import OnnxRuntime
from mio_export.sources import list_images
from mio_export.store import load_embeddings, read_rows

OPTIONS = {"runtime": "onnxruntime", "decode": "full", "batch_size": 8}
NOT_FINITE = "its embedding has NaN or infinite values, computed alone too"


@pytest.fixture
def some(photos, tmp_path):
    """Twelve photos in one folder, two of which have the same bytes as another each."""
    folder = tmp_path / "some"
    folder.mkdir()
    for path in sorted(photos.glob("temple/*.jpg"))[:10]:
        shutil.copy(path, folder / path.name)
    shutil.copy(folder / "03.jpg", folder / "03-again.jpg")
    shutil.copy(folder / "03.jpg", folder / "99.jpg")
    return folder


@pytest.fixture
def poisoned(bundle, some, monkeypatch):
    """Make the embedding of 03.jpg overflow; and, in a batch with it, every other image's too."""
    pixels = bundle.manifest.preprocess.decode((some / "03.jpg").read_bytes())
    run = OnnxRuntime._run

    def overflowing(self, images):
        vectors = run(self, images)
        return np.full_like(vectors, np.nan) if any((image == pixels).all() for image in images) else vectors

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRuntime, "_run", overflowing)
        yield patch


def fates(out):
    return {row.key: (row.status, row.stage, row.reason) for row in read_rows(out)}


@pytest.mark.parametrize("shard_size", [3, 4096])
def test_an_image_whose_embedding_is_not_finite_fails_alone(bundle, some, tmp_path, poisoned, shard_size):
    result = embed(bundle.path, some, tmp_path / "out", shard_size=shard_size, **OPTIONS)
    assert (result.num_files, result.num_failed, result.num_duplicates) == (12, 3, 0)
    failed = {key: fate for key, fate in fates(tmp_path / "out").items() if fate[0] == "failed"}
    assert failed == dict.fromkeys(("03.jpg", "03-again.jpg", "99.jpg"), ("failed", "embed", NOT_FINITE))
    poisoned.undo()
    embed(bundle.path, some, tmp_path / "sound", **OPTIONS)
    sound, found = load_embeddings(tmp_path / "sound"), load_embeddings(tmp_path / "out")
    kept = [sound.keys.index(key) for key in found.keys]
    np.testing.assert_allclose(found.vectors, sound.vectors[kept], atol=1e-5)


def test_a_failed_embedding_is_tried_again_when_that_is_asked_for(bundle, some, tmp_path, poisoned):
    out = tmp_path / "out"
    embed(bundle.path, some, out, cache=tmp_path / "cache", **OPTIONS)
    assert embed(bundle.path, some, out, **OPTIONS).num_embedded == 0
    (cache,) = (tmp_path / "cache").glob("*.sqlite")
    assert sqlite3.connect(cache).execute("SELECT count(*) FROM vectors").fetchone() == (9,)
    poisoned.undo()
    result = embed(bundle.path, some, out, cache=tmp_path / "cache", retry_failed=True, **OPTIONS)
    assert (result.num_embedded, result.num_failed, result.num_duplicates) == (3, 0, 2)
    assert np.isfinite(load_embeddings(out).vectors).all()


def test_a_passing_lack_of_memory_is_nobodys_fault(bundle, some, tmp_path, monkeypatch):
    decode, refused = Preprocess.decode, []

    def scarce(self, data, *, scaled=False):
        if len(refused) < 5:
            refused.append(data)
            raise MemoryError
        return decode(self, data, scaled=scaled)

    monkeypatch.setattr(Preprocess, "decode", scarce)
    result = embed(bundle.path, some, tmp_path / "out", **OPTIONS)
    assert len(refused) == 5
    assert (result.num_failed, result.num_files) == (0, 12)


def test_a_lasting_lack_of_memory_stops_the_run_by_the_files_name_and_the_run_resumes(
    bundle, some, tmp_path, monkeypatch, mio
):
    decode, large = Preprocess.decode, (some / "08.jpg").read_bytes()

    def scarce(self, data, *, scaled=False):
        if data == large:
            raise MemoryError
        return decode(self, data, scaled=scaled)

    command = ("embed", bundle.path, some, "-o", tmp_path / "out", "--runtime", "onnxruntime", "--decode", "full")
    with monkeypatch.context() as patch:
        patch.setattr(Preprocess, "decode", scarce)
        result = mio(*command, "--shard-size", 4)
    assert result.code == 1
    assert "not enough memory to read and decode 08.jpg, though it was tried alone" in result.err
    assert len(fates(tmp_path / "out")) == 8
    assert mio(*command).code == 0
    assert {fate[0] for fate in fates(tmp_path / "out").values()} == {"ok", "duplicate"}


def test_a_file_that_is_tried_again_for_memory_is_alone(bundle, photos, monkeypatch):
    files, active, tried_again = list_images(photos).files, [], []
    decode = Preprocess.decode
    first = files[0].read()[0]

    def scarce(self, data, *, scaled=False):
        active.append(data)
        try:
            if data == first:
                tried_again.append(len(active))
                if len(tried_again) == 1:
                    raise MemoryError
            return decode(self, data, scaled=scaled)
        finally:
            active.remove(data)

    monkeypatch.setattr(Preprocess, "decode", scarce)
    with open_runtime(bundle, "onnxruntime") as runtime, ThreadPoolExecutor(4) as pool:
        embedder = Embedder(runtime, Decoder(bundle.manifest.preprocess), pool, batch_size=4, timer=StageTimer())
        found = embedder.embed(files)
    assert len(tried_again) == 2
    assert tried_again[1] == 1
    assert {row.status for row in found.rows} == {"ok"}
    assert [row.key for row in found.rows] == [file.key for file in files]


def test_a_batch_that_a_runtime_has_no_memory_for_is_embedded_image_by_image(bundle, photos, tmp_path, monkeypatch):
    run = OnnxRuntime._run

    def scarce(self, images):
        if len(images) > 1:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1073741824")
        return run(self, images)

    embed(bundle.path, photos, tmp_path / "a", **OPTIONS)
    monkeypatch.setattr(OnnxRuntime, "_run", scarce)
    assert embed(bundle.path, photos, tmp_path / "b", **OPTIONS).num_failed == 0
    a, b = load_embeddings(tmp_path / "a"), load_embeddings(tmp_path / "b")
    np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-5)


def test_an_image_that_a_runtime_has_no_memory_for_is_named(bundle, photos, tmp_path, monkeypatch):
    def scarce(self, images):
        raise RuntimeError("bad allocation")

    monkeypatch.setattr(OnnxRuntime, "_run", scarce)
    with pytest.raises(OutOfMemoryError, match=r"not enough memory to embed flower/12\.jpg, though it was tried alone"):
        embed(bundle.path, photos, tmp_path / "out", **OPTIONS)
