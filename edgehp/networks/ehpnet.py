"""EHPNet of Thai et al. (arXiv 2210.13705): ResNet18, a 512-128 layer, three heads of 62 bins."""

from __future__ import annotations

from torch import Tensor, nn

from edgehp.networks.kd_resnet import _Heads
from edgehp.networks.resnet import ResNet
from edgehp.networks.spec import EHPNET, NetworkSpec


class EHPNet(nn.Module):
    """Normalised images [N, 3, 112, 112] to logits [N, 3, 62]; 11,266,170 parameters."""

    def __init__(self, spec: NetworkSpec = EHPNET) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = ResNet(spec.depth)
        self.neck = nn.Sequential(nn.Linear(self.backbone.features, 128), nn.ReLU())
        self.heads = _Heads(128, spec.bins.count)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 3, bins] in the order pitch, yaw, roll."""
        out: Tensor = self.heads(self.neck(self.backbone(x)))
        return out
