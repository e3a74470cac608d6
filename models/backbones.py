"""Backbones by name: our small net, the wide ResNet, torchvision's models and timm's, each without its classifier."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from mio_export.errors import MissingBackendError, UsageError
from mio_export.extras import install_command
from mio_export.models.small_net import SmallNet
from mio_export.preprocess import Interpolation

Stem = Literal["imagenet", "small"]
_HEAD_NAMES = ("fc", "classifier", "heads", "head")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A module that takes normalised pixels (N, C, H, W) and gives features (N, feature_dim)."""

    name: str
    """Full name: ``small``, ``resnet50x2``, ``torchvision/NAME`` or ``timm/NAME``."""
    module: nn.Module
    feature_dim: int
    preprocess: dict[str, Any]
    """What its library says of the input: image_size, resize_size, interpolation, mean, std; may be empty."""
    inexpressible: Mapping[str, str] = field(default_factory=dict)
    """What its library's evaluation does that a ``Preprocess`` cannot express, by the library's name for it."""


def build_backbone(name: str, *, channels: int = 3, stem: Stem = "imagenet") -> Backbone:
    """Build a backbone with fresh weights, without its classifier.

    Args:
        name: ``small``, ``resnet50x2``, a torchvision or timm name, or one with its library in front,
            ``timm/vit_tiny_patch16_224``.
        channels: 1 or 3.
        stem: first layers of a torchvision ResNet; ``small`` (3x3, stride 1, padding 1, no max-pool) is for images up
            to about 64 px.

    Raises:
        UsageError: no library knows the name, or it has no such stem.
        MissingBackendError: the name asks for timm, which is not installed.
    """
    library, _, model = name.rpartition("/")
    if library not in ("", "torchvision", "timm"):
        raise UsageError(f"backbone {name!r}: the library must be torchvision or timm, got {library!r}")
    if not library and model == "small":
        return _small(channels, stem)
    if not library and model == "resnet50x2":
        return _resnet50x2(channels, stem)
    if library == "torchvision" or (not library and model in _torchvision_names()):
        return _torchvision(model, channels, stem)
    return _timm(model, channels, stem, asked=library == "timm")


def _small(channels: int, stem: Stem) -> Backbone:
    if stem != "small":
        raise UsageError("backbone 'small' has only the small stem")
    module = SmallNet(channels)
    return Backbone(name="small", module=module, feature_dim=module.feature_dim, preprocess={})


def _resnet50x2(channels: int, stem: Stem) -> Backbone:
    from mio_export.models.wide_resnet import ResNet50x2

    module = ResNet50x2()
    feature_dim = _drop_classifier(module, "resnet50x2")
    if channels != 3 or stem == "small":
        _change_stem(module, "resnet50x2", channels, stem)
    return Backbone(name="resnet50x2", module=module, feature_dim=feature_dim, preprocess={})


def _torchvision_names() -> list[str]:
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def _torchvision(name: str, channels: int, stem: Stem) -> Backbone:
    from torchvision import models

    if name not in _torchvision_names():
        raise UsageError(f"torchvision has no model {name!r}{_nearest(name, _torchvision_names())}")
    module = models.get_model(name, weights=None)
    feature_dim = _drop_classifier(module, name)
    if channels != 3 or stem == "small":
        _change_stem(module, name, channels, stem)
    preset = models.get_model_weights(name)
    preprocess = _torchvision_preprocess(next(iter(preset))) if len(preset) else {}
    return Backbone(name=f"torchvision/{name}", module=module, feature_dim=feature_dim, preprocess=preprocess)


def _torchvision_preprocess(weights: Any) -> dict[str, Any]:
    """What torchvision's first published weights of a model were evaluated with."""
    preset = weights.transforms()
    return {
        "image_size": preset.crop_size[0],
        "resize_size": preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


def _drop_classifier(module: nn.Module, name: str) -> int:
    """Replace the last linear layer of the head by the identity; return the width of what went into it."""
    for head_name in _HEAD_NAMES:
        head = getattr(module, head_name, None)
        linears = (
            []
            if head is None
            else [(path, layer) for path, layer in head.named_modules() if isinstance(layer, nn.Linear)]
        )
        if linears:
            path, layer = linears[-1]
            module.set_submodule(f"{head_name}.{path}" if path else head_name, nn.Identity())
            return layer.in_features
    raise UsageError(f"backbone {name!r} has no linear classifier to take off; choose another")


def _change_stem(module: nn.Module, name: str, channels: int, stem: Stem) -> None:
    from torchvision.models import ResNet

    if not isinstance(module, ResNet):
        raise UsageError(
            f"backbone {name!r} takes three channels and the imagenet stem; use a ResNet, 'small' or timm for others"
        )
    width = module.conv1.out_channels
    if stem == "small":
        module.conv1 = nn.Conv2d(channels, width, 3, stride=1, padding=1, bias=False)
        module.maxpool = nn.Identity()
    else:
        module.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")


def _timm(name: str, channels: int, stem: Stem, *, asked: bool) -> Backbone:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError:
        if asked:
            raise MissingBackendError(f"timm is not installed: {install_command('timm')}") from None
        raise UsageError(
            f"torchvision has no model {name!r}{_nearest(name, _torchvision_names())};"
            f" timm's names need: {install_command('timm')}"
        ) from None
    if not timm.is_model(name):
        names = [*_torchvision_names(), *timm.list_models()]
        raise UsageError(f"neither torchvision nor timm has a model {name!r}{_nearest(name, names)}")
    if stem == "small":
        raise UsageError(f"backbone {name!r} from timm has no small stem")
    module: Any = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    config = resolve_model_data_config(module)
    return Backbone(
        name=f"timm/{name}",
        module=module,
        feature_dim=int(getattr(module, "head_hidden_size", None) or module.num_features),
        preprocess=_timm_preprocess(config),
        inexpressible=_timm_inexpressible(config),
    )


def _timm_inexpressible(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of timm's configuration whose values a ``Preprocess`` has no word for."""
    _, height, width = config["input_size"]
    known = {
        "crop_mode": config.get("crop_mode", "center") == "center",
        "interpolation": config["interpolation"] in get_args(Interpolation),
        "input_size": height == width,
        "crop_pct": 0 < config["crop_pct"] <= 1,
    }
    return {field: str(config.get(field)) for field, is_known in known.items() if not is_known}


def _timm_preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    size, interpolation = config["input_size"][-1], config["interpolation"]
    return {
        "image_size": size,
        "resize_size": int(size / config["crop_pct"]),
        "interpolation": interpolation if interpolation in get_args(Interpolation) else "bicubic",
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" (nearest: {', '.join(close)})" if close else ""
