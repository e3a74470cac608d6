"""The encoder: uint8 images in, float32 embeddings out."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mio_export.bundle import EncoderSpec, ProjectorSpec
from mio_export.models.backbones import Stem, build_backbone
from mio_export.models.projection_head import build_projector
from mio_export.preprocess import Pixels, Preprocess


class Encoder(nn.Module):
    """A backbone, and a projector where one was asked for, with its decode contract.

    ``forward`` is exactly what is exported: it casts, normalises and embeds, so that a server has nothing to get wrong.

    Args:
        spec: what the encoder is; ``embedding_dim`` must be the backbone's, or what the projector keeps.
        preprocess: the decode contract; its mean and std become constants of the graph.
        backbone: takes normalised pixels (N, C, H, W), gives features (N, F).
        projector: takes features, gives projections of shape (N, ``spec.projector.output_dim``); None if the spec has
            none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: EncoderSpec, preprocess: Preprocess, backbone: nn.Module, projector: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = preprocess
        self.backbone = backbone
        self.projector = projector
        shape = (1, preprocess.channels, 1, 1)
        self.register_buffer("mean", 255 * torch.tensor(preprocess.mean).view(shape), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(preprocess.std).view(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: uint8, shape (N, H, W, C) as ``preprocess.shape`` says.

        Returns:
            Embeddings, float32, shape (N, D).
        """
        # cast first: TensorRT transposes no uint8
        return self.embed_pixels(images.to(self.mean.dtype).permute(0, 3, 1, 2))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed float pixels in [0, 255], shape (N, C, H, W); shape (N, D)."""
        return self.embed_normalized((pixels - self.mean) / self.std)

    def embed_normalized(self, pixels: Tensor) -> Tensor:
        """Embed pixels that mean and std were applied to, shape (N, C, H, W), in the backbone's dtype; shape (N, D)."""
        embeddings: Tensor = self.backbone(pixels)
        if self.projector is not None and self.spec.projector is not None:
            embeddings = self.projector(embeddings)[:, : self.spec.projector.keep]
        embeddings = embeddings.to(self.mean.dtype)
        return F.normalize(embeddings, dim=1) if self.spec.normalize else embeddings

    @torch.inference_mode()
    def embed(self, images: Pixels, *, batch_size: int = 256) -> npt.NDArray[np.float32]:
        """Embed a uint8 array of shape (N, H, W, C) in eval mode; float32, shape (N, D)."""
        was_training = self.training
        self.eval()
        try:
            batches = torch.from_numpy(images).split(batch_size)
            embeddings = [self(batch.to(self.mean.device)).float().cpu() for batch in batches]
            return torch.cat(embeddings).numpy()
        finally:
            self.train(was_training)

    def untrained(self, *, seed: int = 0) -> "Encoder":
        """Return the same encoder with fresh weights, drawn from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return encoder_from_spec(self.spec, self.preprocess)


def encoder_from_spec(spec: EncoderSpec, preprocess: Preprocess) -> Encoder:
    """Build the encoder that a spec describes, with fresh weights from torch's global generator."""
    return build_encoder(spec.backbone, preprocess, stem=spec.stem, normalize=spec.normalize, projector=spec.projector)


def build_encoder(
    backbone: str,
    preprocess: Preprocess,
    *,
    stem: Stem = "imagenet",
    normalize: bool = False,
    projector: ProjectorSpec | None = None,
) -> Encoder:
    """Build an encoder with fresh weights from torch's global generator.

    Args:
        backbone: a name that ``build_backbone`` knows.
        preprocess: the decode contract.
        stem: first layers of a torchvision ResNet.
        normalize: divide embeddings by their L2 norm.
        projector: a projection head to put after the backbone.

    Raises:
        UsageError: the name or the stem is not known.
        MissingBackendError: the name asks for timm, which is not installed.
    """
    built = build_backbone(backbone, channels=preprocess.channels, stem=stem)
    spec = EncoderSpec(
        backbone=built.name,
        stem=stem,
        embedding_dim=projector.keep if projector else built.feature_dim,
        normalize=normalize,
        projector=projector,
    )
    head = build_projector(built.feature_dim, projector) if projector else None
    return Encoder(spec, preprocess, built.module, head)
