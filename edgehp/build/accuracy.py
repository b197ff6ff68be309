"""The accuracy gate of a build: the artifact against FP32 on held-out crops."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact.manifest import Accuracy, Golden
from edgehp.build.crops import CropSet
from edgehp.engines.base import Engine, Prediction
from edgehp.errors import AccuracyError, DataError
from edgehp.pose import angle_errors
from edgehp.validation.gate import require_drop
from edgehp.validation.metrics import frame_errors
from edgehp.validation.statistics import mean_interval

__all__ = ["golden_picture", "golden_vectors", "measure", "predict", "tolerance"]

GOLDEN_COUNT = 8
# Another device rounds differently: kernels of one graph agree within hundredths of a degree.
_TOLERANCE_FLOOR = 0.25
_TOLERANCE_FACTOR = 1.5


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
) -> tuple[Accuracy, str | None]:
    """Compare the artifact's predictions with those of FP32 and hold the drop against the gate.

    With labels the drop is the difference of the mean absolute errors; without, the mean absolute
    difference from FP32, which bounds it from above. The interval is a paired bootstrap.

    Returns:
        The record, and a warning where the interval crosses the gate.

    Raises:
        AccuracyError: the drop is above the gate.
    """
    means: tuple[float | None, float | None] = (None, None)
    if held_out.angles is not None:
        before = frame_errors(reference.angles, held_out.angles)
        after = frame_errors(artifact.angles, held_out.angles)
        differences, metric, words = after - before, "mae-drop", ""
        means = (float(before.mean()), float(after.mean()))
    else:
        differences = frame_errors(artifact.angles, reference.angles)
        metric, words = "deviation", "without labels the deviation from FP32 counts as drop; "
    drop = mean_interval(differences)
    try:
        result = require_drop(drop, max_drop)
    except AccuracyError as e:
        raise AccuracyError(f"no artifact was made: on {held_out.source}, {words}{e}") from e
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
    )
    return accuracy, None if result.certain else f"{words}{result.sentence}"


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
