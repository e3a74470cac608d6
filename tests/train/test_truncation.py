import json
import re
import shutil

import numpy as np
import pytest

from mio_export.errors import UsageError
from mio_export.models import load_encoder, load_projector_encoder
from mio_export.train import evaluate
from mio_export.train.truncation import truncations


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, greys):
    """The same images in two class folders."""
    folder = tmp_path_factory.mktemp("labelled")
    for index, path in enumerate(sorted(greys.iterdir())):
        target = folder / "ab"[index % 2] / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


def test_features_become_the_first_projections(ordered_run):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 1), dtype=np.uint8)
    features = load_encoder(ordered_run).embed(images)
    rows = truncations(ordered_run, (4, 32))
    assert list(rows) == ["first 4 projections", "first 32 projections"]
    for dim, truncate in zip((4, 32), rows.values(), strict=True):
        expected = load_projector_encoder(ordered_run, dim=dim).embed(images)
        np.testing.assert_allclose(truncate(features), expected, rtol=1e-5, atol=1e-6)


def test_the_rows_stand_beside_the_usual_ones_and_are_scored_alike(ordered_run, labelled, mio, tmp_path):
    from mio_export.console.progress import Progress
    from mio_export.metrics import knn_accuracy
    from mio_export.train.data import load_images, open_data

    run = shutil.copytree(ordered_run, tmp_path / "run")
    result = mio("evaluate", run, "--data", labelled, "--dims", "4,16", "--probes", "--json")
    assert result.code == 0, result.err
    scores = json.loads(result.out)["scores"]
    assert list(scores) == ["raw pixels", "PCA", "untrained", "trained", "first 4 projections", "first 16 projections"]
    assert all(row["linear"] is not None and row["copy_recall"] for row in scores.values())
    encoder, split = load_projector_encoder(run, dim=4), open_data(labelled)
    train, test = (load_images(part, encoder.preprocess, Progress()) for part in (split.labelled, split.test))
    expected = knn_accuracy(encoder.embed(train.pixels), train.labels, encoder.embed(test.pixels), test.labels)
    assert scores["first 4 projections"]["knn"] == {str(k): value for k, value in expected.items()}
    plain = evaluate(run, labelled).to_dict()["scores"]
    assert {name: plain[name]["copy_recall"] for name in plain} == {
        name: {int(k): value for k, value in scores[name]["copy_recall"].items()} for name in plain
    }


def test_without_dims_there_is_nothing_more(run_folder):
    assert truncations(run_folder, ()) == {}


@pytest.mark.parametrize("dims", [(4, 33), (0,)])
def test_dims_outside_the_projections_are_refused(ordered_run, labelled, dims):
    message = f"dims must be 1 to 32, the width of the projections of {ordered_run}; got {dims[-1]}"
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate(ordered_run, labelled, dims=dims)


def test_projections_without_an_order_are_refused_whatever_their_number(unordered_run, labelled):
    with pytest.raises(UsageError, match=r"the projections of .* have no order, .*--set loss.ordered=true"):
        evaluate(unordered_run, labelled, dims=(32,))


def test_a_bundle_has_no_dims(bundle, labelled):
    with pytest.raises(UsageError, match="is a bundle; a projection head is kept by the training run"):
        evaluate(bundle.path, labelled, dims=(4,))


def test_dims_are_numbers(mio, ordered_run, labelled):
    result = mio("evaluate", ordered_run, "--data", labelled, "--dims", "4;16")
    assert result.code == 2
    assert result.err == "mio: --dims takes numbers with commas, such as 4,16,64; got '4;16'\n"
