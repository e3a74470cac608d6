import json
import math
import statistics

import numpy as np
import pytest
import torch

from mio_export.bundle import Training, TrainingData
from mio_export.errors import UsageError
from mio_export.metrics import paired_bootstrap
from mio_export.models import build_encoder, save_encoder
from mio_export.preprocess import Preprocess
from mio_export.sample import extract_sample
from mio_export.train import evaluate, evaluate_seeds, seed_runs

BASELINES = ("raw pixels", "PCA", "untrained")


def save_run(folder, seed, *, epoch=4, **recipe):
    """A run whose weights are not those that its seed draws."""
    torch.manual_seed(100 + seed)
    preprocess = Preprocess(image_size=28, channels=1, mean=(0.286,), std=(0.353,))
    training = Training(
        recipe={"objective": "mio", **recipe, "seed": seed},
        data=TrainingData(num_images=300, sha256="0"),
        last={"epoch": epoch},
    )
    save_encoder(folder, build_encoder("small", preprocess, stem="small"), training=training)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    sample, folder = tmp_path_factory.mktemp("sample") / "images", tmp_path_factory.mktemp("few")
    extract_sample(sample)
    for path in sorted(sample.rglob("*.png"))[::12]:
        target = folder / path.relative_to(sample)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 10):
        save_run(folder / f"seed-{seed}", seed)
    return folder


@pytest.fixture(scope="module")
def summary(runs, data):
    return evaluate_seeds(runs, data)


def test_seeds_are_found_by_number_and_a_run_holds_none(runs):
    assert [path.name for path in seed_runs(runs)] == ["seed-0", "seed-1", "seed-10"]
    assert seed_runs(runs / "seed-0") == []


def test_each_seed_is_evaluated_as_it_is_alone(summary, runs, data):
    assert list(summary.evaluations) == ["seed-0", "seed-1", "seed-10"]
    alone = evaluate(runs / "seed-10", data)
    assert alone.to_dict() == summary.evaluations["seed-10"].to_dict()
    for name, evaluation in summary.evaluations.items():
        stored = json.loads((runs / name / "evaluation.json").read_text())
        assert stored["scores"]["trained"]["copy_recall"]["1"] == evaluation.scores["trained"].copy_recall[1]


def test_mean_and_deviation_are_over_the_seeds(summary):
    for row in ("untrained", "trained"):
        values = [evaluation.scores[row].knn[20] for evaluation in summary.evaluations.values()]
        assert len(set(values)) > 1
        spread = summary.spread[row]["kNN (k=20)"]
        assert (spread.mean, spread.deviation) == pytest.approx((np.mean(values), statistics.stdev(values)))
    assert list(summary.spread["trained"]) == ["kNN (k=20)", "copy recall@1", "copy recall@10"]
    assert {spread.deviation for spread in summary.spread["raw pixels"].values()} == {0.0}


def test_intervals_resample_images_and_seeds(summary):
    assert tuple(summary.differences) == BASELINES
    rows = [evaluation.scores for evaluation in summary.evaluations.values()]
    trained = np.stack([scores["trained"].correct for scores in rows])
    for name in BASELINES:
        other = np.stack([scores[name].correct for scores in rows])
        assert summary.differences[name] == paired_bootstrap(trained, other)
        spread = summary.spread["trained"]["kNN (k=20)"].mean - summary.spread[name]["kNN (k=20)"].mean
        assert summary.differences[name].difference == pytest.approx(spread)


def test_one_seed_has_no_deviation(runs, data, tmp_path):
    save_run(tmp_path / "seed-3", 3)
    spread = evaluate_seeds(tmp_path, data).spread["trained"]["copy recall@1"]
    assert math.isnan(spread.deviation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": "minc"},
            r"seed-1 differs from seed-0 in more than the seed \(objective: mio there, minc here\)",
        ),
        ({"epoch": 2}, r"\(epochs done: 4 there, 2 here\); train all seeds alike"),
    ],
)
def test_a_mean_over_unlike_runs_is_refused(tmp_path, data, changes, message):
    save_run(tmp_path / "seed-0", 0)
    save_run(tmp_path / "seed-1", 1, **changes)
    with pytest.raises(UsageError, match=message):
        evaluate_seeds(tmp_path, data)


def test_a_folder_without_seeds_is_refused(tmp_path, data):
    with pytest.raises(UsageError, match="holds no runs named seed-0, seed-1"):
        evaluate_seeds(tmp_path, data)
