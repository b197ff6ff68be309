"""The accuracy gate of a build: the artifact against FP32 on held-out crops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import Accuracy, Golden, SubsetRecord
from edgehp.engines.base import Engine, Prediction
from edgehp.errors import AccuracyError, DataError
from edgehp.pipeline.crops import CropSet
from edgehp.pose import angle_errors
from edgehp.validation.gate import require_drop
from edgehp.validation.metrics import frame_errors, yaw_bands
from edgehp.validation.robustness import CONDITIONS
from edgehp.validation.statistics import mean_interval

__all__ = [
    "Answers",
    "differences",
    "golden_picture",
    "golden_vectors",
    "harder_crops",
    "harder_indices",
    "mean_drop",
    "measure",
    "predict",
    "tolerance",
]

GOLDEN_COUNT = 8
# Another device rounds differently: kernels of one graph agree within hundredths of a degree.
_TOLERANCE_FLOOR = 0.25
_TOLERANCE_FACTOR = 1.5
# Held-out crops of which dark, blurred and near-infrared versions are made: all of them would make
# the step four times as long.
HARDER_COUNT = 128
# Fewer crops say nothing about a subset.
_FEWEST = 8


def predict(engine: Engine, crops: npt.NDArray[np.uint8], batch: int) -> Prediction:
    """Predictions of all crops [N, S, S, 3], at most `batch` at a time.

    Raises:
        DataError: the engine gives numbers that are not finite.
    """
    parts = [engine.infer(crops[i : i + batch]) for i in range(0, len(crops), batch)]
    angles = np.concatenate([p.angles for p in parts])
    spread = np.concatenate([p.spread for p in parts])
    if not (np.isfinite(angles).all() and np.isfinite(spread).all()):
        bad = int((~np.isfinite(angles) | ~np.isfinite(spread)).any(axis=1).sum())
        raise DataError(
            f"{engine.info.kind}: {bad} of {len(angles)} crops give angles that are not finite; "
            "activations overflow in this precision: choose another"
        )
    return Prediction(angles, spread)


@dataclass(frozen=True)
class Answers:
    """Predictions on all held-out crops, and on harder versions of some of them.

    Attributes:
        clean: on all of them, as they are.
        harder: condition of `edgehp.validation.robustness.CONDITIONS` -> on `harder_crops`.
    """

    clean: Prediction
    harder: Mapping[str, Prediction] = field(default_factory=dict)


def harder_indices(count: int) -> npt.NDArray[np.intp]:
    """Which of `count` held-out crops the harder versions are made of: 128 at most, spread."""
    return np.linspace(0, count - 1, min(count, HARDER_COUNT)).astype(np.intp)


def harder_crops(held_out: CropSet) -> dict[str, npt.NDArray[np.uint8]]:
    """Dark, blurred and near-infrared versions of some of the crops, uint8 [n, S, S, 3] each."""
    some = held_out.crops[harder_indices(len(held_out))]
    return {name: change(some) for name, change in CONDITIONS.items()}


def differences(
    reference: Prediction, artifact: Prediction, truth: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """What the artifact is worse by, crop by crop: [n] degrees.

    With labels the difference of the absolute errors; without, the absolute difference from FP32,
    which bounds it from above.
    """
    if truth is None:
        return frame_errors(artifact.angles, reference.angles)
    return frame_errors(artifact.angles, truth) - frame_errors(reference.angles, truth)


def mean_drop(reference: Prediction, artifact: Prediction, held_out: CropSet) -> float:
    """What the gate looks at: the upper end of the interval of the mean drop, degrees."""
    return mean_interval(differences(reference, artifact, held_out.angles)).high


def measure(
    before: Answers,
    after: Answers,
    held_out: CropSet,
    max_drop: float,
    measured_with: str,
) -> tuple[Accuracy, tuple[str, ...]]:
    """Compare the artifact's predictions with those of FP32 and hold the drop against the gate.

    With labels the drop is the difference of the mean absolute errors; without, the mean absolute
    difference from FP32, which bounds it from above. The interval is a paired bootstrap.

    Returns:
        The record, and a warning for each subset whose interval lies beyond the gate.

    Raises:
        AccuracyError: the upper end of the drop's interval is above the gate.
    """
    reference, artifact = before.clean, after.clean
    means: tuple[float | None, float | None] = (None, None)
    metric, words = "deviation", "without labels the deviation from FP32 counts as drop; "
    if held_out.angles is not None:
        metric, words = "mae-drop", ""
        means = (
            float(frame_errors(reference.angles, held_out.angles).mean()),
            float(frame_errors(artifact.angles, held_out.angles).mean()),
        )
    drop = mean_interval(differences(reference, artifact, held_out.angles))
    try:
        require_drop(drop, max_drop)
    except AccuracyError as e:
        raise AccuracyError(f"no artifact was made: on {held_out.source}, {words}{e}") from e
    subsets = _subsets(before, after, held_out)
    accuracy = Accuracy(
        dataset=held_out.source,
        count=len(held_out),
        metric=metric,
        reference=means[0],
        artifact=means[1],
        drop=drop.value,
        interval=(drop.low, drop.high),
        max_drop=max_drop,
        measured_with=measured_with,
        protocol=held_out.protocol,
        difference=float(frame_errors(artifact.angles, reference.angles).mean()),
        spread_difference=float(np.abs(artifact.spread - reference.spread).mean()),
        subsets=subsets,
    )
    doubts = [
        f"the drop is larger on the subset {s.name!r}: {s.drop:+.4f} degrees (95 % interval "
        f"{s.interval[0]:+.4f} to {s.interval[1]:+.4f} over {s.count} crops), {max_drop:g} allowed"
        for s in subsets
        if s.interval[0] > max_drop
    ]
    return accuracy, tuple(doubts)


def _subsets(before: Answers, after: Answers, held_out: CropSet) -> tuple[SubsetRecord, ...]:
    """Figures by |yaw| (of FP32 where there are no labels), and of the harder versions."""
    truth = held_out.angles
    turned = before.clean.angles if truth is None else truth
    found = [
        _subset(f"|yaw| {low:g}-{high:g}", before.clean, after.clean, truth, mask)
        for low, high, mask in yaw_bands(turned)
        if mask.sum() >= _FEWEST
    ]
    chosen = harder_indices(len(held_out))
    some = None if truth is None else truth[chosen]
    everything = np.ones(len(chosen), np.bool_)
    found += [
        _subset(name, before.harder[name], answer, some, everything)
        for name, answer in after.harder.items()
        if name in before.harder and len(chosen) >= _FEWEST
    ]
    return tuple(found)


def _subset(
    name: str,
    reference: Prediction,
    artifact: Prediction,
    truth: npt.NDArray[np.float64] | None,
    mask: npt.NDArray[np.bool_],
) -> SubsetRecord:
    drop = mean_interval(differences(reference, artifact, truth)[mask])
    return SubsetRecord(
        name,
        int(mask.sum()),
        drop.value,
        (drop.low, drop.high),
        float(frame_errors(artifact.angles, reference.angles)[mask].mean()),
        float(np.abs(artifact.spread - reference.spread)[mask].mean()),
    )


def golden_vectors(
    reference: Prediction, artifact: Prediction, held_out: CropSet, file: str
) -> tuple[Golden, npt.NDArray[np.uint8]]:
    """Golden vectors: crops that spread over the held-out set in yaw, with their FP32 answers.

    Returns:
        The record, and the picture [8 S, S, 3] RGB to store as `file`.
    """
    order = np.argsort(reference.angles[:, 1], kind="stable")
    count = min(GOLDEN_COUNT, len(order))
    chosen = order[np.linspace(0, len(order) - 1, count).astype(int)]
    angles = reference.angles[chosen]
    golden = Golden(
        file,
        _triples(angles),
        _triples(reference.spread[chosen]),
        tolerance_degrees=tolerance(artifact.angles[chosen], angles),
    )
    size = held_out.crops.shape[1]
    return golden, held_out.crops[chosen].reshape(count * size, size, 3)


def tolerance(found: npt.ArrayLike, golden: npt.ArrayLike) -> float:
    """How far golden angles may be off, degrees: half as much again as when it was built.

    Args:
        found: angles of the artifact [n, 3] on the golden crops.
        golden: FP32 angles [n, 3].
    """
    worst = float(angle_errors(found, golden).max())
    return round(min(360.0, _TOLERANCE_FLOOR + _TOLERANCE_FACTOR * worst), 3)


def golden_picture(picture: npt.NDArray[np.uint8]) -> bytes:
    """The golden crops as a PNG file.

    Args:
        picture: uint8 [n S, S, 3], RGB.

    Raises:
        DataError: OpenCV cannot encode it.
    """
    done, data = cv2.imencode(".png", picture[..., ::-1])
    if not done:
        raise DataError("the golden crops cannot be encoded as PNG; install opencv again")
    return data.tobytes()


def _triples(values: npt.NDArray[np.float32]) -> tuple[tuple[float, float, float], ...]:
    # Six decimals are beyond float32 for angles; whole float64 digits would only be noise.
    return tuple((round(float(a), 6), round(float(b), 6), round(float(c), 6)) for a, b, c in values)
