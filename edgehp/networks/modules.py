"""The networks in torch, with the parameter names of `edgehp.networks.layout`.

KD-ResNet of Sheka & Samun (arXiv 2108.09183), its training-time base, and EHPNet of Thai et al.
(arXiv 2210.13705), all on ResNets with torchvision's names (He et al., arXiv 1512.03385). The names
of KD-ResNet are those of the authors' published checkpoints, so that such a file loads unchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgehp.networks.layout import ANGLES, STEM, BatchNorm, Block, feature_count, resnet_blocks
from edgehp.networks.spec import EHPNET, KD_RESNET, Bins, NetworkSpec

# The paper trains the base network with four RvC heads of different bin widths but does not name
# the widths; these (1, 3, 6 and 11 degrees) all divide the 198 degrees of the final head.
BASE_BINS = (
    Bins(198, -98.5, 98.5),
    Bins(66, -97.5, 97.5),
    Bins(33, -96.0, 96.0),
    Bins(18, -93.5, 93.5),
)


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


class _ResNet(nn.Module):
    """A ResNet without its classifier: images [N, 3, H, W] to features [N, 512 or 2048]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _layer(STEM)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages: dict[str, list[nn.Module]] = {}
        for block in resnet_blocks(depth):
            stages.setdefault(block.name.partition(".")[0], []).append(_Block(block))
        for name, blocks in stages.items():
            setattr(self, name, nn.Sequential(*blocks))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features of normalised images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)


def _encoder(spec: NetworkSpec) -> nn.Sequential:
    return nn.Sequential(OrderedDict(model=_ResNet(spec.depth)))


class _Heads(nn.Module):
    """Three linear heads, one per angle: features [N, F] to logits [N, 3, outputs]."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        for angle in ANGLES:
            setattr(self, angle, nn.Linear(features, outputs))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([getattr(self, angle)(features) for angle in ANGLES], dim=1)


class EHPNet(nn.Module):
    """ResNet18, a 512-128 layer and three heads of 62 bins; 11,266,170 parameters."""

    def __init__(self, spec: NetworkSpec = EHPNET) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = _ResNet(spec.depth)
        self.neck = nn.Sequential(nn.Linear(feature_count(spec.depth), 128), nn.ReLU())
        self.heads = _Heads(128, spec.bins.count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3, bins] of normalised images, in the order pitch, yaw, roll."""
        out: Tensor = self.heads(self.neck(self.backbone(x)))
        return out


class KDResNet(nn.Module):
    """A ResNet with one RvC head of 198 bins per angle; with depth 18, 11,481,234 parameters."""

    def __init__(self, spec: NetworkSpec = KD_RESNET) -> None:
        super().__init__()
        self.spec = spec
        self.encoder_net = _encoder(spec)
        self.head_net = _Heads(feature_count(spec.depth), spec.bins.count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3, bins] of normalised images, in the order pitch, yaw, roll."""
        out: Tensor = self.head_net(self.encoder_net(x))
        return out


class BaseNetwork(nn.Module):
    """The training-time base: one backbone, one regression head and several RvC heads."""

    def __init__(
        self, spec: NetworkSpec = KD_RESNET, head_bins: Sequence[Bins] = BASE_BINS
    ) -> None:
        super().__init__()
        self.spec = spec
        self.head_bins = tuple(head_bins)
        self.encoder_net = _encoder(spec)
        features = feature_count(spec.depth)
        self.regression = nn.Linear(features, 3)
        self.rvc = nn.ModuleList(_Heads(features, b.count) for b in self.head_bins)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Regression [N, 3] in degrees and logits [N, 3, bins_i] per RvC head."""
        f = self.encoder_net(x)
        # The head works in units of 100 degrees: its weights stay near those of the other heads.
        return 100.0 * self.regression(f), [head(f) for head in self.rvc]


def expectation(logits: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """Softmax expectation and standard deviation, degrees, over the last axis of logits.

    Args:
        logits: [..., bins.count].
        bins: the values the expectation is taken over.

    Returns:
        Two float32 tensors [...]: the angle and its spread.
    """
    p = logits.float().softmax(-1)
    values = torch.from_numpy(bins.values).to(p, non_blocking=True)
    mean = p @ values
    variance = (p * (values - mean[..., None]) ** 2).sum(-1)
    return mean, variance.clamp_min(0).sqrt()
