"""One Euro filter on rotations.

Casiez, Roussel, Vogel: "1 Euro Filter: A Simple Speed-based Low-pass Filter for Noisy Input in
Interactive Systems", CHI 2012: a first-order low-pass whose cut-off rises with the speed of the
signal, so that a resting head does not tremble and a turning one does not trail.

On three Euler angles the same filter would couple axes near yaw +-90 degrees and depend on the
convention. Here it works on SO(3): with X the last filtered rotation and R the new one, the
difference is the rotation vector v = log(X^T R) in the tangent space at X, and the new filtered
rotation is X exp(alpha v). The speed is the length of the low-passed angular velocity
log(R_last^T R) / dt, in degrees per second.

Lag: for a head that turns at a constant speed w about one axis, the filtered rotation trails by
exactly 1 / (2 pi fc) seconds in the steady state, whatever the frame rate, where
fc = min_cutoff + beta w (see `lag_seconds`): with alpha = 1 / (1 + tau / dt) the error e of the
recursion obeys e = (1 - alpha)(e + w dt), hence e = w dt (1 - alpha) / alpha = w tau.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.pose import project_to_rotation
from edgehp.runtime.settings import FilterSettings

Array = npt.NDArray[np.float64]


def rotation_log(rotation: npt.ArrayLike) -> Array:
    """The rotation vector [3] in degrees (axis times angle, angle 0..180) of a rotation [3, 3]."""
    vector, _ = cv2.Rodrigues(np.asarray(rotation, np.float64))
    return np.degrees(np.asarray(vector, np.float64).ravel())


def rotation_exp(vector: npt.ArrayLike) -> Array:
    """The rotation [3, 3] of a rotation vector [3] in degrees; the inverse of `rotation_log`."""
    matrix, _ = cv2.Rodrigues(np.radians(np.asarray(vector, np.float64)))
    return np.asarray(matrix, np.float64)


def lag_seconds(min_cutoff: float, beta: float, speed: float = 0.0) -> float:
    """How far the filter trails a head that turns at a constant speed, in seconds.

    Args:
        min_cutoff: cut-off at rest, Hz.
        beta: rise of the cut-off, Hz per degree per second.
        speed: degrees per second.
    """
    return 1.0 / (2.0 * math.pi * (min_cutoff + beta * abs(speed)))


def _alpha(cutoff: float, dt: float) -> float:
    """Weight of the new sample in a first-order low-pass: 1 / (1 + tau / dt)."""
    return 1.0 / (1.0 + 1.0 / (2.0 * math.pi * cutoff * dt))


class RotationFilter:
    """One Euro filter whose signal is a rotation."""

    def __init__(self, settings: FilterSettings = FilterSettings()) -> None:  # noqa: B008 - frozen
        """A filter without history."""
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget the history: the next rotation is returned as it is."""
        self._time: float | None = None
        self._raw = np.eye(3)
        self._filtered = np.eye(3)
        self._velocity = np.zeros(3)

    @property
    def speed(self) -> float:
        """Length of the low-passed angular velocity, degrees per second."""
        return float(np.linalg.norm(self._velocity))

    def update(self, seconds: float, rotation: npt.ArrayLike) -> Array:
        """Filter one rotation.

        Args:
            seconds: when the frame was captured; a time that does not advance is ignored.
            rotation: [3, 3], canonical form of `edgehp.pose`.

        Returns:
            The filtered rotation [3, 3].
        """
        raw = np.asarray(rotation, np.float64)
        dt = None if self._time is None else seconds - self._time
        if dt is None or dt > self.settings.reset_after:
            self.reset()
            self._time, self._raw, self._filtered = seconds, raw, raw
            return raw
        if dt <= 0:
            return self._filtered
        velocity = rotation_log(self._raw.T @ raw) / dt
        self._velocity = self._velocity + _alpha(self.settings.speed_cutoff, dt) * (
            velocity - self._velocity
        )
        step = _alpha(self.settings.min_cutoff + self.settings.beta * self.speed, dt)
        difference = rotation_log(self._filtered.T @ raw)
        # Projected, or rounding would take it off the group within hours.
        self._filtered = project_to_rotation(self._filtered @ rotation_exp(step * difference))
        self._time, self._raw = seconds, raw
        return self._filtered
