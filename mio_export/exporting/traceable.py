"""What PyTorch's own formats capture: the encoder, computing in fp32 or bf16, that refuses images of another shape."""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from mio_export.models import Encoder


class Traceable(nn.Module):
    """An encoder to capture.

    ``expand`` leaves the images as they are and puts the sizes of all but the batch dimension into the trace, so that
    an image of another shape is an error there, as it is in ONNX. In bf16 the normalisation stays in float32, since
    8 bits of mantissa do not hold the mean.

    Args:
        encoder: in eval mode, on the CPU; it is copied.
        precision: what backbone and projector compute in.
    """

    def __init__(self, encoder: Encoder, precision: Literal["fp32", "bf16"]) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.shape = encoder.preprocess.shape
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for module in (self.encoder.backbone, self.encoder.projector):
            if module is not None:
                module.to(self.dtype)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Embed uint8 (N, H, W, C) as float32 (N, D)."""
        encoder = self.encoder
        pixels = images.expand(-1, *self.shape).to(encoder.mean.dtype).permute(0, 3, 1, 2)
        return encoder.embed_normalized(((pixels - encoder.mean) / encoder.std).to(self.dtype))
