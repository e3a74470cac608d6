import json
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from mio_export.console.progress import Progress
from mio_export.embedding import embed
from mio_export.errors import UsageError
from mio_export.exporting import export
from mio_export.models import load_encoder, load_projector_encoder
from mio_export.parity import EVERYTHING, verify
from mio_export.runtimes import open_runtime
from mio_export.store import load_embeddings

FORMATS = ("onnx", "torchscript")
QUICK = {"formats": ("torchscript",), "limit": 8, "max_batch": 2}


@pytest.fixture(scope="module")
def projected(ordered_run, greys, tmp_path_factory):
    """A bundle that keeps the first 8 of 32 projections."""
    path = tmp_path_factory.mktemp("bundles") / "first8.mio"
    return export(
        ordered_run, path, formats=FORMATS, images=greys, limit=64, max_batch=16, head="projector", dim=8
    ).bundle


def by_hand(run, images):
    """The first 8 projections, from the two files of weights and the contract's mean and std alone."""
    import torch

    from mio_export.models import build_backbone

    backbone = build_backbone("small", channels=1, stem="small").module.eval()
    backbone.load_state_dict(load_file(run / "encoder.safetensors"))
    preprocess = json.loads((run / "encoder.json").read_text())["preprocess"]
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - preprocess["mean"][0]) / preprocess["std"][0]
    tensors = load_file(run / "projection_head.safetensors")

    def batch_norm(rows, name):
        scale = tensors[f"{name}.weight"] / (tensors[f"{name}.running_var"] + 1e-5).sqrt()
        return (rows - tensors[f"{name}.running_mean"]) * scale + tensors[f"{name}.bias"]

    with torch.inference_mode():
        hidden = batch_norm(backbone(pixels) @ tensors["layers.0.weight"].T, "layers.1").relu()
        return batch_norm(hidden @ tensors["layers.3.weight"].T, "layers.4")[:, :8].numpy()


def test_every_artifact_gives_the_first_projections_of_the_runs_head(projected, ordered_run):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    expected = by_hand(ordered_run, images)
    for name in ("onnxruntime", "torchscript", "torch"):
        with open_runtime(projected, name) as runtime:
            vectors = runtime.embed(images)
        assert vectors.shape == (5, 8)
        np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(
        load_encoder(projected.path).embed(images), load_projector_encoder(ordered_run, dim=8).embed(images)
    )


def test_it_is_proved_verified_and_embeds(projected, greys, tmp_path):
    verification = verify(projected.path, images=greys, limit=64, runtimes=EVERYTHING)
    assert verification.passed, verification
    assert len(verification.reports) == 2
    assert embed(projected.path, greys, tmp_path / "out").num_ok == 200
    assert load_embeddings(tmp_path / "out").vectors.shape == (200, 8)


def test_it_is_a_space_of_its_own(projected, ordered_run, greys, tmp_path):
    spaces = {projected.manifest.space}
    for name, options in {"backbone": {}, "all": {"head": "projector"}, "9": {"head": "projector", "dim": 9}}.items():
        result = export(ordered_run, tmp_path / f"{name}.mio", images=greys, **QUICK, **options)
        spaces.add(result.bundle.manifest.space)
    assert len(spaces) == 4


def test_inspect_says_what_the_embedding_is(mio, projected, bundle):
    assert re.search(r"embedding +first 8 of 32 ordered projections\n", mio("inspect", projected.path).out)
    assert re.search(r"embedding +the backbone's features\n", mio("inspect", bundle.path).out)


def test_all_projections_of_any_run_can_be_exported(mio, unordered_run, greys, tmp_path):
    result = mio("export", unordered_run, "--head", "projector", "-o", tmp_path / "all.mio", "--images", greys)
    assert result.code == 0, result.err
    assert "all.mio: 32 dimensions" in result.out
    assert re.search(r"embedding +all 32 projections\n", mio("inspect", tmp_path / "all.mio").out)


class Lines(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def test_the_evaluation_of_the_backbone_is_not_taken_for_that_of_the_projections(ordered_run, greys, tmp_path):
    run = shutil.copytree(ordered_run, tmp_path / "run")
    weights = json.loads((run / "encoder.json").read_text())["weights_sha256"]
    scores = {"weights_sha256": weights, "scores": {"trained": {"knn": None, "copy_recall": {"1": 0.5}}}}
    (run / "evaluation.json").write_text(json.dumps(scores))
    told, options = Lines(), {"images": greys, **QUICK}
    result = export(run, tmp_path / "p.mio", head="projector", progress=told, **options)
    assert result.bundle.manifest.metrics is None
    assert result.bundle.manifest.training.data.num_images == len(list(greys.iterdir())) - held_out(greys)
    assert any("is of the backbone's features, not of projections, and is left out" in line for line in told.lines)
    assert export(run, tmp_path / "b.mio", **options).bundle.manifest.metrics == scores


def held_out(folder):
    from mio_export.train.data import open_data

    return len(open_data(folder).test)


def test_what_does_not_go_together_is_refused(mio, ordered_run, unordered_run, tmp_path):
    out = tmp_path / "x.mio"
    for arguments, message in (
        ([ordered_run, "--dim", 8], "dim 8 is of the projections; give it together with head projector"),
        ([ordered_run, "--head", "predictor"], "head must be backbone or projector, got 'predictor'"),
        ([ordered_run, "--head", "projector", "--dim", 33], "dim must be 1 to 32, the width of the projections of"),
        ([ordered_run, "--head", "projector", "--dim", 0], "got 0"),
        ([unordered_run, "--head", "projector", "--dim", 8], "have no order, so that the first 8 are not the best 8"),
    ):
        result = mio("export", *arguments, "-o", out)
        assert result.code == 2, arguments
        assert message in result.err
        assert len(result.err.splitlines()) == 1
    assert not out.exists()


def test_an_encoder_that_was_brought_along_has_no_projection_head(encoder, tmp_path):
    with pytest.raises(UsageError, match="head projector needs a training run; an encoder from elsewhere"):
        export(encoder, tmp_path / "x.mio", head="projector")
