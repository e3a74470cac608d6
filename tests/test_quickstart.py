import json

import pytest

import mio_export.quickstart as module
from mio_export.errors import UsageError
from mio_export.quickstart import quickstart
from mio_export.store import load_embeddings
from mio_export.train import recipe_from_dict


@pytest.fixture
def short(monkeypatch):
    """The real quickstart with two epochs instead of thirty-six."""
    monkeypatch.setattr(module, "recipe_from_dict", lambda values: recipe_from_dict({**values, "epochs": 2}))


def test_the_whole_path_and_a_second_run_on_the_same_folder(short, tmp_path):
    result = quickstart(tmp_path / "tour")
    assert result.verification.passed
    assert {report.format for report in result.verification.reports} == {"onnx", "torchscript"}
    assert all(c.num_rows == 1_000 for report in result.verification.reports for c in report.comparisons)
    assert result.embedded.num_ok == 1_000
    manifest = json.loads((tmp_path / "tour" / "sample.mio" / "manifest.json").read_text())
    assert manifest["training"]["data"]["num_images"] == 5_000
    assert manifest["metrics"]["scores"]["trained"]["knn"]["20"] == result.evaluation.scores["trained"].knn[20]
    assert load_embeddings(tmp_path / "tour" / "embeddings").info.space == manifest["space"]
    again = quickstart(tmp_path / "tour")
    assert again.embedded.num_embedded == 0
    assert again.bundle.manifest == result.bundle.manifest
    with pytest.raises(UsageError, match=r"another recipe \(objective: mio there, minc now\)"):
        quickstart(tmp_path / "tour", objective="minc")


def test_somebodys_images_are_safe(short, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists and is not the sample"):
        quickstart(tmp_path)
    assert (tmp_path / "images" / "mine.jpg").exists()
