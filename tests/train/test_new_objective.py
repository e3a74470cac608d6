import json

import torch.nn.functional as F

from mio_export.sample import read_sample
from mio_export.train import recipe_from_dict, train
from mio_export.train.objectives import Monitor, Objective, Quantity
from mio_export.train.objectives.registry import OBJECTIVES, ObjectiveSpec


class Sharpness(Monitor):
    def measure(self, projections):
        return {"sharpness": float(projections.abs().max())}

    def alarm(self, measures):
        return "too sharp" if measures["sharpness"] > 0 else None


class Hinge(Objective):
    information = Quantity(title="Hinge information", meaning="Should rise.")
    monitored = {"sharpness": Quantity(title="Sharpness of projections", meaning="Should fall.")}  # noqa: RUF012

    def forward(self, projections_0, projections_1):
        return (1 - F.cosine_similarity(projections_0.float(), projections_1.float())).clamp_min(0).mean()

    def mutual_information(self, value, *, num_images):
        return 1 - value + num_images

    def monitor(self):
        return Sharpness()


def test_a_new_objective_is_a_class_and_a_line_of_the_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", ObjectiveSpec(build=Hinge))
    (tmp_path / "data").mkdir()
    for index, image in enumerate(read_sample("train", limit=80)):
        (tmp_path / "data" / f"{index}.png").write_bytes(image)
    recipe = {"objective": "hinge", "epochs": 1, "batch_size": 32, "hidden_dim": 16, "output_dim": 8}
    train(recipe_from_dict(recipe), tmp_path / "data", tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["mutual_information"] == 1 - metrics["loss"] + 32
    assert metrics["sharpness"] > 0
    assert metrics["alarm"] is not None
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Hinge information" in page
    assert "Sharpness of projections" in page
