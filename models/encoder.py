"""The encoder: uint8 images in, float32 embeddings out."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mio_export.bundle import EncoderSpec
from mio_export.models.backbones import Stem, build_backbone
from mio_export.preprocess import Pixels, Preprocess


class Encoder(nn.Module):
    """A backbone with its decode contract.

    ``forward`` is exactly what is exported: it casts, normalises and embeds, so that a server has nothing to get wrong.

    Args:
        spec: what the encoder is; ``embedding_dim`` must be the backbone's.
        preprocess: the decode contract; its mean and std become constants of the graph.
        backbone: takes normalised pixels (N, C, H, W), gives features (N, D).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, preprocess: Preprocess, backbone: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.preprocess = preprocess
        self.backbone = backbone
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
        return self.embed_pixels(images.permute(0, 3, 1, 2).to(self.mean.dtype))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed float pixels in [0, 255], shape (N, C, H, W); shape (N, D)."""
        features: Tensor = self.backbone((pixels - self.mean) / self.std)
        return F.normalize(features, dim=1) if self.spec.normalize else features

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
            return build_encoder(
                self.spec.backbone, self.preprocess, stem=self.spec.stem, normalize=self.spec.normalize
            )


def build_encoder(
    backbone: str, preprocess: Preprocess, *, stem: Stem = "imagenet", normalize: bool = False
) -> Encoder:
    """Build an encoder with fresh weights from torch's global generator.

    Args:
        backbone: a name that ``build_backbone`` knows.
        preprocess: the decode contract.
        stem: first layers of a torchvision ResNet.
        normalize: divide embeddings by their L2 norm.

    Raises:
        UsageError: the name or the stem is not known.
        MissingBackendError: the name asks for timm, which is not installed.
    """
    built = build_backbone(backbone, channels=preprocess.channels, stem=stem)
    spec = EncoderSpec(backbone=built.name, stem=stem, embedding_dim=built.feature_dim, normalize=normalize)
    return Encoder(spec, preprocess, built.module)
