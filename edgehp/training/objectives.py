"""What a run learns: a loss for a batch and a way to read angles off the network.

All objectives take normalised images [N, 3, S, S] and angles [N, 3] in degrees in the network's own
convention, and give a loss per sample [N] and predictions [N, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgehp.networks.kd_resnet import BaseNetwork, expectation
from edgehp.networks.spec import Bins
from edgehp.training.soft_labels import distillation_kl, rvc_loss

__all__ = ["BaseObjective", "Objective", "OnlineDistillation", "RvcObjective"]


class Objective(Protocol):
    """A loss and a decoder."""

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """Loss per sample [N], float32."""

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Predicted angles [N, 3], degrees, the network's convention."""


@dataclass(frozen=True)
class RvcObjective:
    """One RvC head learns given angles: the final network of arXiv 2108.09183, and EHPNet."""

    bins: Bins
    sigma: float = 2.0
    regression_weight: float = 0.3

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """Cross-entropy with soft labels plus smooth L1, per sample [N]."""
        return rvc_loss(network(images), angles, self.bins, self.sigma, self.regression_weight)

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Softmax expectation [N, 3]."""
        return expectation(network(images), self.bins)[0]


@dataclass(frozen=True)
class BaseObjective:
    """The base network of arXiv 2108.09183: one regression head and several RvC heads at once."""

    head_bins: tuple[Bins, ...]
    regression_weight: float = 0.3

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """Mean of the heads' RvC losses plus smooth L1 of the regression head, per sample [N]."""
        regression, logits = network(images)
        total = functional.smooth_l1_loss(regression.float(), angles, reduction="none").mean(-1)
        total = self.regression_weight * total
        for z, bins in zip(logits, self.head_bins, strict=True):
            width = (bins.last - bins.first) / (bins.count - 1)
            # A soft label narrower than its bins would be a hard one: at least 0.7 of a bin.
            sigma = max(2.0, 0.7 * width)
            head = rvc_loss(z, angles, bins, sigma, self.regression_weight)
            total = total + head / len(self.head_bins)
        return total

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Mean of all heads [N, 3]."""
        return base_angles(network, images, self.head_bins)


def base_angles(network: nn.Module, images: Tensor, head_bins: Sequence[Bins]) -> Tensor:
    """Mean over the regression and the RvC heads of a `BaseNetwork`, degrees [N, 3]."""
    regression, logits = network(images)
    answers = [regression.float()]
    answers += [expectation(z, b)[0] for z, b in zip(logits, head_bins, strict=True)]
    return torch.stack(answers).mean(0)


class OnlineDistillation:
    """Paper 2 whole (arXiv 2210.13705): the mean of several teachers' soft labels, by KL.

    The teachers see the same augmented crops as the student; no ground truth enters.

    Args:
        teachers: networks with the student's bins, in evaluation mode; `BaseNetwork` is not one.
        bins: of the student.
        scale: factor on the KL; the paper weighs the sum over angles by 10.
        temperature: of the softmaxes.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        bins: Bins,
        scale: float = 30.0,
        temperature: float = 1.0,
    ) -> None:
        if any(isinstance(t, BaseNetwork) for t in teachers):
            raise TypeError("a base network has no single head of soft labels to learn from")
        self.teachers = [t.eval() for t in teachers]
        self.bins = bins
        self.scale = scale
        self.temperature = temperature

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """KL per sample [N]; `angles` is not used."""
        with torch.no_grad():
            soft = [teacher(images) for teacher in self.teachers]
        return self.scale * distillation_kl(network(images), soft, self.temperature)

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Softmax expectation [N, 3]."""
        return expectation(network(images), self.bins)[0]
