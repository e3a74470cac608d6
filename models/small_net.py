"""A small convolutional backbone for laptops and small images."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Strided 3x3 convolutions with batch norm and ReLU, then a global average.

    Takes (N, channels, H, W), H and W ≥ 8, and gives features of shape (N, ``feature_dim``).
    """

    def __init__(self, channels: int, *, width: int = 32) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width, 8 * width]
        strides = [1, 2, 2, 2]
        blocks = [_block(i, o, stride) for i, o, stride in zip(widths, widths[1:], strides, strict=False)]
        self.blocks = nn.Sequential(*blocks)
        self.feature_dim = widths[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of normalised pixels."""
        features: Tensor = self.blocks(pixels).mean(dim=(2, 3))
        return features


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
