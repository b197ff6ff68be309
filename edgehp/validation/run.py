"""Run reference and artifact over the same crops and compare their answers with the truth."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgehp.artifact.open import OpenedNetwork
from edgehp.crop import Box, crop_face
from edgehp.datasets.base import Dataset, Sample, Skips, digest_of, prefetch, spaced
from edgehp.engines.base import Crops, Prediction
from edgehp.errors import DataError, UsageError
from edgehp.files import finite, to_record
from edgehp.pose import angle_errors, geodesic_degrees, matrix_from_euler
from edgehp.progress import step
from edgehp.validation.appearance import CONDITIONS, AppearanceCheck, measure_crops
from edgehp.validation.metrics import (
    Accuracy,
    frame_errors,
    mean_or_none,
    measure_accuracy,
    yaw_bands,
)
from edgehp.validation.statistics import DEFAULT_RESAMPLES, Interval, mean_interval

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]
T = TypeVar("T")
# Gives the face's box in a photo, None where it finds none (a detector's miss).
BoxSource = Callable[[Image, Sample], "Box | None"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
CLEAN = "clean"


@dataclass(frozen=True)
class Subject:
    """A network in an engine: what was measured.

    Attributes:
        name: what the user calls it.
        network_digest: SHA-256 of the network: its file, or the one in the artifact's manifest.
        engine: `edgehp.engines.base.EngineInfo` as a dictionary.
    """

    name: str
    network_digest: str | None
    engine: Mapping[str, Any]


@dataclass(frozen=True)
class BandDrop:
    """The drop among frames whose |yaw| lies in (low, high] degrees; None without such frames.

    Attributes:
        low: of |yaw|, degrees.
        high: of |yaw|, degrees.
        frames: how many.
        drop: MAE of the artifact minus that of the reference.
        mean_difference: mean absolute difference of the angles between the two.
        spread_difference: mean absolute difference of the spreads between the two.
    """

    low: float
    high: float
    frames: int
    drop: Interval | None
    mean_difference: float | None = None
    spread_difference: float | None = None


@dataclass(frozen=True)
class Drop:
    """The artifact against the reference on the same frames, degrees; positive is worse.

    Attributes:
        overall: MAE of the artifact minus that of the reference, mean of the three angles.
        angles: the same for pitch, yaw, roll.
        geodesic: the same of the geodesic distance.
        bands: the same by |yaw| of the truth.
        mean_difference_overall: mean absolute difference of the angles: how far the two are from
            each other, whatever the truth is.
        largest_difference: the largest of any frame and angle.
        spread_difference_overall: mean absolute difference of the spreads; None, as every figure of
            the spread, for networks without bins.
    """

    overall: Interval
    angles: tuple[Interval, Interval, Interval]
    geodesic: Interval
    bands: tuple[BandDrop, ...]
    mean_difference_overall: float
    largest_difference: float
    spread_difference_overall: float | None


@dataclass(frozen=True)
class Condition:
    """Accuracy on a degraded version of the crops (`edgehp.validation.appearance`), degrees."""

    name: str
    reference_mae: float
    artifact_mae: float | None = None
    drop: Interval | None = None
    mean_difference: float | None = None
    spread_difference: float | None = None


@dataclass(frozen=True)
class ValidationReport:
    """A whole validation.

    Attributes:
        protocol: the data set's protocol, of the frames that were really used, with
            ``detector_misses``, ``photos_skipped`` and ``limit``.
        preprocessing: `edgehp.crop.Preprocessing` as a dictionary.
        preprocessing_digest: its SHA-256.
        batch: crops per call of the engines.
        reference: the FP32 network.
        reference_accuracy: its accuracy.
        reference_mae: its MAE with an interval.
        artifact: the artifact; None where a network alone was validated.
        artifact_accuracy: its accuracy.
        artifact_mae: its MAE with an interval.
        drop: the paired comparison.
        robustness: degraded versions of the crops; empty where not asked for.
        appearance: the frames held against the calibration crops
            (`edgehp.validation.appearance.AppearanceCheck.to_dict`); None where the artifact does
            not say how those look.
        missed: names of frames in which the detector found no face.
        skipped: frames that were left out because something is wrong with them, and what.
        schema: of this report.
    """

    protocol: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    preprocessing_digest: str
    batch: int
    reference: Subject
    reference_accuracy: Accuracy
    reference_mae: Interval
    artifact: Subject | None = None
    artifact_accuracy: Accuracy | None = None
    artifact_mae: Interval | None = None
    drop: Drop | None = None
    robustness: tuple[Condition, ...] = ()
    appearance: Mapping[str, Any] | None = None
    missed: tuple[str, ...] = ()
    skipped: tuple[Mapping[str, str], ...] = field(default=())
    schema: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; an unbounded interval's ends become null."""
        return {"kind": "validation", **finite(asdict(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> ValidationReport:
        """The inverse of `to_dict`.

        Args:
            values: what was read; further keys are passed over.
            where: the file's name, for messages.

        Raises:
            DataError: they are no such report.
        """
        return to_record(_with_ends(values), cls, where, infinite=True)


def _with_ends(value: Any) -> Any:
    """Values as `to_dict` gives them, with the ends of intervals that are unbounded."""
    if isinstance(value, (list, tuple)):
        return [_with_ends(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    found = {k: _with_ends(v) for k, v in value.items()}
    if "level" in found:
        ends = {"low": -math.inf, "high": math.inf}
        found |= {k: end for k, end in ends.items() if k in found and found[k] is None}
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a validation is run.

    Attributes:
        batch: crops per call of an engine; the last call of a run may have fewer.
        limit: use only this many frames, spread evenly over the data set; None takes all.
        skip_bad: count and list photos that cannot be used instead of raising.
        robustness: measure degraded versions of the crops too
            (`edgehp.validation.appearance.CONDITIONS`).
        worst: how many of the worst frames to name.
        workers: threads that prepare crops.
        resamples: of the bootstrap.
    """

    batch: int = 32
    limit: int | None = None
    skip_bad: bool = False
    robustness: bool = True
    worst: int = 10
    workers: int = 2
    resamples: int = DEFAULT_RESAMPLES

    @property
    def conditions(self) -> tuple[str, ...]:
        """The degraded versions that are measured."""
        return tuple(CONDITIONS) if self.robustness else ()


@dataclass(frozen=True)
class Detector:
    """A source of face boxes in place of the data set's; `words` names it in the protocol."""

    find: BoxSource
    words: str = "detector"


@dataclass
class _Seen:
    """What a pass over the frames gathered.

    Attributes:
        answers: (role, condition) -> predictions, batch after batch.
        used: the samples that were measured, in the order of the predictions.
        missed: names of those without a detected face.
        looks: statistics of the crops, batch after batch.
    """

    answers: dict[tuple[str, str], list[Prediction]] = field(default_factory=dict)
    used: list[Sample] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    looks: list[Array] = field(default_factory=list)


def validate(
    reference: OpenedNetwork,
    artifact: OpenedNetwork | None,
    dataset: Dataset,
    settings: Settings | None = None,
    *,
    detector: Detector | None = None,
    calibration: Callable[[Array], AppearanceCheck] | None = None,
) -> ValidationReport:
    """Measure a network, or an artifact against its reference.

    Both engines get the very same uint8 crops, cut once. Crops are prepared ahead in threads and
    only one batch of them is kept.

    Args:
        reference: the FP32 network, whose preprocessing cuts the crops.
        artifact: what is compared with it; None measures the network alone.
        dataset: labelled samples.
        settings: the default ones when omitted.
        detector: finds the boxes in place of the data set's; misses are counted and listed, and
            the figures are of the other frames.
        calibration: holds how the frames look (`edgehp.validation.appearance.measure_crops`)
            against the crops that the artifact's scales come from.

    Raises:
        DataError: a photo cannot be used, no frame is left, or the data set has no labels.
        UsageError: an engine of another input size.
    """
    settings, preprocessing = settings or Settings(), reference.preprocessing
    contenders = {"reference": reference} | ({"artifact": artifact} if artifact else {})
    for contender in contenders.values():
        if contender.engine.input_size != preprocessing.size:
            raise UsageError(
                f"{contender.name} takes crops of {contender.engine.input_size} pixels, the "
                f"preprocessing gives {preprocessing.size}: these do not belong together"
            )
    if not dataset.labelled:
        raise DataError(
            f"{dataset.name}: not every photo has a label: nothing to validate against\n"
            "hint: put pitch, yaw and roll beside the photos in a labels.csv"
        )
    chosen: Sequence[Sample] = dataset.samples
    if settings.limit is not None:  # the first ones would be one person, or one folder
        chosen = [chosen[i] for i in spaced(len(chosen), settings.limit)]
    skips = Skips(settings.skip_bad)

    def prepare(sample: Sample) -> tuple[Sample, Crops | None]:
        photo = sample.load()
        if detector is not None:
            box = detector.find(photo, sample)
            if box is None:
                return sample, None
            sample = replace(sample, box=box)
        return sample, crop_face(photo, sample.box, preprocessing)

    crops = prefetch(
        chosen,
        prepare,
        workers=settings.workers,
        ahead=max(2 * settings.batch, 8),
        on_bad=lambda sample, error: skips.add(sample.name, error),
    )
    seen = _Seen()
    with step("frames", len(chosen), "frames") as going:
        for group in _batches(crops, settings.batch):
            _infer(group, contenders, settings.conditions, seen)
            going.advance(len(group))
    if not seen.used:
        raise DataError(
            f"{dataset.name}: none of {len(chosen)} frames could be used ({len(seen.missed)} "
            f"without a detected face, {len(skips.found)} damaged)"
        )
    protocol = {
        **dataset.protocol,
        "frames": len(seen.used),
        "sha256": digest_of(seen.used),
        "limit": settings.limit,
        "photos_skipped": len(skips.found),
        "detector_misses": len(seen.missed),
    }
    if detector is not None:
        protocol["boxes"] = detector.words
    check = None if calibration is None else calibration(np.concatenate(seen.looks))
    return ValidationReport(
        protocol=protocol,
        preprocessing=preprocessing.to_dict(),
        preprocessing_digest=preprocessing.digest,
        batch=settings.batch,
        appearance=None if check is None else check.to_dict(),
        missed=tuple(seen.missed),
        skipped=tuple(
            {"name": s.name, "reason": s.reason} for s in (*dataset.skipped, *skips.found)
        ),
        **_figures(dataset.name, seen, contenders, settings),
    )


def _infer(
    group: Sequence[tuple[Sample, Crops | None]],
    contenders: Mapping[str, OpenedNetwork],
    conditions: Sequence[str],
    seen: _Seen,
) -> None:
    """Add one batch to `seen`."""
    seen.missed += [sample.name for sample, crop in group if crop is None]
    pictures = [crop for _, crop in group if crop is not None]
    if not pictures:
        return
    seen.used += [sample for sample, crop in group if crop is not None]
    seen.looks.append(measure_crops(pictures))
    clean = np.stack(pictures)
    for condition in (CLEAN, *conditions):
        changed = clean if condition == CLEAN else CONDITIONS[condition](clean)
        for role, contender in contenders.items():
            # A copy: an engine may use its output buffers again.
            answer = deepcopy(contender.engine.infer(changed))
            seen.answers.setdefault((role, condition), []).append(answer)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _figures(
    dataset: str, seen: _Seen, contenders: Mapping[str, OpenedNetwork], settings: Settings
) -> dict[str, Any]:
    """The fields of `ValidationReport` that are measured."""
    answers = {key: Prediction.joined(parts) for key, parts in seen.answers.items()}
    names = [s.name for s in seen.used]
    truth = np.stack([s.angles for s in seen.used if s.angles is not None])
    matrices = np.stack([s.matrix for s in seen.used if s.matrix is not None])
    groups, unit = None, "frame"
    if dataset == "biwi":
        # Frames of a sequence are one person in one video: resampling them singly would give an
        # interval several times too narrow.
        groups, unit = np.array([n.split("/")[0] for n in names]), "sequence"

    def interval(values: Array, mask: npt.NDArray[np.bool_] | None = None) -> Interval:
        chosen = slice(None) if mask is None else mask
        return mean_interval(
            values[chosen],
            groups=None if groups is None else list(groups[chosen]),
            unit=unit,
            resamples=settings.resamples,
        )

    figures: dict[str, Any] = {}
    for role, contender in contenders.items():
        answer = answers[role, CLEAN]
        figures[role] = Subject(contender.name, contender.digest, contender.engine.info.to_dict())
        figures[f"{role}_accuracy"] = measure_accuracy(
            answer.angles, answer.spread, truth, matrices, names, settings.worst
        )
        figures[f"{role}_mae"] = interval(frame_errors(answer.angles, truth))
    if "artifact" in contenders:
        figures["drop"] = _drop(
            answers["reference", CLEAN], answers["artifact", CLEAN], truth, matrices, interval
        )
    figures["robustness"] = tuple(
        _condition(c, answers["reference", c], answers.get(("artifact", c)), truth, interval)
        for c in settings.conditions
    )
    return figures


def _drop(
    reference: Prediction,
    artifact: Prediction,
    truth: Array,
    matrices: Array,
    interval: Callable[..., Interval],
) -> Drop:
    worse = angle_errors(artifact.angles, truth) - angle_errors(reference.angles, truth)
    before, after = (
        geodesic_degrees(matrix_from_euler(p.angles), matrices) for p in (reference, artifact)
    )
    apart = angle_errors(artifact.angles, reference.angles)
    spread = artifact.spread_apart(reference)
    frame = worse.mean(axis=1)
    return Drop(
        overall=interval(frame),
        angles=(interval(worse[:, 0]), interval(worse[:, 1]), interval(worse[:, 2])),
        geodesic=interval(after - before),
        bands=tuple(
            BandDrop(
                low,
                high,
                int(mask.sum()),
                interval(frame, mask),
                float(apart[mask].mean()),
                mean_or_none(spread, mask),
            )
            if mask.any()
            else BandDrop(low, high, 0, None)
            for low, high, mask in yaw_bands(truth)
        ),
        mean_difference_overall=float(apart.mean()),
        largest_difference=float(apart.max()),
        spread_difference_overall=mean_or_none(spread),
    )


def _condition(
    name: str,
    reference: Prediction,
    artifact: Prediction | None,
    truth: Array,
    interval: Callable[..., Interval],
) -> Condition:
    before = frame_errors(reference.angles, truth)
    if artifact is None:
        return Condition(name, float(before.mean()))
    after = frame_errors(artifact.angles, truth)
    return Condition(
        name=name,
        reference_mae=float(before.mean()),
        artifact_mae=float(after.mean()),
        drop=interval(after - before),
        mean_difference=float(angle_errors(artifact.angles, reference.angles).mean()),
        spread_difference=mean_or_none(artifact.spread_apart(reference)),
    )
