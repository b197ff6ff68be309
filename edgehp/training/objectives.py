"""What a run learns: the losses of both papers, and how angles are read off each network.

All objectives take normalised images [N, 3, S, S] and angles [N, 3] in degrees in the network's own
convention, and give a loss per sample [N] and predictions [N, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgehp import pose
from edgehp.crop import Preprocessing
from edgehp.errors import DataError
from edgehp.networks.modules import expectation
from edgehp.networks.spec import Bins, NetworkSpec

# The paper weighs the sum over the three angles by 10.
_KL_SCALE = 30.0


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

    The teachers see the same augmented crops as the student; no ground truth enters. A teacher may
    have other bins, another convention, input size, colour order and normalisation than the
    student, but must want the same crop of the photo.

    Args:
        teachers: (network, specification) each; networks give logits [N, 3, bins].
        student: specification of the student.

    Raises:
        DataError: a teacher crops photos by another rule.
    """

    def __init__(
        self,
        teachers: Sequence[tuple[nn.Module, NetworkSpec]],
        student: NetworkSpec,
    ) -> None:
        self.student = student
        self._teachers = []
        signs = pose.convention(student.convention).signs
        for network, spec in teachers:
            for name in ("box_rule", "box_scale"):
                its, own = (getattr(n.preprocessing, name) for n in (spec, student))
                if its != own:
                    raise DataError(
                        f"a teacher sees the face by {name} {its!r}, the student by {own!r}: "
                        "their soft labels would be of different crops"
                    )
            theirs = pose.convention(spec.convention).signs
            carry = torch.stack(
                [
                    rebinning(spec.bins, student.bins, a * b)
                    for a, b in zip(signs, theirs, strict=True)
                ]
            )
            self._teachers.append((network.eval().requires_grad_(False), spec, carry))

    def loss(self, network: nn.Module, images: Tensor, angles: Tensor) -> Tensor:
        """KL per sample [N]; `angles` is not used."""
        return _KL_SCALE * distillation_kl(network(images), self.soft_labels(images))

    @torch.no_grad()
    def soft_labels(self, images: Tensor) -> Tensor:
        """The teachers' mean distribution over the student's bins [N, 3, bins]."""
        total = torch.zeros((), device=images.device)
        for teacher, spec, carry in self._teachers:
            seen = _seen_by(spec.preprocessing, self.student.preprocessing, images)
            p = teacher(seen).float().softmax(-1)
            # In float32: autocast would add up the small shares in half precision.
            with torch.autocast(images.device.type, enabled=False):
                total = total + torch.einsum("nab,abc->nac", p, carry.to(p))
        return total / len(self._teachers)

    def angles(self, network: nn.Module, images: Tensor) -> Tensor:
        """Softmax expectation [N, 3]."""
        return expectation(network(images), self.student.bins)[0]


# A loss per sample, and predicted angles.
Objective = RvcObjective | BaseObjective | OnlineDistillation


def _seen_by(teacher: Preprocessing, student: Preprocessing, images: Tensor) -> Tensor:
    """Images normalised for the student [N, 3, S, S] as the teacher wants them."""
    if teacher.size != student.size:
        images = functional.interpolate(
            images, size=(teacher.size,) * 2, mode="bilinear", align_corners=False, antialias=True
        )

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=images.device).view(1, -1, 1, 1)

    if (teacher.colour, teacher.mean, teacher.std) == (student.colour, student.mean, student.std):
        return images
    raw = images * column(student.std) + column(student.mean)
    if teacher.colour != student.colour:
        raw = raw.flip(1)
    return (raw - column(teacher.mean)) / column(teacher.std)


def gaussian_labels(angles: Tensor, bins: Bins, sigma: float) -> Tensor:
    """Distributions [..., bins] of a normal of width `sigma` about angles [...], degrees.

    An angle beyond the first or last bin puts its mass on the end bins.
    """
    values = torch.from_numpy(bins.values).to(angles, non_blocking=True)
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


def distillation_kl(student: Tensor, target: Tensor) -> Tensor:
    """KL divergence of the student from the teachers' mean soft label, per sample.

    The distillation of arXiv 2210.13705: the mean of the teachers' soft labels is the target, no
    ground truth enters. Summed over bins, averaged over angles.

    Args:
        student: logits [N, 3, bins].
        target: the teachers' mean distribution [N, 3, bins].

    Returns:
        [N].
    """
    log_p = functional.log_softmax(student.float(), -1)
    return functional.kl_div(log_p, target, reduction="none").sum(-1).mean(-1)


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
