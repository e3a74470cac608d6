import os
import shutil
import tarfile

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from mio_export.embedding import embed
from mio_export.errors import MioError
from mio_export.store import load_embeddings, read_rows


def write_tar(folder, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=".")
    return path


@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz"])
def test_a_tar_gives_the_rows_and_vectors_of_its_folder(bundle, photos, tmp_path, name):
    path = write_tar(photos, tmp_path / name, "w:gz" if name.endswith("gz") else "w")
    embed(bundle.path, photos, tmp_path / "a", runtime="onnxruntime")
    embed(bundle.path, path, tmp_path / "b", runtime="onnxruntime")
    a, b = load_embeddings(tmp_path / "a"), load_embeddings(tmp_path / "b")
    assert a.keys == b.keys
    np.testing.assert_array_equal(a.vectors, b.vectors)
    identities = [[(row.key, row.size, row.sha256) for row in read_rows(tmp_path / out)] for out in ("a", "b")]
    assert identities[0] == identities[1]
    assert embed(bundle.path, str(path), tmp_path / "b").num_embedded == 0


def test_several_sources_go_into_one_store(bundle, photos, tmp_path):
    path = write_tar(photos, tmp_path / "more.tar")
    result = embed(bundle.path, [photos, path], tmp_path / "store")
    assert (result.num_files, result.num_ok) == (48, 48)
    keys = load_embeddings(tmp_path / "store").keys
    assert {key.split("/")[0] for key in keys} == {"photos", "more.tar"}


def test_a_cut_tar_is_embedded_to_the_cut_and_whole_once_it_is_whole(bundle, photos, tmp_path):
    path, out = write_tar(photos, tmp_path / "photos.tar"), tmp_path / "store"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = embed(bundle.path, path, out)
    assert result.num_failed == 1
    assert 5 < result.num_ok < 20
    assert any("what follows is unknown" in note for note in result.notes)
    with pytest.raises(MioError, match=r"nothing is pruned while parts of .* cannot be listed"):
        embed(bundle.path, path, out, prune_vanished=True)
    path.write_bytes(data)
    assert (embed(bundle.path, path, out).num_ok, len(load_embeddings(out).keys)) == (24, 24)


def test_files_of_times_that_no_store_can_hold_are_embedded_once(bundle, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    first, second, *_ = sorted(path for path in folder.rglob("*") if path.is_file())
    os.utime(first, (1, 11_000_000_000))
    os.utime(second, (1, -1))
    assert embed(bundle.path, folder, tmp_path / "store").num_ok == 24
    assert embed(bundle.path, folder, tmp_path / "store").num_embedded == 0


def test_nothing_is_pruned_while_a_folder_behind_a_url_cannot_be_listed(bundle, photos, tmp_path, monkeypatch):
    for name in ("open", "closed"):
        shutil.copytree(photos, tmp_path / "photos" / name)
    source, out, ls = f"local://{tmp_path}/photos", tmp_path / "store", LocalFileSystem.ls

    def partly(self, path, detail=False, **options):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return ls(self, path, detail=detail, **options)

    num_rows = embed(bundle.path, source, out).num_files
    monkeypatch.setattr(LocalFileSystem, "ls", partly)
    with pytest.raises(
        MioError, match=r"nothing is pruned while parts of .* cannot be listed\nclosed: cannot be listed"
    ):
        embed(bundle.path, source, out, prune_vanished=True)
    assert len(read_rows(out)) == num_rows == 48
