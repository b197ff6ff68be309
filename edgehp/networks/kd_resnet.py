"""KD-ResNet of Sheka & Samun (arXiv 2108.09183): the final network and its training-time base.

The parameter names are those of the authors' published checkpoints (``encoder_net.model.*``,
``head_net.{pitch,yaw,roll}.*``), so that such a file loads unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgehp.networks.resnet import ResNet
from edgehp.networks.spec import KD_RESNET, Bins, NetworkSpec

ANGLES = ("pitch", "yaw", "roll")
# The paper trains the base network with four RvC heads of different bin widths but does not name
# the widths; these (1, 3, 6 and 11 degrees) all divide the 198 degrees of the final head.
BASE_BINS = (
    Bins(198, -98.5, 98.5),
    Bins(66, -97.5, 97.5),
    Bins(33, -96.0, 96.0),
    Bins(18, -93.5, 93.5),
)


class _Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = ResNet(depth)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class _Heads(nn.Module):
    """Three linear heads, one per angle."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        for angle in ANGLES:
            setattr(self, angle, nn.Linear(features, outputs))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([getattr(self, angle)(features) for angle in ANGLES], dim=1)


class KDResNet(nn.Module):
    """The final network: a ResNet with one RvC head of 198 bins per angle.

    ``forward`` maps normalised images [N, 3, S, S] to logits [N, 3, bins], in the order pitch,
    yaw, roll. With depth 18 it has 11,481,234 parameters.
    """

    def __init__(self, spec: NetworkSpec = KD_RESNET) -> None:
        super().__init__()
        self.spec = spec
        self.encoder_net = _Encoder(spec.depth)
        self.head_net = _Heads(self.encoder_net.model.features, spec.bins.count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3, bins] of normalised images [N, 3, S, S]."""
        out: Tensor = self.head_net(self.encoder_net(x))
        return out


class BaseNetwork(nn.Module):
    """The training-time base: one backbone, one regression head and several RvC heads.

    ``forward`` returns the regression [N, 3] in degrees and a list of logits [N, 3, bins_i].
    """

    def __init__(
        self, spec: NetworkSpec = KD_RESNET, head_bins: Sequence[Bins] = BASE_BINS
    ) -> None:
        super().__init__()
        self.spec = spec
        self.head_bins = tuple(head_bins)
        self.encoder_net = _Encoder(spec.depth)
        features = self.encoder_net.model.features
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
