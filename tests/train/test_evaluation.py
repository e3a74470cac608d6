import json

import numpy as np
import pytest
import torch

from mio_export.bundle import Training, TrainingData
from mio_export.models import build_encoder, save_encoder
from mio_export.preprocess import Preprocess
from mio_export.sample import extract_sample
from mio_export.train.evaluation import augmented_copies, evaluate


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "images"
    extract_sample(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    preprocess = Preprocess(image_size=28, channels=1, mean=(0.286,), std=(0.353,))
    data = TrainingData(num_images=5_000, sha256="0")
    training = Training(recipe={"seed": 1}, data=data, last={})
    save_encoder(folder, build_encoder("small", preprocess, stem="small"), training=training)
    return folder


@pytest.fixture(scope="module")
def evaluation(run, sample):
    return evaluate(run, sample)


def test_every_test_image_counts_and_every_baseline_is_there(evaluation):
    assert (evaluation.num_train, evaluation.num_test, evaluation.num_classes) == (5_000, 1_000, 10)
    assert list(evaluation.scores) == ["raw pixels", "PCA", "untrained", "trained"]
    for scores in evaluation.scores.values():
        assert set(scores.knn) == {1, 5, 10, 20, 200}
        assert set(scores.copy_recall) == {1, 10}


def test_raw_pixels_score_what_scikit_learn_says(evaluation, sample):
    from PIL import Image
    from sklearn.neighbors import KNeighborsClassifier

    def read(split):
        paths = sorted((sample / split).rglob("*.png"), key=lambda path: str(path).encode())
        rows = np.stack([np.asarray(Image.open(path)).reshape(-1) for path in paths]).astype(np.float64)
        return rows, [path.parent.name for path in paths]

    classifier = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
    classifier.fit(*read("train"))
    assert evaluation.scores["raw pixels"].knn[20] == pytest.approx(classifier.score(*read("test")), abs=1 / 1000)


def test_it_is_the_same_twice_and_changes_nothing(run, sample, evaluation):
    before = (run / "encoder.safetensors").read_bytes()
    assert evaluate(run, sample).to_dict() == evaluation.to_dict()
    assert (run / "encoder.safetensors").read_bytes() == before


def test_a_run_keeps_its_evaluation(run, evaluation):
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["scores"]["trained"]["knn"]["20"] == evaluation.scores["trained"].knn[20]


def test_without_labels_there_is_copy_retrieval_only(run, sample, tmp_path):
    for index, path in enumerate(sorted((sample / "test").rglob("*.png"))[::10]):
        (tmp_path / f"{index}.png").write_bytes(path.read_bytes())
    evaluation = evaluate(run, tmp_path)
    assert evaluation.num_classes is None
    assert all(scores.knn is None for scores in evaluation.scores.values())
    assert evaluation.scores["trained"].copy_recall[1] > 0.1


def test_the_bank_of_stl10_is_its_labelled_part(run, fake_set):
    evaluation = evaluate(run, fake_set("stl10"))
    assert (evaluation.num_train, evaluation.num_test, evaluation.num_classes) == (40, 20, 10)
    assert evaluation.scores["raw pixels"].knn[1] > 0.8  # the classes are gradients of ten directions


def test_copies_are_fixed_and_keep_the_shape():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 28, 28, 1), dtype=np.uint8)
    first, again = augmented_copies(pixels), augmented_copies(pixels)
    assert first.dtype == np.uint8
    assert first.shape == pixels.shape
    np.testing.assert_array_equal(first, again)
    assert (first != pixels).any(axis=(1, 2, 3)).all()


def test_batch_norm_is_not_touched(run, sample):
    from mio_export.models import load_encoder

    encoder = load_encoder(run).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.embed(np.zeros((4, 28, 28, 1), np.uint8))
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
