import json
import shutil

import numpy as np
import pytest
import torch

from mio_export.bundle import Training, TrainingData
from mio_export.errors import UsageError
from mio_export.models import build_encoder, load_encoder, save_encoder
from mio_export.preprocess import Preprocess
from mio_export.sample import extract_sample
from mio_export.train.data import ImageSet
from mio_export.train.evaluation import augmented_copies, evaluate, evaluate_all, evaluate_encoder


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


def test_every_file_of_the_test_part_is_answered_for(run, sample, tmp_path):
    data, copy = tmp_path / "data", shutil.copytree(run, tmp_path / "run")
    for part in ("train", "test"):
        for index, path in enumerate(sorted((sample / part).rglob("*.png"))[::3]):
            target = data / part / path.parent.name / f"{index}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    target.with_name("broken.png").write_bytes(b"no image")
    evaluation = evaluate(copy, data)
    files = {part: len(list((data / part).rglob("*.png"))) for part in ("train", "test")}
    assert files == {"train": 1_667, "test": 335}  # not whole batches
    assert (evaluation.num_train, evaluation.num_test) == (1_667, 334)
    assert [failure.split(":")[0] for failure in evaluation.failures] == [f"test/{target.parent.name}/broken.png"]
    for scores in evaluation.scores.values():
        assert scores.correct.shape == (334,)
        assert scores.correct.mean() == scores.knn[20]


def test_intervals_lie_around_the_differences_and_are_stored(run, evaluation):
    assert list(evaluation.differences) == ["raw pixels", "PCA", "untrained"]
    for name, interval in evaluation.differences.items():
        expected = evaluation.scores["trained"].knn[20] - evaluation.scores[name].knn[20]
        assert interval.difference == pytest.approx(expected)
        assert interval.low <= interval.difference <= interval.high
        assert 0 < interval.high - interval.low < 0.1 or name == "untrained"
    assert evaluation.differences["untrained"].high == 0  # the weights are those of the seed
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["differences"]["PCA"]["low"] == evaluation.differences["PCA"].low
    assert "correct" not in stored["scores"]["trained"]


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
    assert (run / "encoder.safetensors").read_bytes() == before  # batch norm's statistics included


def test_a_run_keeps_its_evaluation(run, evaluation):
    stored = json.loads((run / "evaluation.json").read_text())
    assert stored["scores"]["trained"]["knn"]["20"] == evaluation.scores["trained"].knn[20]


def test_without_labels_there_is_copy_retrieval_only(run, sample, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    for index, path in enumerate(sorted((sample / "test").rglob("*.png"))[::10]):
        (tmp_path / f"{index}.png").write_bytes(path.read_bytes())
    evaluation = evaluate(run, tmp_path)
    assert evaluation.num_classes is None
    assert evaluation.differences == {}
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


def everything(encoder):
    return {name: value.numpy().tobytes() for name, value in encoder.state_dict().items()}


def test_an_encoder_in_training_comes_back_as_it_was(run):
    rng = np.random.default_rng(0)
    train, test = (
        ImageSet(
            pixels=rng.integers(0, 256, (size, 28, 28, 1), dtype=np.uint8),
            labels=np.arange(size) % 2,
            class_names=("a", "b"),
            keys=tuple(map(str, range(size))),
            sha256="",
            failures=(),
        )
        for size in (60, 30)
    )
    encoder = load_encoder(run).train()
    before = everything(encoder)
    evaluate_encoder(encoder, train, test, probes=True)
    assert all(module.training for module in encoder.modules())
    assert everything(encoder) == before
    with torch.inference_mode():
        encoder(torch.from_numpy(train.pixels))
    assert everything(encoder) != before  # what a forgotten eval() would have done


def test_encoders_that_decode_differently_are_not_scored_together(run, run_folder, sample):
    with pytest.raises(UsageError, match=r"decode images differently; evaluate them one by one"):
        evaluate_all([run, run_folder], sample)


def test_the_device_is_named_and_must_be_there(run, evaluation, sample):
    assert evaluation.device in ("cpu", "cuda")
    with pytest.raises(UsageError, match="device must be auto, cpu, cuda, got 'tpu'"):
        evaluate(run, sample, device="tpu")
