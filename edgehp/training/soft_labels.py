"""Soft labels over the bins of an RvC head, and the losses of both papers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgehp.networks.kd_resnet import expectation
from edgehp.networks.spec import Bins

__all__ = ["distillation_kl", "gaussian_labels", "rebinning", "rvc_loss"]


def gaussian_labels(angles: Tensor, bins: Bins, sigma: float) -> Tensor:
    """Distributions [..., bins] of a normal of width `sigma` about angles [...], degrees.

    An angle beyond the first or last bin puts its mass on the end bins.
    """
    values = torch.from_numpy(bins.values).to(angles)
    inside = angles.clamp(bins.first, bins.last)
    return torch.softmax(-0.5 * ((values - inside[..., None]) / sigma) ** 2, dim=-1)


def rvc_loss(
    logits: Tensor, angles: Tensor, bins: Bins, sigma: float, regression_weight: float
) -> Tensor:
    """Cross-entropy with Gaussian soft labels plus smooth L1 of the expectation, per sample.

    Args:
        logits: [N, 3, bins].
        angles: labels [N, 3], degrees, in the network's convention.
        bins: of the head.
        sigma: width of the soft labels, degrees.
        regression_weight: factor on the smooth L1 term, which is in degrees.

    Returns:
        [N].
    """
    target = gaussian_labels(angles, bins, sigma)
    cross = -(target * functional.log_softmax(logits.float(), -1)).sum(-1)
    mean, _ = expectation(logits, bins)
    regression = functional.smooth_l1_loss(mean, angles, reduction="none")
    return (cross + regression_weight * regression).mean(-1)


def distillation_kl(student: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student from the teachers' mean soft label, per sample.

    The distillation of arXiv 2210.13705: the mean of the teachers' soft labels is the target, no
    ground truth enters. Summed over bins, averaged over angles.

    Args:
        student: logits [N, 3, bins].
        target: the teachers' mean distribution [N, 3, bins], made at the same temperature.
        temperature: of the softmaxes; the result is scaled by its square as usual, so that the
            gradient keeps its size (Hinton et al., arXiv 1503.02531, section 2).

    Returns:
        [N].
    """
    log_p = functional.log_softmax(student.float() / temperature, -1)
    kl = functional.kl_div(log_p, target, reduction="none").sum(-1)
    return kl.mean(-1) * temperature**2


def rebinning(source: Bins, target: Bins, sign: int) -> Tensor:
    """Weights [source.count, target.count] that carry a distribution from bins to other bins.

    The mass of a bin goes to the two nearest target bins in such shares that its mean stays;
    beyond the ends it goes to the end bin. Rows add up to 1.

    Args:
        source: a teacher's bins.
        target: the student's.
        sign: -1 where the teacher counts this angle the other way round.
    """
    step = (target.last - target.first) / (target.count - 1)
    place = (torch.from_numpy(source.values) * sign - target.first) / step
    place = place.clamp(0, target.count - 1)
    low = place.floor().clamp(max=target.count - 2)
    share = (place - low)[:, None]
    columns = torch.arange(target.count)[None]
    index = low.long()[:, None]
    weights = (columns == index) * (1 - share) + (columns == index + 1) * share
    return weights.float()
