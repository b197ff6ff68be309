"""How far predicted head poses are from the truth, in plain data.

Euler errors wrap at 360 degrees only (see `edgehp.pose.angle_errors`). The geodesic distance and
the MAEV are taken between rotations, so they do not depend on the Euler order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError
from edgehp.pose import angle_errors, geodesic_degrees, matrix_from_euler, vector_errors

Array = npt.NDArray[np.float64]
Angles = npt.NDArray[np.floating]

ANGLE_NAMES = ("pitch", "yaw", "roll")
# |yaw| of the truth in degrees, (low, high]; the first takes 0 too. 99 is the usual filter.
YAW_BANDS = ((0.0, 30.0), (30.0, 60.0), (60.0, 99.0))


@dataclass(frozen=True)
class Summary:
    """Errors over a set of frames, all in degrees.

    Attributes:
        frames: how many.
        mae: mean absolute error of pitch, yaw, roll.
        mae_mean: mean of the three: the figure that papers call MAE.
        geodesic: mean geodesic distance.
        maev: mean angle between matching axes of truth and prediction (Cao et al., WACV 2021).
    """

    frames: int
    mae: tuple[float, float, float]
    mae_mean: float
    geodesic: float
    maev: float


@dataclass(frozen=True)
class Band:
    """A range of |yaw| of the truth, degrees, with its errors; None where no frame lies in it."""

    low: float
    high: float
    summary: Summary | None


@dataclass(frozen=True)
class Worst:
    """One of the frames with the largest mean absolute error; angles in degrees."""

    name: str
    error: float
    truth: tuple[float, float, float]
    predicted: tuple[float, float, float]


@dataclass(frozen=True)
class Accuracy:
    """Everything measured of one network on one set of frames."""

    overall: Summary
    bands: tuple[Band, ...]
    worst: tuple[Worst, ...]


def frame_errors(predicted: npt.ArrayLike, truth: npt.ArrayLike) -> Array:
    """A frame's absolute error averaged over pitch, yaw and roll: [n] degrees from [n, 3] each."""
    return np.asarray(angle_errors(predicted, truth).mean(axis=-1))


def mean_or_none(values: Angles | None, mask: npt.NDArray[np.bool_] | None = None) -> float | None:
    """The mean of `values`, or of the rows that `mask` chooses; None where there are none."""
    if values is None:
        return None
    return float(values.mean() if mask is None else values[mask].mean())


def yaw_bands(truth: npt.ArrayLike) -> list[tuple[float, float, npt.NDArray[np.bool_]]]:
    """(low, high, which frames) for each of `YAW_BANDS`, then for larger |yaw| where there is any.

    Args:
        truth: [n, 3] degrees, pitch, yaw, roll.
    """
    yaw = np.abs(np.asarray(truth, np.float64)[:, 1])
    bands = [
        (low, high, (yaw <= high) if low == 0 else (yaw > low) & (yaw <= high))
        for low, high in YAW_BANDS
    ]
    beyond = yaw > YAW_BANDS[-1][1]
    if beyond.any():
        bands.append((YAW_BANDS[-1][1], 180.0, beyond))
    return bands


def measure_accuracy(
    predicted: Angles,
    spread: Angles | None,
    truth: npt.ArrayLike,
    matrices: npt.ArrayLike,
    names: Sequence[str],
    worst: int = 10,
) -> Accuracy:
    """Compare predictions with the truth.

    Args:
        predicted: [n, 3] degrees, pitch, yaw, roll, convention ``"aflw2000"``.
        spread: [n, 3] degrees, which must be finite too; None of a network without bins.
        truth: [n, 3] degrees, as the data set publishes them.
        matrices: [n, 3, 3] canonical rotations of the truth.
        names: of the n frames.
        worst: how many of the worst frames to name.

    Raises:
        DataError: a prediction is not finite.
    """
    p = np.asarray(predicted, np.float64)
    s = None if spread is None else np.asarray(spread, np.float64)
    t = np.asarray(truth, np.float64)
    m = np.asarray(matrices, np.float64)
    n = len(names)
    bad = ~np.isfinite(p if s is None else np.concatenate([p, s], axis=1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"the network's answer is not finite for {int(bad.sum())} of {n} frames, the first "
            f"{names[int(np.argmax(bad))]!r}: the engine or its graph is broken"
        )
    errors = angle_errors(p, t)
    rotations = matrix_from_euler(p)
    geodesic = geodesic_degrees(rotations, m)
    vectors = vector_errors(rotations, m).mean(axis=-1)
    everything = np.ones(n, np.bool_)
    frame = errors.mean(axis=1)
    # Stable, so that equal errors are named in the data set's order on every machine.
    order = np.argsort(-frame, kind="stable")
    return Accuracy(
        overall=_summary(errors, geodesic, vectors, everything),
        bands=tuple(
            Band(low, high, _summary(errors, geodesic, vectors, mask) if mask.any() else None)
            for low, high, mask in yaw_bands(t)
        ),
        worst=tuple(
            Worst(names[i], float(frame[i]), _triple(t[i]), _triple(p[i])) for i in order[:worst]
        ),
    )


def _summary(
    errors: Array, geodesic: Array, vectors: Array, mask: npt.NDArray[np.bool_]
) -> Summary:
    chosen = errors[mask]
    return Summary(
        frames=int(mask.sum()),
        mae=_triple(chosen.mean(axis=0)),
        mae_mean=float(chosen.mean()),
        geodesic=float(geodesic[mask].mean()),
        maev=float(vectors[mask].mean()),
    )


def _triple(values: Angles) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
