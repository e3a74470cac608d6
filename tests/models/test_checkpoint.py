import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mio_export.errors import GateError, MioError, UsageError
from mio_export.models import build_encoder, encoder_from_weights, load_encoder, save_encoder
from mio_export.models.weights import read_tensors
from mio_export.preprocess import Preprocess


@pytest.fixture
def small():
    torch.manual_seed(3)
    return build_encoder("small", Preprocess(image_size=16), stem="small", normalize=True).eval()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_an_encoder_survives_the_way_to_disk(small, images, tmp_path):
    save_encoder(tmp_path / "run", small)
    loaded = load_encoder(tmp_path / "run")
    assert (loaded.spec, loaded.preprocess) == (small.spec, small.preprocess)
    np.testing.assert_array_equal(loaded.embed(images), small.embed(images))


def test_the_same_encoder_has_the_same_bytes(small, tmp_path):
    for name in ("a", "b"):
        save_encoder(tmp_path / name, small)
    for name in ("encoder.safetensors", "encoder.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_bundle_gives_its_encoder_back(bundle, encoder):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_encoder(bundle.path).embed(images), encoder.embed(images))


def test_changed_weights_are_refused(small, tmp_path):
    save_encoder(tmp_path, small)
    path = tmp_path / "encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(GateError, match="is not the file that was described"):
        load_encoder(tmp_path)
    path.unlink()
    with pytest.raises(GateError, match="is missing"):
        load_encoder(tmp_path)


def test_a_damaged_or_newer_description_is_refused(small, tmp_path):
    save_encoder(tmp_path, small)
    path = tmp_path / "encoder.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema_version": 2}))
    with pytest.raises(MioError, match="has schema version 2, this mio-export reads up to 1"):
        load_encoder(tmp_path)
    path.write_text(json.dumps({**values, "training": {"recipe": dict.fromkeys(map(str, range(99)))}}))
    with pytest.raises(GateError, match=r"is damaged: training.data: Field required") as caught:
        load_encoder(tmp_path)
    assert len(str(caught.value)) < 300
    path.write_text(json.dumps({**values, "extra": 1}))
    with pytest.raises(GateError, match="is damaged: extra"):
        load_encoder(tmp_path)
    path.write_text("{")
    with pytest.raises(GateError, match="is damaged"):
        load_encoder(tmp_path)
    with pytest.raises(UsageError, match="is neither a training run nor a bundle"):
        load_encoder(tmp_path / "nowhere")


def states():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    whole = {key: value.contiguous() for key, value in resnet18().state_dict().items()}
    headless = {key: value for key, value in whole.items() if not key.startswith("fc.")}
    return {
        "whole.safetensors": whole,
        "headless.safetensors": headless,
        "whole.pth": whole,
        "wrapped.pth": {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in whole.items()}},
        "backbone.pth": {f"backbone.{key}": value for key, value in headless.items()},
    }


@pytest.mark.parametrize("name", states())
def test_weights_are_read_as_people_save_them(name, tmp_path):
    state = states()[name]
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    encoder = encoder_from_weights("resnet18", path, preprocess={"image_size": 64})
    expected = states()["whole.safetensors"]["layer4.1.conv2.weight"]
    assert torch.equal(encoder.backbone.state_dict()["layer4.1.conv2.weight"], expected)
    assert (encoder.preprocess.image_size, encoder.preprocess.resize_size) == (64, 73)


class Evil:
    def __reduce__(self):
        return (print, ("a pickle was run",))


def test_no_pickle_is_run(tmp_path, capsys):
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(UsageError, match="hold more than tensors"):
            read_tensors(tmp_path / name)
    assert "a pickle was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.safetensors", None, "do not exist"),
        ("text.safetensors", b"not tensors", "cannot be read"),
        ("empty.safetensors", b"", "cannot be read"),
        ("empty.pth", b"", "cannot be read"),
    ],
)
def test_files_that_hold_no_tensors_are_refused(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_tensors(tmp_path / name)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    state = states()["whole.safetensors"]
    del state["layer1.0.conv1.weight"]
    state["conv1.weight"] = state["conv1.weight"][:, :1].contiguous()
    state["stray"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    message = r"1 missing: layer1.0.conv1.weight; 1 unexpected: stray; 1 of another shape: conv1.weight"
    with pytest.raises(UsageError, match=message):
        encoder_from_weights("resnet18", tmp_path / "w.safetensors")
