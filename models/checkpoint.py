"""An encoder on disk: ``encoder.safetensors`` with its description beside it; no pickle anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mio_export.bundle import MANIFEST, WEIGHTS, EncoderSpec, ProjectorSpec, Training, load_bundle
from mio_export.errors import GateError, UsageError, one_line
from mio_export.files import sha256_file, staged_file
from mio_export.models.encoder import Encoder, encoder_from_spec
from mio_export.models.projection_head import build_projector
from mio_export.preprocess import Preprocess
from mio_export.schema import parse_json, strict, write_json

DESCRIPTION = "encoder.json"
EVALUATION = "evaluation.json"
EVALUATION_SCHEMA_VERSION = 1
"""Of ``evaluation.json``; one of before there was a version is of version 1."""
HEAD_WEIGHTS = "projection_head.safetensors"
SCHEMA_VERSION = 1
_PROJECTOR = "projector."
"""What the names of a projector's tensors begin with; the backbone's tensors have their own names."""


@strict
@dataclass(frozen=True, kw_only=True)
class StoredHead:
    """The projection head that a training run keeps beside its encoder."""

    spec: ProjectorSpec
    """All of its projections are kept."""
    sha256: str
    """Hash of ``projection_head.safetensors``."""


@strict
@dataclass(frozen=True, kw_only=True)
class Description:
    """What lies in ``encoder.json`` beside the weights of a training run."""

    schema_version: int = SCHEMA_VERSION
    encoder: EncoderSpec
    preprocess: Preprocess
    weights_sha256: str
    head: StoredHead | None = None
    """None if there is an encoder and no head."""
    training: Training | None = None


def save_encoder(
    folder: Path, encoder: Encoder, *, training: Training | None = None, head: StoredHead | None = None
) -> None:
    """Write an encoder's weights and description into a folder; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = save_weights(folder / WEIGHTS, encoder)
    description = Description(
        encoder=encoder.spec, preprocess=encoder.preprocess, weights_sha256=sha256, head=head, training=training
    )
    write_json(folder / DESCRIPTION, description)


def save_head(folder: Path, head: nn.Module, spec: ProjectorSpec) -> StoredHead:
    """Write a projection head's weights into a folder; return what ``save_encoder`` puts into the description."""
    return StoredHead(spec=spec, sha256=_save_tensors(folder / HEAD_WEIGHTS, head.state_dict()))


def save_weights(path: Path, encoder: Encoder) -> str:
    """Write an encoder's tensors as safetensors; return the file's sha256.

    The backbone's tensors are under their own names, a projector's under ``projector.`` and theirs.
    """
    return _save_tensors(
        path, {name.removeprefix("backbone."): tensor for name, tensor in encoder.state_dict().items()}
    )


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

    That of a run is its backbone; that of a bundle has a projector if it was exported with one.

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
    with torch.random.fork_rng(devices=[]):
        encoder = encoder_from_spec(spec, preprocess)
    tensors = _load_tensors(folder / WEIGHTS, sha256)
    names = {name: name if spec.projector and name.startswith(_PROJECTOR) else f"backbone.{name}" for name in tensors}
    _fill(
        encoder,
        {names[name]: tensor for name, tensor in tensors.items()},
        f"{folder / WEIGHTS} does not fit the backbone {spec.backbone}",
    )
    return encoder.eval()


def load_projector_encoder(run: str | Path, *, dim: int | None = None) -> Encoder:
    """Load a training run's encoder with its projection head as the projector, so that it embeds as projections.

    Args:
        run: the run's folder.
        dim: K, keep the first K projections, which is for ordered ones only; None keeps all.

    Returns:
        An encoder in eval mode, float32, on the CPU, with embeddings of shape (N, K).

    Raises:
        UsageError: there is no run or no head at ``run``, or ``dim`` is not allowed.
        GateError: the weights are not those that the description names.
    """
    folder = Path(run)
    if (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is a bundle; a projection head is kept by the training run that it came from")
    stored = load_description(folder).head
    if stored is None:
        raise UsageError(f"{folder} holds no projection head ({HEAD_WEIGHTS}); train it again to have one")
    projector = replace(stored.spec, keep=_checked_dim(folder, stored.spec, dim))
    encoder = load_encoder(folder)
    with torch.random.fork_rng(devices=[]):
        head = build_projector(encoder.spec.embedding_dim, projector)
    path = folder / HEAD_WEIGHTS
    _fill(head, _load_tensors(path, stored.sha256), f"{path} does not fit the head that was described")
    spec = replace(encoder.spec, embedding_dim=projector.keep, projector=projector)
    return Encoder(spec, encoder.preprocess, encoder.backbone, head).eval()


def _checked_dim(run: Path, spec: ProjectorSpec, dim: int | None) -> int:
    """Return how many projections to keep; a part of them only where the first ones are the leading ones."""
    if dim is None:
        return spec.output_dim
    if not 1 <= dim <= spec.output_dim:
        raise UsageError(f"dim must be 1 to {spec.output_dim}, the width of the projections of {run}; got {dim}")
    if dim < spec.output_dim and not spec.ordered:
        raise UsageError(
            f"the {spec.output_dim} projections of {run} have no order, so that the first {dim} are not the best {dim}"
            "; leave dim out, or train with --objective minc --set loss.ordered=true"
        )
    return dim


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors as safetensors, whole or not at all; return the file's sha256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with staged_file(path) as temporary:
        temporary.write_bytes(save(plain))
    return sha256_file(path)


def _load_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read named tensors from the very file that was described."""
    if not path.is_file():
        raise GateError(f"{path} is missing")
    if sha256_file(path) != sha256:
        raise GateError(f"{path} is not the file that was described (its sha256 differs)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise GateError(f"{path} cannot be read: {error}") from None


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], misfit: str) -> None:
    """Put tensors into a module; all of it and nothing else, or a GateError that begins with ``misfit``."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise GateError(f"{misfit}: {one_line(error)}") from None
