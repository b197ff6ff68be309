"""Training batches: labelled photos, a repeatable order, and crops made ahead of the network.

The order of an epoch and the augmentation of every crop follow from (seed, epoch, position) alone:
a resumed run sees exactly what the killed one would have seen, and so does every process of a
distributed run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp import pose
from edgehp.crop import Preprocessing, crop_face
from edgehp.datasets.base import Sample
from edgehp.datasets.prefetch import prefetch
from edgehp.errors import DataError
from edgehp.training.augment import Augmentation, augmented_crop
from edgehp.training.labelling import Label

__all__ = ["Batch", "BatchPlan", "TrainingItem", "batches", "plain_batches", "split", "with_labels"]

Array = npt.NDArray[np.float64]
# Beyond this the label says "seen from behind", where three angles have no single meaning.
_LARGEST_ANGLE = 99.0


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """A photo with the rotation to learn.

    Attributes:
        sample: the photo.
        matrix: [3, 3], canonical.
        weight: of its loss: less where the teachers disagree.
        teachers: (pitch, yaw, roll, spread) per teacher [T, 4], empty for exact labels.
    """

    sample: Sample
    matrix: Array
    weight: float = 1.0
    teachers: Array | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """crops uint8 [B, S, S, 3] RGB, angles float32 [B, 3] (degrees, ``"aflw2000"``), weights [B].

    `total_weight` is the sum over the whole batch, also when this is one process's part of it.
    """

    crops: npt.NDArray[np.uint8]
    angles: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    total_weight: float


@dataclass(frozen=True)
class BatchPlan:
    """Everything that decides what is in the batches of one epoch."""

    preprocessing: Preprocessing
    augmentation: Augmentation
    seed: int
    epoch: int
    batch: int
    flatten: float = 0.5
    rank: int = 0
    world: int = 1


def with_labels(
    samples: Sequence[Sample], labels: Mapping[str, Label] | None = None, trust: float = 6.0
) -> list[TrainingItem]:
    """Join photos with teacher labels, or take the data set's own exact labels.

    Args:
        samples: the photos.
        labels: by sample name; None uses each sample's own rotation, with weight 1.
        trust: spread in degrees at which a teacher label counts half.

    Returns:
        The items whose every |angle| is at most 99 degrees; photos without a label are left out
        (the teachers' skip list names them).

    Raises:
        DataError: nothing is left.
    """
    items = []
    for s in samples:
        if labels is None:
            if s.matrix is not None:
                items.append(TrainingItem(s, s.matrix))
        elif (label := labels.get(s.name)) is not None:
            weight = 1.0 / (1.0 + (label.spread / trust) ** 2)
            items.append(TrainingItem(s, label.matrix, weight, label.teachers))
    items = [i for i in items if np.abs(pose.euler_from_matrix(i.matrix)).max() <= _LARGEST_ANGLE]
    if not items:
        raise DataError(f"none of the {len(samples)} photos has a usable label")
    return items


def split(
    items: Sequence[TrainingItem], held_back: float
) -> tuple[list[TrainingItem], list[TrainingItem]]:
    """(training, validation) items; which is which depends on a photo's name alone.

    So a longer label file, another order or another run never moves a photo across.
    """
    limit = held_back * 2**32
    train: list[TrainingItem] = []
    validation: list[TrainingItem] = []
    for item in items:
        held = zlib.crc32(item.sample.name.encode()) < limit
        (validation if held else train).append(item)
    return train, validation


def epoch_order(items: Sequence[TrainingItem], plan: BatchPlan) -> npt.NDArray[np.intp]:
    """Indices of one epoch, drawn with replacement after |yaw|.

    The probability is the density of |yaw| to the power -flatten: 0 samples photos as they come,
    1 makes |yaw| uniform.
    """
    yaw = np.abs(pose.euler_from_matrix(np.stack([i.matrix for i in items]))[:, 1])
    cells = np.minimum((yaw / 10).astype(int), 9)
    density = np.bincount(cells, minlength=10) / len(items)
    p = density[cells] ** -plan.flatten
    rng = np.random.default_rng([plan.seed, plan.epoch])
    return rng.choice(len(items), len(items), p=p / p.sum())


def batches(
    items: Sequence[TrainingItem], plan: BatchPlan, *, start: int = 0, workers: int = 2
) -> Iterator[Batch]:
    """The batches of one epoch from number `start`, whole ones only, made ahead in threads.

    Of a batch, process `plan.rank` of `plan.world` gets its share of consecutive samples.
    """
    order = epoch_order(items, plan)
    count = len(order) // plan.batch
    if count == 0:
        raise DataError(f"{len(items)} photos do not fill one batch of {plan.batch}")

    def make(number: int) -> Batch:
        chosen = order[number * plan.batch : (number + 1) * plan.batch]
        share = np.array_split(np.arange(plan.batch), plan.world)[plan.rank]
        crops, matrices = [], []
        for position in share:
            item = items[chosen[position]]
            rng = np.random.default_rng([plan.seed, plan.epoch, number, int(position)])
            crop, matrix = augmented_crop(
                item.sample.load(),
                item.sample.box,
                item.matrix,
                plan.preprocessing,
                plan.augmentation,
                rng,
            )
            crops.append(crop)
            matrices.append(matrix)
        weights = np.array([items[i].weight for i in chosen], np.float32)
        return _batch(crops, matrices, weights[share], float(weights.sum()))

    return prefetch(range(start, count), make, workers=workers, ahead=2 * workers)


def plain_batches(
    items: Sequence[TrainingItem], preprocessing: Preprocessing, batch: int, *, workers: int = 2
) -> Iterator[Batch]:
    """All items once, in order, without augmentation; the last batch may be smaller."""

    def make(first: int) -> Batch:
        part = items[first : first + batch]
        crops = [crop_face(i.sample.load(), i.sample.box, preprocessing) for i in part]
        weights = np.array([i.weight for i in part], np.float32)
        return _batch(crops, [i.matrix for i in part], weights, float(weights.sum()))

    return prefetch(range(0, len(items), batch), make, workers=workers, ahead=2 * workers)


def _batch(
    crops: Sequence[npt.NDArray[np.uint8]],
    matrices: Sequence[Array],
    weights: npt.NDArray[np.float32],
    total: float,
) -> Batch:
    angles = pose.euler_from_matrix(np.stack(matrices)).astype(np.float32)
    return Batch(np.stack(crops), angles, weights, total)
