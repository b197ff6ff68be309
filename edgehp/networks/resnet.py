"""ResNet backbones in torch with torchvision's parameter names (He et al., arXiv 1512.03385)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgehp.networks.layout import BatchNorm, Block, feature_count, resnet_blocks, stem


def _layer(c: BatchNorm) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    cout, cin, kernel, _ = c.shape
    convolution = nn.Conv2d(cin, cout, kernel, c.stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(cout)


class _Block(nn.Module):
    """Convolutions and a skip: two of 3x3, or the bottleneck's three."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.count = len(block.convolutions)
        for n, c in enumerate(block.convolutions, 1):
            convolution, norm = _layer(c)
            setattr(self, f"conv{n}", convolution)
            setattr(self, f"bn{n}", norm)
        self.relu = nn.ReLU(inplace=True)
        down = block.downsample
        self.downsample = None if down is None else nn.Sequential(*_layer(down))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, cin, H, W] to [N, cout, H / stride, W / stride]."""
        y = x
        for n in range(1, self.count + 1):
            y = getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(y))
            if n < self.count:
                y = self.relu(y)
        skip = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + skip)
        return out


class ResNet(nn.Module):
    """A ResNet without its classifier: images [N, 3, H, W] to features [N, features].

    Args:
        depth: 18, 34, 50, 101 or 152.

    Attributes:
        features: width of the output, 512 or 2048.
    """

    def __init__(self, depth: int = 18) -> None:
        super().__init__()
        self.conv1, self.bn1 = _layer(stem())
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages: dict[str, list[nn.Module]] = {}
        for block in resnet_blocks(depth):
            stages.setdefault(block.name.partition(".")[0], []).append(_Block(block))
        for name, blocks in stages.items():
            setattr(self, name, nn.Sequential(*blocks))
        self.features = feature_count(depth)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, features] of normalised images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
