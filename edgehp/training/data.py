"""Training batches: labelled photos kept in memory, a repeatable order, crops made on the device.

The order of an epoch and the augmentation of every crop follow from (seed, epoch) alone: a resumed
run sees what the killed one would have seen, and each process of a distributed run gets its share
of the same batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgehp import pose
from edgehp.crop import Preprocessing, crop_face
from edgehp.datasets.base import MAX_ANGLE, Sample, Skips, prefetch
from edgehp.errors import DataError, UsageError
from edgehp.training.augment import Augmentation, cut, draw, photometric
from edgehp.training.labelling import Label

Array = npt.NDArray[np.float64]
# Spread in degrees at which a teacher's label counts half.
_TRUST = 6.0
# The photo about the network's view that is kept for shifts, larger scales and rotations.
MARGIN = 1.4


@dataclass(frozen=True, eq=False)
class TrainingItem:
    """A photo with the rotation to learn.

    Attributes:
        sample: the photo.
        matrix: [3, 3], canonical.
        weight: of its loss: less where the teachers disagree.
    """

    sample: Sample
    matrix: Array
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Faces:
    """The faces of a run, decoded and cut once, on the device that trains.

    Attributes:
        crops: uint8 [N, C, C, 3], RGB: `margin` times what the network sees.
        margin: 1 for the network's own crops.
        matrices: [N, 3, 3], canonical.
        weights: [N].
    """

    crops: Tensor
    margin: float
    matrices: Array
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """The number of faces."""
        return len(self.crops)

    @classmethod
    def load(
        cls,
        items: Sequence[TrainingItem],
        preprocessing: Preprocessing,
        device: torch.device,
        *,
        margin: float = MARGIN,
        workers: int = 2,
        skips: Skips | None = None,
    ) -> Faces:
        """Decode and cut the photos of `items`, in `workers` threads.

        With a margin, faces are kept at no more than their own resolution: 28,000 of them, for a
        network of 112 pixels, take 2.2 GB.

        Raises:
            UsageError: the network sees its faces stretched, which a margin cannot be cut for.
            DataError: a photo is damaged and `skips` does not take it, or there are none.
        """
        skips = skips or Skips()
        if not items:
            raise DataError("there are no photos to load")
        spec = preprocessing
        if margin != 1:
            if spec.box_rule != "square":
                raise UsageError(
                    f"training cuts faces by the box rule 'square', not {spec.box_rule!r}"
                )
            sides = [_box_side(i.sample) * spec.box_scale for i in items]
            largest = min(spec.size, max(32, float(np.percentile(sides, 75))))
            spec = msgspec.structs.replace(
                spec,
                size=min(1024, 16 * round(margin * largest / 16)),
                box_scale=spec.box_scale * margin,
            )

        def face(item: TrainingItem) -> tuple[TrainingItem, npt.NDArray[np.uint8]]:
            return item, crop_face(item.sample.load(), item.sample.box, spec)

        crops = np.empty((len(items), spec.size, spec.size, 3), np.uint8)
        kept: list[TrainingItem] = []
        for item, crop in prefetch(
            items, face, workers=workers, on_bad=lambda i, e: skips.add(i.sample.name, e)
        ):
            crops[len(kept)] = crop
            kept.append(item)
        if not kept:
            raise DataError(f"none of the {len(items)} photos can be used")
        return cls(
            torch.from_numpy(crops[: len(kept)]).to(device),
            margin,
            np.stack([i.matrix for i in kept]),
            np.array([i.weight for i in kept], np.float32),
        )


def _box_side(sample: Sample) -> float:
    if sample.box is not None:
        return max(sample.box.width, sample.box.height)
    return float(max(sample.size)) if sample.size is not None else float("inf")


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops and labels, on the device that trains.

    Attributes:
        images: float32 [B, 3, S, S], RGB, whole levels 0 to 255.
        angles: float32 [B, 3], degrees, ``"aflw2000"``.
        weights: float32 [B].
        total_weight: sum over the whole batch, also when this is one process's part of it.
    """

    images: Tensor
    angles: Tensor
    weights: Tensor
    total_weight: float


@dataclass(frozen=True)
class BatchPlan:
    """Everything that decides what is in the batches of one epoch; `size` is the crops' side."""

    size: int
    augmentation: Augmentation
    seed: int
    epoch: int
    batch: int
    flatten: float = 0.5
    rank: int = 0
    world: int = 1


def with_labels(
    samples: Sequence[Sample], labels: Mapping[str, Label] | None = None
) -> list[TrainingItem]:
    """Join photos with teacher labels, or take the data set's own exact labels.

    Args:
        samples: the photos.
        labels: by sample name; None uses each sample's own rotation, with weight 1.

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
            weight = 1.0 / (1.0 + (label.spread / _TRUST) ** 2)
            items.append(TrainingItem(s, label.matrix, weight))
    items = [i for i in items if np.abs(pose.euler_from_matrix(i.matrix)).max() <= MAX_ANGLE]
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


def epoch_order(matrices: Array, plan: BatchPlan) -> npt.NDArray[np.intp]:
    """Indices of one epoch, drawn with replacement after |yaw| of the labels [N, 3, 3].

    The probability is the density of |yaw| to the power -flatten: 0 samples photos as they come,
    1 makes |yaw| uniform.
    """
    yaw = np.abs(pose.euler_from_matrix(matrices)[:, 1])
    cells = np.minimum((yaw / 10).astype(int), 9)
    density = np.bincount(cells, minlength=10) / len(matrices)
    p = density[cells] ** -plan.flatten
    rng = np.random.default_rng([plan.seed, plan.epoch])
    return rng.choice(len(matrices), len(matrices), p=p / p.sum())


def batches(faces: Faces, plan: BatchPlan, *, start: int = 0) -> Iterator[Batch]:
    """The batches of one epoch from number `start`, whole ones only.

    Of a batch, process `plan.rank` of `plan.world` gets its share of consecutive samples.

    Raises:
        DataError: the photos do not fill one batch.
    """
    count = len(faces) // plan.batch
    if count == 0:
        raise DataError(f"{len(faces)} photos do not fill one batch of {plan.batch}")
    device = faces.crops.device
    order = epoch_order(faces.matrices, plan)[: count * plan.batch]
    draws = draw(len(order), plan.augmentation, np.random.default_rng([plan.seed, plan.epoch, 1]))
    turned = pose.euler_from_matrix(draws.turned(faces.matrices[order]))
    # Whole epochs go to the device at once: no copy waits in the loop.
    angles = torch.from_numpy(turned.astype(np.float32)).to(device)
    weights = torch.from_numpy(faces.weights[order]).to(device)
    chosen = torch.from_numpy(order).to(device)
    generator = torch.Generator(device)
    for number in range(start, count):
        share = np.array_split(np.arange(plan.batch), plan.world)[plan.rank]
        part = slice(number * plan.batch + share[0], number * plan.batch + share[-1] + 1)
        generator.manual_seed(
            int(np.random.SeedSequence([plan.seed, plan.epoch, number]).generate_state(1)[0])
        )
        crops = cut(faces.crops[chosen[part]], draws[part], plan.size, faces.margin)
        whole = faces.weights[order[number * plan.batch : (number + 1) * plan.batch]]
        yield Batch(
            photometric(crops, draws[part], generator),
            angles[part],
            weights[part],
            float(whole.sum()),
        )
