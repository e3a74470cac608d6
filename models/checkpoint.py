"""An encoder on disk: ``encoder.safetensors`` with its description beside it; no pickle anywhere."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mio_export.bundle import MANIFEST, WEIGHTS, EncoderSpec, Training, load_bundle
from mio_export.errors import GateError, UsageError
from mio_export.files import sha256_file, staged_file, write_text
from mio_export.models.encoder import Encoder, build_encoder
from mio_export.preprocess import Preprocess
from mio_export.schema import parse_json

DESCRIPTION = "encoder.json"
EVALUATION = "evaluation.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """What lies in ``encoder.json`` beside the weights of a training run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    schema_version: int = SCHEMA_VERSION
    encoder: EncoderSpec
    preprocess: Preprocess
    weights_sha256: str
    training: Training | None = None


def save_encoder(folder: Path, encoder: Encoder, *, training: Training | None = None) -> None:
    """Write an encoder's weights and description into a folder; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = save_weights(folder / WEIGHTS, encoder)
    description = Description(
        encoder=encoder.spec, preprocess=encoder.preprocess, weights_sha256=sha256, training=training
    )
    write_text(folder / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")


def save_weights(path: Path, encoder: Encoder) -> str:
    """Write the backbone's tensors, under their own names, as safetensors; return the file's sha256."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    with staged_file(path) as temporary:
        temporary.write_bytes(save(tensors))
    return sha256_file(path)


def load_description(folder: Path) -> Description:
    """Read the description of a training run's encoder.

    Raises:
        UsageError: the folder holds none.
        GateError: it is damaged.
        MioError: it was written by a newer mio-export.
    """
    path = folder / DESCRIPTION
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{folder} is neither a training run nor a bundle (no {DESCRIPTION}, no {MANIFEST})") from None
    return parse_json(text, Description, where=path, newest=SCHEMA_VERSION)


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder of a training run or of a bundle, in eval mode, float32, on the CPU.

    Raises:
        UsageError: there is no run or bundle at ``path``.
        GateError: the weights are not those that the description names.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        manifest = load_bundle(folder).manifest
        spec, preprocess, sha256 = manifest.encoder, manifest.preprocess, manifest.weights_sha256
    else:
        description = load_description(folder)
        spec, preprocess, sha256 = description.encoder, description.preprocess, description.weights_sha256
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise GateError(f"{weights} is missing")
    if sha256_file(weights) != sha256:
        raise GateError(f"{weights} is not the file that was described (its sha256 differs)")
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(spec.backbone, preprocess, stem=spec.stem, normalize=spec.normalize)
    try:
        encoder.backbone.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise GateError(
            f"{weights} does not fit the backbone {spec.backbone}: {' '.join(str(error).split())[:300]}"
        ) from None
    return encoder.eval()
