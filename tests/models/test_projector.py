import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mio_export.bundle import ProjectorSpec
from mio_export.console.progress import Progress
from mio_export.errors import GateError, UsageError
from mio_export.models import build_encoder, load_encoder, load_projector_encoder, save_encoder
from mio_export.preprocess import Preprocess
from mio_export.train.checkpoints import Checkpoints

HEAD = "projection_head.safetensors"


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)


@pytest.fixture
def run(ordered_run, tmp_path):
    return shutil.copytree(ordered_run, tmp_path / "run")


def test_the_projections_are_those_of_the_runs_head(ordered_run, images):
    encoder = load_projector_encoder(ordered_run)
    assert encoder.spec.embedding_dim == 32
    tensors = load_file(ordered_run / HEAD)

    def batch_norm(rows, name):
        mean, variance, scale, shift = (
            tensors[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (rows - mean) / (variance + 1e-5).sqrt() * scale + shift

    features = torch.from_numpy(load_encoder(ordered_run).embed(images))
    hidden = batch_norm(features @ tensors["layers.0.weight"].T, "layers.1").relu()
    expected = batch_norm(hidden @ tensors["layers.3.weight"].T, "layers.4")
    np.testing.assert_allclose(encoder.embed(images), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        load_projector_encoder(ordered_run, dim=8).embed(images), encoder.embed(images)[:, :8]
    )


def test_head_and_encoder_are_the_online_ones_of_the_same_epoch(ordered_run):
    state = Checkpoints(ordered_run).latest(Progress()).state["state_dict"]
    for name, prefix in (("encoder.safetensors", "online.encoder.backbone."), (HEAD, "online.head.")):
        expected = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        stored = load_file(ordered_run / name)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in stored.items()), name


def test_an_encoder_with_a_projector_survives_the_way_to_disk(ordered_run, images, tmp_path):
    encoder = load_projector_encoder(ordered_run, dim=8)
    save_encoder(tmp_path / "saved", encoder)
    loaded = load_encoder(tmp_path / "saved")
    assert loaded.spec == encoder.spec
    np.testing.assert_array_equal(loaded.embed(images), encoder.embed(images))
    own, backbone = (
        load_file(tmp_path / "saved" / "encoder.safetensors"),
        load_file(ordered_run / "encoder.safetensors"),
    )
    head = load_file(ordered_run / HEAD)
    assert own.keys() == backbone.keys() | {f"projector.{name}" for name in head}
    assert all(torch.equal(own[name], tensor) for name, tensor in backbone.items())


def test_the_vectors_are_normalised_after_the_projector(images):
    spec = ProjectorSpec(hidden_dim=16, output_dim=8, num_layers=2, ordered=True, keep=3)
    preprocess = Preprocess(image_size=28, channels=1, mean=(0.5,), std=(0.5,))
    encoder = build_encoder("small", preprocess, stem="small", normalize=True, projector=spec)
    for vectors in (encoder.embed(images), encoder.untrained().embed(images)):
        assert vectors.shape == (5, 3)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_the_untrained_twin_is_where_the_run_began(ordered_run):
    from mio_export.train import recipe_from_dict
    from mio_export.train.module import SelfSupervised

    encoder = load_projector_encoder(ordered_run)
    recipe = recipe_from_dict(json.loads((ordered_run / "encoder.json").read_text())["training"]["recipe"])
    torch.manual_seed(4)
    begun = SelfSupervised(build_encoder("small", encoder.preprocess, stem="small"), recipe, num_batches=1).online
    twin = encoder.untrained(seed=4)
    for module, other in ((begun.encoder.backbone, twin.backbone), (begun.head, twin.projector)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("dim", [0, 33, -1])
def test_a_run_has_no_more_projections_than_it_has(ordered_run, dim):
    message = f"dim must be 1 to 32, the width of the projections of {ordered_run}; got {dim}"
    with pytest.raises(UsageError, match=re.escape(message)):
        load_projector_encoder(ordered_run, dim=dim)


def test_projections_without_an_order_are_taken_whole(unordered_run, images):
    assert load_projector_encoder(unordered_run).embed(images).shape == (5, 32)
    assert load_projector_encoder(unordered_run, dim=32).embed(images).shape == (5, 32)
    with pytest.raises(
        UsageError, match=r"the 32 projections of .* have no order, so that the first 8 are not the best"
    ):
        load_projector_encoder(unordered_run, dim=8)


def test_only_ordered_minc_is_ordered(greys, ordered_run, unordered_run, tmp_path):
    from mio_export.train import recipe_from_dict, train

    train(
        recipe_from_dict({"objective": "minc", "epochs": 1, "hidden_dim": 8, "output_dim": 4}), greys, tmp_path / "run"
    )
    found = [
        json.loads((run / "encoder.json").read_text())["head"]["spec"]["ordered"]
        for run in (ordered_run, unordered_run, tmp_path / "run")
    ]
    assert found == [True, False, False]


def test_what_holds_no_head_is_refused(run_folder, bundle):
    with pytest.raises(UsageError, match=r"holds no projection head \(projection_head.safetensors\); train it again"):
        load_projector_encoder(run_folder)
    with pytest.raises(UsageError, match="is a bundle; a projection head is kept by the training run"):
        load_projector_encoder(bundle.path)


def test_a_changed_head_is_refused_by_name_and_the_backbone_still_loads(run, images):
    path = run / HEAD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match=r"projection_head.safetensors is not the file that was described"):
        load_projector_encoder(run)
    path.unlink()
    with pytest.raises(GateError, match=r"projection_head.safetensors is missing"):
        load_projector_encoder(run)
    assert load_encoder(run).embed(images).shape == (5, 256)


def described_anew(run, **changes):
    """Let the run's description fit its head's file again, with changes of the head's shape."""
    from mio_export.files import sha256_file

    values = json.loads((run / "encoder.json").read_text())
    values["head"]["sha256"] = sha256_file(run / HEAD)
    values["head"]["spec"] |= changes
    (run / "encoder.json").write_text(json.dumps(values))


def test_a_head_that_is_no_head_or_another_one_is_refused_by_name(run):
    described_anew(run, hidden_dim=48)
    with pytest.raises(GateError, match=r"projection_head.safetensors does not fit the head that was described: .*48"):
        load_projector_encoder(run)
    save_file({"layers.0.weight": torch.zeros(2)}, run / HEAD)
    described_anew(run, hidden_dim=64)
    with pytest.raises(GateError, match=r"projection_head.safetensors does not fit the head that was described"):
        load_projector_encoder(run)
    (run / HEAD).write_bytes(b"not tensors")
    described_anew(run)
    with pytest.raises(GateError, match=r"projection_head.safetensors cannot be read"):
        load_projector_encoder(run)
    described_anew(run, keep=99)
    with pytest.raises(GateError, match=r"encoder.json is damaged: keep must be 1 to 32"):
        load_projector_encoder(run)
