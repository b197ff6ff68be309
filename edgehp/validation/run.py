"""Run reference and artifact over the same crops and compare their answers with the truth."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box, Preprocessing, crop_face
from edgehp.datasets.base import Dataset, Sample, Skips, build_dataset
from edgehp.datasets.prefetch import prefetch
from edgehp.engines.base import Crops, Engine, Prediction
from edgehp.errors import DataError, UsageError
from edgehp.pose import angle_errors, geodesic_degrees, matrix_from_euler
from edgehp.validation.appearance import ADVICE, Appearance, AppearanceCheck, measure_crops
from edgehp.validation.metrics import frame_errors, measure_accuracy, yaw_bands
from edgehp.validation.report import BandDrop, Condition, Drop, Subject, ValidationReport
from edgehp.validation.robustness import CONDITIONS
from edgehp.validation.statistics import DEFAULT_RESAMPLES, DEFAULT_SEED, Interval, mean_interval

__all__ = ["BoxSource", "Clipped", "Contender", "group_of", "validate"]

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]
T = TypeVar("T")
# Gives the face's box in a photo, None where it finds none (a detector's miss).
BoxSource = Callable[[Image, Sample], "Box | None"]

logger = logging.getLogger(__name__)

CLEAN = "clean"
# Frames whose clipped activations are counted, spread over the data set.
_CLIPPED = 32


@dataclass(frozen=True)
class Contender:
    """An opened engine and what it is called in the report."""

    engine: Engine
    name: str
    network_digest: str | None = None

    def subject(self) -> Subject:
        """What the report says about it."""
        return Subject(self.name, self.network_digest, self.engine.info.to_dict())


@dataclass(frozen=True)
class Clipped:
    """Activations beyond the calibrated ranges.

    Attributes:
        share: of the frames' activations, 0..1.
        usual: of the calibration crops', 0..1; None where it is not known.
        worst: tensor with the largest share, and that share.
    """

    share: float
    usual: float | None
    worst: tuple[str, float]


@dataclass
class _Answers:
    """Predictions of one engine under one condition, batch after batch."""

    angles: list[npt.NDArray[np.float32]] = field(default_factory=list)
    spread: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, prediction: Prediction) -> None:
        self.angles.append(np.array(prediction.angles))
        self.spread.append(np.array(prediction.spread))

    def joined(self) -> tuple[Array, Array]:
        return np.concatenate(self.angles).astype(np.float64), np.concatenate(self.spread).astype(
            np.float64
        )


def group_of(dataset: str) -> tuple[Callable[[str], str] | None, str]:
    """How frames of a data set depend on each other.

    Returns:
        A function from a frame's name to its group, None where frames are independent; and what
        a group is. Frames of a BIWI sequence are one person in one video: resampling them singly
        would give an interval several times too narrow.
    """
    if dataset == "biwi":
        return (lambda name: name.split("/")[0]), "sequence"
    return None, "frame"


def validate(
    reference: Contender,
    artifact: Contender | None,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    batch: int = 32,
    limit: int | None = None,
    skip_bad: bool = False,
    box_source: BoxSource | None = None,
    box_words: str = "detector",
    conditions: Iterable[str] = tuple(CONDITIONS),
    worst: int = 10,
    workers: int = 2,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = DEFAULT_SEED,
    progress: Callable[[int, int], None] | None = None,
    calibration: Appearance | None = None,
    clipped: Callable[[Sequence[Crops]], Clipped] | None = None,
    advice: str = ADVICE,
) -> ValidationReport:
    """Measure a network, or an artifact against its reference.

    Both engines get the very same uint8 crops, cut once. Crops are prepared ahead in threads and
    only one batch of them is kept.

    Args:
        reference: the FP32 network.
        artifact: what is compared with it; None measures the network alone.
        dataset: labelled samples.
        preprocessing: of the network.
        batch: crops per call of an engine; the last call of a run may have fewer.
        limit: use only this many frames, spread evenly over the data set; None takes all.
        skip_bad: count and list photos that cannot be used instead of raising.
        box_source: finds the boxes in place of the data set's; misses are counted and listed, and
            the figures are of the other frames.
        box_words: what the box source is, for the protocol.
        conditions: names of `edgehp.validation.robustness.CONDITIONS` to measure too.
        worst: how many of the worst frames to name.
        workers: threads that prepare crops.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        progress: called with (frames done, frames in all) after every batch.
        calibration: how the crops look that the artifact's scales come from; the frames are held
            against them.
        clipped: given some of the crops, counts the activations that the artifact clips.
        advice: what to do where the frames look unlike the calibration crops.

    Raises:
        DataError: a photo cannot be used, no frame is left, or the data set has no labels.
        UsageError: an argument out of its range, or an engine of another input size.
    """
    names = tuple(conditions)
    _check(reference, artifact, preprocessing, batch, limit, names)
    if not dataset.labelled:
        raise DataError(f"{dataset.name}: no labels for every photo: nothing to validate against")
    chosen = _limited(dataset.samples, limit)
    skips = Skips(skip_bad)
    missed: list[str] = []

    def work(sample: Sample) -> tuple[Sample, Crops | None]:
        photo = sample.load()
        if box_source is not None:
            box = box_source(photo, sample)
            if box is None:
                return sample, None
            sample = replace(sample, box=box)
        return sample, crop_face(photo, sample.box, preprocessing)

    used: list[Sample] = []
    looks: list[Array] = []
    some: list[Crops] = []
    every = max(1, len(chosen) // _CLIPPED)
    answers: dict[tuple[str, str], _Answers] = {}
    contenders = {"reference": reference} | ({"artifact": artifact} if artifact else {})
    crops = prefetch(
        chosen,
        work,
        workers=workers,
        ahead=max(2 * batch, 8),
        on_bad=(lambda sample, error: skips.add(sample.name, error)) if skip_bad else None,
    )
    done = 0
    for group in _batches(crops, batch):
        done += len(group)
        pictures = []
        for sample, crop in group:
            if crop is None:
                missed.append(sample.name)
            else:
                used.append(sample)
                pictures.append(crop)
        if pictures:
            if calibration is not None:
                looks.append(measure_crops(pictures))
                # Copies: a view would keep its whole batch.
                start = len(used) - len(pictures)
                wanted = (p for i, p in enumerate(pictures, start) if i % every == 0)
                some += [np.array(p) for p in wanted][: _CLIPPED - len(some)]
            clean = np.stack(pictures)
            for condition in (CLEAN, *names):
                seen = clean if condition == CLEAN else CONDITIONS[condition](clean)
                for role, contender in contenders.items():
                    answer = contender.engine.infer(seen)
                    answers.setdefault((role, condition), _Answers()).add(answer)
        if progress is not None:
            progress(done, len(chosen))
    if not used:
        raise DataError(
            f"{dataset.name}: none of {len(chosen)} frames could be used ({len(missed)} without a "
            f"detected face, {len(skips.found)} damaged)"
        )
    measured = build_dataset(dataset.name, used, boxes=str(dataset.protocol.get("boxes", "none")))
    protocol = {
        **dataset.protocol,
        "frames": len(used),
        "sha256": measured.protocol["sha256"],
        "limit": limit,
        "photos_skipped": len(skips.found),
        "detector_misses": len(missed),
    }
    if box_source is not None:
        protocol["boxes"] = box_words
    joined = {key: a.joined() for key, a in answers.items()}
    check = None
    if calibration is not None:
        found = None if clipped is None else clipped(some)
        check = AppearanceCheck.of(
            calibration,
            np.concatenate(looks),
            clipped=None if found is None else found.share,
            calibration_clipped=None if found is None else found.usual,
            worst=None if found is None else found.worst,
            advice=advice,
        ).to_dict()
    return _report(
        dataset.name,
        used,
        joined,
        names,
        contenders,
        worst,
        resamples,
        seed,
        protocol=protocol,
        preprocessing=preprocessing.to_dict(),
        preprocessing_digest=preprocessing.digest,
        batch=batch,
        appearance=check,
        missed=tuple(missed),
        skipped=tuple(
            {"name": s.name, "reason": s.reason} for s in (*dataset.skipped, *skips.found)
        ),
    )


def _check(
    reference: Contender,
    artifact: Contender | None,
    preprocessing: Preprocessing,
    batch: int,
    limit: int | None,
    conditions: Sequence[str],
) -> None:
    if batch < 1 or (limit is not None and limit < 1):
        raise UsageError(f"batch {batch} and limit {limit}: expected 1 or more")
    if unknown := [c for c in conditions if c not in CONDITIONS]:
        raise UsageError(f"unknown conditions {unknown}; known: {', '.join(CONDITIONS)}")
    for contender in (reference, artifact):
        if contender is not None and contender.engine.input_size != preprocessing.size:
            raise UsageError(
                f"{contender.name} takes crops of {contender.engine.input_size} pixels, the "
                f"preprocessing gives {preprocessing.size}: these do not belong together"
            )


def _limited(samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
    """`limit` samples evenly over the whole: the first ones would be one person, or one folder."""
    if limit is None or limit >= len(samples):
        return samples
    return [samples[i * len(samples) // limit] for i in range(limit)]


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _report(
    dataset: str,
    used: Sequence[Sample],
    answers: dict[tuple[str, str], tuple[Array, Array]],
    conditions: Sequence[str],
    contenders: dict[str, Contender],
    worst: int,
    resamples: int,
    seed: int,
    **about: object,
) -> ValidationReport:
    names = [s.name for s in used]
    truth = np.stack([s.angles for s in used if s.angles is not None])
    matrices = np.stack([s.matrix for s in used if s.matrix is not None])
    grouping, unit = group_of(dataset)
    groups = None if grouping is None else [grouping(n) for n in names]

    def interval(values: Array, mask: npt.NDArray[np.bool_] | None = None) -> Interval:
        v, g = values, groups
        if mask is not None:
            v = values[mask]
            g = None if groups is None else [x for x, m in zip(groups, mask, strict=True) if m]
        return mean_interval(v, groups=g, unit=unit, resamples=resamples, seed=seed)

    figures: dict[str, object] = {}
    for role, contender in contenders.items():
        angles, spread = answers[role, CLEAN]
        figures[role] = contender.subject()
        figures[f"{role}_accuracy"] = measure_accuracy(
            angles, spread, truth, matrices, names, worst
        )
        figures[f"{role}_mae"] = interval(frame_errors(angles, truth))
    pair = "artifact" in contenders
    if pair:
        figures["drop"] = _drop(
            answers["reference", CLEAN], answers["artifact", CLEAN], truth, matrices, interval
        )
    figures["robustness"] = tuple(
        _condition(
            c,
            answers["reference", c],
            answers["artifact", c] if pair else None,
            truth,
            interval,
        )
        for c in conditions
    )
    return ValidationReport(**about, **figures)  # type: ignore[arg-type]


def _drop(
    reference: tuple[Array, Array],
    artifact: tuple[Array, Array],
    truth: Array,
    matrices: Array,
    interval: Callable[..., Interval],
) -> Drop:
    worse = angle_errors(artifact[0], truth) - angle_errors(reference[0], truth)
    turned = [geodesic_degrees(matrix_from_euler(a[0]), matrices) for a in (artifact, reference)]
    apart = angle_errors(artifact[0], reference[0])
    spread = np.abs(artifact[1] - reference[1])
    frame = worse.mean(axis=1)
    return Drop(
        overall=interval(frame),
        angles=(interval(worse[:, 0]), interval(worse[:, 1]), interval(worse[:, 2])),
        geodesic=interval(turned[0] - turned[1]),
        bands=tuple(
            BandDrop(
                low,
                high,
                int(mask.sum()),
                interval(frame, mask),
                float(apart[mask].mean()),
                float(spread[mask].mean()),
            )
            if mask.any()
            else BandDrop(low, high, 0, None)
            for low, high, mask in yaw_bands(truth)
        ),
        mean_difference=_triple(apart.mean(axis=0)),
        mean_difference_overall=float(apart.mean()),
        largest_difference=float(apart.max()),
        spread_difference=_triple(spread.mean(axis=0)),
        spread_difference_overall=float(spread.mean()),
    )


def _condition(
    name: str,
    reference: tuple[Array, Array],
    artifact: tuple[Array, Array] | None,
    truth: Array,
    interval: Callable[..., Interval],
) -> Condition:
    before = frame_errors(reference[0], truth)
    if artifact is None:
        return Condition(
            name, float(before.mean()), None, None, None, None, float(reference[1].mean())
        )
    after = frame_errors(artifact[0], truth)
    return Condition(
        name=name,
        reference_mae=float(before.mean()),
        artifact_mae=float(after.mean()),
        drop=interval(after - before),
        mean_difference=float(angle_errors(artifact[0], reference[0]).mean()),
        spread_difference=float(np.abs(artifact[1] - reference[1]).mean()),
        reference_spread=float(reference[1].mean()),
    )


def _triple(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
