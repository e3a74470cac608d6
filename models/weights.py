"""Weights of a backbone that was trained elsewhere: safetensors, or a .pth of plain tensors."""

import pickle
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from mio_export.errors import UsageError, one_line
from mio_export.models.backbones import Backbone, Stem, build_backbone
from mio_export.models.encoder import Encoder, build_encoder
from mio_export.preprocess import preprocess_from_dict

_HEADS = ("fc.", "classifier.", "heads.", "head.", "head_dist.", "aux", "AuxLogits.")
_WRAPPERS = ("module.", "backbone.", "encoder.", "model.")


def encoder_from_weights(
    backbone: str, weights: Path, *, preprocess: dict[str, Any] | None = None, stem: str = "imagenet"
) -> Encoder:
    """Build an encoder from a backbone's name and a file with its weights.

    Args:
        backbone: a torchvision or timm name, or ``small``.
        weights: ``.safetensors``, or ``.pth``/``.pt``/``.bin`` with plain tensors; a classifier in it is left out.
        preprocess: fields of ``Preprocess`` that differ from what the backbone's library evaluates with.
        stem: first layers of a torchvision ResNet.

    Raises:
        UsageError: the file cannot be read as plain tensors, its tensors do not fit the backbone, or the backbone's
            library evaluates with something that ``Preprocess`` cannot express.
    """
    if stem not in get_args(Stem):
        raise UsageError(f"stem must be {' or '.join(get_args(Stem))}, got {stem!r}")
    known_stem = cast(Stem, stem)
    given = dict(preprocess or {})
    for key in {"channels", "image_size"} & given.keys():
        if not isinstance(given[key], int):
            raise UsageError(f"preprocess: {key} must be a whole number, got {given[key]!r}")
    known = build_backbone(backbone, channels=given.get("channels", 3), stem=known_stem)
    _check_expressible(known, given)
    contract = preprocess_from_dict(_with_defaults(known.preprocess, given))
    encoder = build_encoder(known.name, contract, stem=known_stem)
    _load_into(encoder.backbone, read_tensors(weights), weights)
    return encoder.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors without running any code that it may hold.

    Raises:
        UsageError: it is missing, or holds anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UsageError(f"weights {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's remarks on the pickles that it refuses
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UsageError(f"weights {path} cannot be read: {one_line(error, 200)}") from None
    except pickle.UnpicklingError:
        raise UsageError(f"weights {path} hold more than tensors; save the state_dict as .safetensors") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"weights {path} hold more than named tensors; save the state_dict as .safetensors")
    return state


def _check_expressible(backbone: Backbone, given: dict[str, Any]) -> None:
    """Refuse a backbone whose input the contract cannot express, but for what is given in its place."""
    replaced_by = {"interpolation": "interpolation", "input_size": "image_size", "crop_pct": "resize_size"}
    for name, value in backbone.inexpressible.items():
        if replaced_by.get(name) not in given:
            hint = f"; give another with --preprocess {replaced_by[name]}=…" if name in replaced_by else ""
            raise UsageError(
                f"backbone {backbone.name!r} was evaluated with {name} {value}, which the decode contract does not"
                f" have{hint or '; choose another backbone'}"
            )


def _with_defaults(library: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Lay fields over the library's; a new image size scales the resize, one channel averages mean and std."""
    merged = {"image_size": 224, "resize_size": 256, **library}
    if "image_size" in given and "resize_size" not in given:
        merged["resize_size"] = round(given["image_size"] * merged["resize_size"] / merged["image_size"])
    if given.get("channels") == 1:
        merged |= {key: (sum(merged[key]) / len(merged[key]),) for key in ("mean", "std") if key in merged}
        merged = {"mean": (0.5,), "std": (0.5,), **merged}
    return merged | given


def _load_into(backbone: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = backbone.state_dict()
    tensors = _without_wrapper(tensors, set(wanted))
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and not name.startswith(_HEADS)]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in faults.items() if names)
    if found:
        raise UsageError(f"weights {path} do not fit the backbone ({found}); check --backbone, --stem and channels")
    backbone.load_state_dict({name: tensors[name] for name in wanted})


def _without_wrapper(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Strip prefixes such as ``module.`` that a training wrapper put before every name."""
    best = tensors
    for prefix in _WRAPPERS:
        stripped = {name.removeprefix(prefix): value for name, value in best.items() if name.startswith(prefix)}
        if len(wanted & stripped.keys()) > len(wanted & best.keys()):
            best = stripped
    return best
