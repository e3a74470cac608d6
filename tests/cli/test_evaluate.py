import hashlib
import json
import re
import shutil

import pytest

COLUMNS = ["kNN (k=20)", "copy recall@1", "copy recall@10"]


@pytest.fixture
def runs(run_folder, tmp_path):
    for seed in (0, 1):
        shutil.copytree(run_folder, tmp_path / "runs" / f"seed-{seed}")
    return tmp_path / "runs"


def weights(folder):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("encoder.safetensors"))]


def test_a_run_is_a_table_and_its_weights_stay(mio, runs, photos):
    before = weights(runs)
    result = mio("evaluate", runs / "seed-0", "--data", photos, "--probes", "--device", "cpu")
    assert result.code == 0, result.err
    header = re.split(r"  +", result.out.splitlines()[2].strip())
    assert header == [COLUMNS[0], "linear", "SGD", "1-shot", "5-shot", "10-shot", *COLUMNS[1:]]
    assert [line.split("  ")[1] for line in result.out.splitlines()[4:8]] == [
        "raw pixels",
        "PCA",
        "untrained",
        "trained",
    ]
    assert weights(runs) == before
    assert not (runs / "seed-1" / "evaluation.json").exists()


def test_seeds_are_a_table_of_means_and_one_of_intervals(mio, runs, photos):
    before = weights(runs)
    result = mio("evaluate", runs, "--data", photos)
    assert result.code == 0, result.err
    assert "seeds 0, 1: mean ± deviation" in result.out
    assert re.search(r"raw pixels +\d+\.\d % +\d", result.out)
    assert re.search(r"trained +\d+\.\d ± 0\.0 % ", result.out)  # equal weights: no deviation
    assert re.search(r"95 % paired bootstrap.*\n +difference +from +to\n", result.out)
    assert len(re.findall(r"^  (?:raw pixels|PCA|untrained) +[+-]\d+\.\d +[+-]\d+\.\d +[+-]\d", result.out, re.M)) == 3
    assert weights(runs) == before


def test_seeds_are_json_too(mio, runs, photos):
    values = json.loads(mio("evaluate", runs, "--data", photos, "--json").out)
    assert list(values["evaluations"]) == ["seed-0", "seed-1"]
    assert values["evaluations"]["seed-1"] == {
        key: value
        for key, value in json.loads((runs / "seed-1" / "evaluation.json").read_text()).items()
        if key != "schema_version" and not key.endswith("sha256")  # which are of the file
    }
    assert set(values["spread"]["trained"]["kNN (k=20)"]) == {"mean", "deviation"}
    assert set(values["differences"]["untrained"]) == {"difference", "low", "high"}


def test_a_folder_that_holds_neither_is_named(mio, tmp_path, photos):
    result = mio("evaluate", tmp_path, "--data", photos)
    assert result.code == 2
    assert "is neither a training run nor a bundle" in result.err
