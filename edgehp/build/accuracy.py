"""The accuracy gate of a build: the artifact against FP32 on held-out crops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import Accuracy, Golden
from edgehp.build.crops import CropSet
from edgehp.engines.base import Engine, Prediction
from edgehp.errors import AccuracyError, DataError
from edgehp.pose import angle_errors
from edgehp.validation.metrics import frame_errors
from edgehp.validation.statistics import mean_interval

__all__ = ["Measured", "enforce", "golden_vectors", "measure", "predict"]

GOLDEN_COUNT = 8
# Another device rounds differently: kernels of one graph agree within hundredths of a degree.
_TOLERANCE_FLOOR = 0.25
_TOLERANCE_FACTOR = 1.5


@dataclass(frozen=True, eq=False)
class Measured:
    """Predictions of the FP32 reference and of the artifact on the same crops."""

    reference: Prediction
    artifact: Prediction
    accuracy: Accuracy


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


def measure(
    reference: Prediction,
    artifact: Prediction,
    held_out: CropSet,
    max_drop: float,
    measured_with: str,
) -> Measured:
    """Compare the artifact's predictions with those of FP32.

    With labels the drop is the difference of the mean absolute errors; without, the mean absolute
    difference from FP32, which bounds it from above. The interval is a paired bootstrap.
    """
    if held_out.angles is not None:
        before = frame_errors(reference.angles, held_out.angles)
        after = frame_errors(artifact.angles, held_out.angles)
        differences, metric = after - before, "mae-drop"
        means: tuple[float | None, float | None] = (float(before.mean()), float(after.mean()))
    else:
        differences = frame_errors(artifact.angles, reference.angles)
        metric, means = "deviation", (None, None)
    interval = mean_interval(differences)
    accuracy = Accuracy(
        dataset=held_out.source,
        count=len(held_out),
        metric=metric,
        reference=means[0],
        artifact=means[1],
        drop=interval.value,
        interval=(interval.low, interval.high),
        max_drop=max_drop,
        measured_with=measured_with,
        protocol=held_out.protocol,
    )
    return Measured(reference, artifact, accuracy)


def enforce(accuracy: Accuracy) -> None:
    """Stop the build where the drop is above the gate.

    Raises:
        AccuracyError: it is.
    """
    # Written so that NaN fails too.
    if accuracy.drop <= accuracy.max_drop:
        return
    low, high = accuracy.interval
    what = "mean absolute error" if accuracy.metric == "mae-drop" else "deviation from FP32"
    raise AccuracyError(
        f"the {what} on {accuracy.dataset} ({accuracy.count} crops) is {accuracy.drop:.3f} degrees "
        f"worse than FP32 (95 % interval {low:.3f} to {high:.3f}), at most {accuracy.max_drop:g} "
        "allowed; no artifact was made: calibrate on more or other crops, try another "
        "--calibration-method or precision, or raise --max-drop if you accept the loss"
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
    angles, spread = reference.angles[chosen], reference.spread[chosen]
    worst = float(angle_errors(artifact.angles[chosen], angles).max())
    golden = Golden(
        file,
        _triples(angles),
        _triples(spread),
        tolerance_degrees=round(min(360.0, _TOLERANCE_FLOOR + _TOLERANCE_FACTOR * worst), 3),
    )
    size = held_out.crops.shape[1]
    return golden, held_out.crops[chosen].reshape(count * size, size, 3)


def _triples(values: npt.NDArray[np.float32]) -> tuple[tuple[float, float, float], ...]:
    # Six decimals are beyond float32 for angles; whole float64 digits would only be noise.
    return tuple((round(float(a), 6), round(float(b), 6), round(float(c), 6)) for a, b, c in values)
