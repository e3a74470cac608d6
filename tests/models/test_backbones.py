import builtins
import re

import pytest
import torch
from safetensors.torch import save_file

from mio_export.errors import MissingBackendError, UsageError
from mio_export.models import build_backbone, build_encoder
from mio_export.models.weights import encoder_from_weights
from mio_export.preprocess import Preprocess


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnets_have_both_stems_and_one_or_three_channels(name, dim, stem, channels):
    backbone = build_backbone(name, channels=channels, stem=stem)
    features = backbone.module.eval()(torch.zeros(2, channels, 32, 32))
    assert backbone.name == f"torchvision/{name}"
    assert features.shape == (2, dim) == (2, backbone.feature_dim)


def test_the_small_stem_keeps_the_size_of_the_image():
    module = build_backbone("resnet18", stem="small").module
    assert module.conv1(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)  # padded, stride 1
    assert isinstance(module.maxpool, torch.nn.Identity)


@pytest.mark.parametrize(
    "name",
    ["torchvision/mobilenet_v3_small", "torchvision/convnext_tiny", "torchvision/vit_b_16", "torchvision/densenet121"],
)
def test_other_torchvision_models_lose_only_their_classifier(name):
    backbone = build_backbone(name)
    assert backbone.module.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, backbone.feature_dim)
    assert backbone.preprocess["image_size"] == 224


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "timm/resnet10t", "vit_tiny_patch16_224"])
def test_timm_models_lose_only_their_classifier(name):
    backbone = build_backbone(name)
    size = backbone.preprocess["image_size"]
    assert backbone.name == f"timm/{name.removeprefix('timm/')}"
    assert backbone.module.eval()(torch.zeros(1, 3, size, size)).shape == (1, backbone.feature_dim)


@pytest.mark.parametrize("size", [8, 28, 33])
def test_the_small_net_takes_any_size_from_8_px(size):
    backbone = build_backbone("small", channels=1, stem="small")
    assert backbone.module.eval()(torch.zeros(2, 1, size, size)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "neither torchvision nor timm has a model 'resnet19' (nearest: "),
        ("torchvision/resnet19", {}, "torchvision has no model 'resnet19' (nearest: "),
        ("keras/resnet50", {}, "the library must be torchvision or timm, got 'keras'"),
        ("small", {"stem": "imagenet"}, "backbone 'small' has only the small stem"),
        ("torchvision/vit_b_16", {"channels": 1}, "takes three channels and the imagenet stem"),
        ("timm/resnet10t", {"stem": "small"}, "from timm has no small stem"),
        ("torchvision/squeezenet1_0", {}, "has no linear classifier to take off"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        build_backbone(name, **options)


def test_a_missing_timm_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without_timm(name, *arguments, **options):
        if name == "timm":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    with pytest.raises(MissingBackendError, match=re.escape("pip install 'mio-export[timm]'")):
        build_backbone("timm/resnet10t")
    with pytest.raises(UsageError, match=re.escape("torchvision has no model 'resnet10t'")):
        build_backbone("resnet10t")


def test_the_encoder_casts_and_normalises_inside():
    preprocess = Preprocess(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    encoder = build_encoder("small", preprocess, stem="small").eval()
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    normalized = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder(images), encoder.backbone(normalized), rtol=1e-4, atol=1e-5)


def test_an_untrained_twin_has_its_own_weights_and_disturbs_no_generator():
    encoder = build_encoder("small", Preprocess(image_size=16), stem="small")
    state = torch.get_rng_state()
    first, again, other = encoder.untrained(), encoder.untrained(), encoder.untrained(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weight = "backbone.blocks.0.0.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"crop_mode": "squash"}, "crop_mode squash"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"interpolation": "box"}, "interpolation box"),
        ({"input_size": (3, 256, 192)}, r"input_size \(3, 256, 192\)"),
        ({}, None),
    ],
)
def test_a_timm_backbone_whose_input_the_contract_cannot_express_is_refused(changed, found, tmp_path, monkeypatch):
    config = pytest.importorskip("timm.data.config")
    resolve = config.resolve_model_data_config
    monkeypatch.setattr(config, "resolve_model_data_config", lambda module: {**resolve(module), **changed})
    path = tmp_path / "weights.safetensors"
    save_file(dict(build_backbone("timm/test_resnet").module.state_dict()), path)
    if found is None:
        assert encoder_from_weights("timm/test_resnet", path).preprocess.image_size == 160
        return
    message = rf"backbone 'timm/test_resnet' was evaluated with {found}, which the decode contract does not have; \w+"
    with pytest.raises(UsageError, match=message):
        encoder_from_weights("timm/test_resnet", path)
    build_encoder("timm/test_resnet", Preprocess(image_size=160))  # a bundle or a run has its own contract


def test_timms_own_squash_is_found():
    pytest.importorskip("timm")
    assert build_backbone("timm/tf_efficientnetv2_b3").inexpressible == {"crop_mode": "squash"}
    assert build_backbone("timm/test_resnet").inexpressible == {}


def test_an_interpolation_that_is_given_takes_the_place_of_one_that_cannot_be_had(tmp_path, monkeypatch):
    config = pytest.importorskip("timm.data.config")
    resolve = config.resolve_model_data_config
    monkeypatch.setattr(config, "resolve_model_data_config", lambda module: {**resolve(module), "interpolation": "box"})
    path = tmp_path / "weights.safetensors"
    save_file(dict(build_backbone("timm/test_resnet").module.state_dict()), path)
    encoder = encoder_from_weights("timm/test_resnet", path, preprocess={"interpolation": "bicubic"})
    assert encoder.preprocess.interpolation == "bicubic"
