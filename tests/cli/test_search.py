import json
import shutil
from dataclasses import replace

import pytest

from mio_export.bundle import load_bundle, save_manifest
from mio_export.embedding import embed


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, bundle, photos):
    """A bundle with a store beside it."""
    folder = tmp_path_factory.mktemp("search")
    shutil.copytree(bundle.path, folder / "encoder.mio")
    embed(folder / "encoder.mio", photos, folder / "embeddings")
    return folder


def test_a_photo_of_the_store_comes_first(mio, workplace, photos):
    result = mio("search", workplace / "embeddings", "--image", photos / "flower/12.jpg", "-k", "3")
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines() if line]
    assert lines[1] == ["rank", "key", "cosine"]
    assert lines[3] == ["1", "flower/12.jpg", "1.000000"]
    assert len(lines) == 6


def test_json_holds_rank_key_and_cosine(mio, workplace):
    result = mio("search", workplace / "embeddings", "--key", "flower/12.jpg", "-k", "2", "--json")
    (found,) = json.loads(result.out)["answers"]
    assert found["query"] == "flower/12.jpg"
    assert [near["rank"] for near in found["neighbors"]] == [1, 2]
    assert all(near["key"] != "flower/12.jpg" for near in found["neighbors"])


def test_a_gallery_is_written_and_named(mio, workplace, photos, tmp_path):
    page = tmp_path / "gallery.html"
    result = mio("search", workplace / "embeddings", "--html", page, "--source", photos)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{page}: 24 of 24 images in its grid, ")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_wrong_search_is_one_line_and_its_exit_status(mio, workplace, photos, tmp_path):
    store, image = workplace / "embeddings", photos / "flower/12.jpg"
    other = shutil.copytree(workplace / "encoder.mio", tmp_path / "other.mio")
    save_manifest(other, replace(load_bundle(other).manifest, space="0" * 64))
    for code, arguments in (
        (2, [store]),
        (2, [store, "--key", "flower/99.jpg"]),
        (2, [store, "--image", image, "-k", "0"]),
        (2, [tmp_path, "--image", image]),
        (1, [store, "--image", workplace / "nowhere.jpg"]),
        (4, [store, "--image", image, "--bundle", other]),
    ):
        result = mio("search", *arguments)
        assert result.code == code, (arguments, result)
        assert result.err.startswith("mio: ")
        assert result.err.count("\n") == 1, result.err
