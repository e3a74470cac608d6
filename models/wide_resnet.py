"""ResNet-50 with all channels doubled, the 2x form of the self-supervised literature."""

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

_BLOCKS = (3, 4, 6, 3)


class ResNet50x2(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet-50 with every channel count doubled, 94 million parameters without the classifier.

    torchvision's ``wide_resnet50_2`` widens only the middle of each block. Takes normalised pixels (N, 3, H, W) and
    gives logits from features of width 4096.

    Source: Kolesnikov et al. 2019 (arXiv 1901.09005), section 3.1, as used by SimCLR and BYOL.
    """

    def __init__(self) -> None:
        super().__init__(Bottleneck, [1, 1, 1, 1])  # for all that does not depend on the width
        self.inplanes = 128
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        for index, num_blocks in enumerate(_BLOCKS):
            layer = self._make_layer(Bottleneck, 128 * 2**index, num_blocks, stride=1 if index == 0 else 2)
            setattr(self, f"layer{index + 1}", layer)
        self.fc = nn.Linear(1024 * Bottleneck.expansion, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
