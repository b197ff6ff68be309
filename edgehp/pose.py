"""Head rotations: the only module that knows signs, axis orders and units.

Canonical form
    A rotation matrix ``R`` [..., 3, 3] (float64) in the camera frame of OpenCV and of BIWI:
    x to the image's right, y down, z away from the camera; ``R @ v`` takes a vector from the head
    frame (the same axes for a face that looks straight into the camera) to the camera frame.
    The identity is a frontal face.

Angles
    edgehp speaks of ``(pitch, yaw, roll)``, degrees, in this order everywhere, in the sense of the
    ``Pose_Para`` of AFLW2000-3D and 300W-LP (convention ``"aflw2000"``):

    * +pitch: the nose goes up,
    * +yaw: the nose goes to the image's left,
    * +roll: the head turns clockwise as seen in the image.

    ``R = Rx(-pitch) @ Ry(yaw) @ Rz(roll)``, intrinsic XYZ, with the usual right-handed elementary
    rotations. This equals 300W-LP's own y-up form ``Rx(-p) Ry(-y) Rz(-r)`` conjugated with
    ``S = diag(1, -1, -1)``, which swaps the y-up camera frame with this one.

Other conventions are signs on the three numbers (`CONVENTIONS`). Functions accept any leading
shape ``[...]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError

Array = npt.NDArray[np.float64]

# Mirror image: x changes its sign.
_MIRROR = np.diag([-1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Convention:
    """How a data set or network writes a head pose as three numbers.

    Attributes:
        name: the convention's name in configuration files and manifests.
        signs: factors that take (pitch, yaw, roll) of this convention to ``"aflw2000"``; each is
            its own inverse.
        radians: whether files of this convention hold radians (else degrees).
    """

    name: str
    signs: tuple[int, int, int]
    radians: bool = False


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        c.name: c
        for c in (
            # AFLW2000-3D .mat: Pose_Para[0, :3] in degrees.
            Convention("aflw2000", (1, 1, 1)),
            # 300W-LP .mat: Pose_Para[0, :3].
            Convention("300w-lp", (1, 1, 1), radians=True),
            # Rotation.from_matrix(R).as_euler("XYZ", degrees=True) of a BIWI pose file.
            Convention("biwi", (-1, 1, 1)),
            # Hopenet's BIWI angles: (pitch, yaw, roll) == as_euler("XYZ") * [-1, 1, 1].
            Convention("hopenet", (1, 1, 1)),
            # 6DRepNet's (pitch, yaw, roll) labels.
            Convention("sixdrepnet", (1, 1, 1)),
            # kd_oe_hpe (arXiv 2108.09183): Pose_Para in degrees times [-1, 1, 1].
            Convention("kd-resnet", (-1, 1, 1)),
            # AFLW's FacePose table; the sign of the roll is Hopenet's AFLW loader's.
            Convention("aflw", (1, 1, -1), radians=True),
        )
    }
)


def convention(name: str) -> Convention:
    """Return the convention called `name`.

    Raises:
        UsageError: no such convention.
    """
    try:
        return CONVENTIONS[name]
    except KeyError:
        known = ", ".join(sorted(CONVENTIONS))
        raise UsageError(f"unknown pose convention {name!r}; known: {known}") from None


def to_aflw2000(angles: npt.ArrayLike, source: str) -> Array:
    """Convert (pitch, yaw, roll) [..., 3] of convention `source` to degrees in ``"aflw2000"``.

    The numbers are taken in the unit the convention's files use (see `Convention.radians`).
    """
    c = convention(source)
    values = np.asarray(angles, np.float64) * np.asarray(c.signs, np.float64)
    return np.degrees(values) if c.radians else values


def wrap_degrees(angles: npt.ArrayLike) -> Array:
    """Wrap angles [...] in degrees into [-180, 180)."""
    return np.mod(np.asarray(angles, np.float64) + 180.0, 360.0) - 180.0


def _elementary(angle: Array, axis: int) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    out = np.zeros((*angle.shape, 3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out[..., axis, axis] = 1.0
    out[..., i, i] = c
    out[..., j, j] = c
    out[..., i, j] = -s
    out[..., j, i] = s
    return out


def matrix_from_euler(angles: npt.ArrayLike) -> Array:
    """Rotation matrices [..., 3, 3] from (pitch, yaw, roll) [..., 3], degrees, ``"aflw2000"``."""
    a = np.radians(_last_axis(angles, 3, "angles"))
    return _elementary(-a[..., 0], 0) @ _elementary(a[..., 1], 1) @ _elementary(a[..., 2], 2)


def euler_from_matrix(matrix: npt.ArrayLike) -> Array:
    """(pitch, yaw, roll) [..., 3], degrees, ``"aflw2000"``, from matrices [..., 3, 3].

    Yaw lies in [-90, 90], pitch and roll in [-180, 180]. At the gimbal lock (yaw = +-90) only
    pitch and roll together are defined; roll is then set to 0.
    """
    m = _matrices(matrix)
    # R = Rx(a) Ry(b) Rz(c): R[0,2] = sin b, R[0,0] = cos b cos c, R[0,1] = -cos b sin c,
    # R[1,2] = -sin a cos b, R[2,2] = cos a cos b. Read off by multiplying the three out.
    horizontal = np.hypot(m[..., 0, 0], m[..., 0, 1])
    b = np.arctan2(m[..., 0, 2], horizontal)
    locked = horizontal < 1e-9
    a = np.where(
        locked,
        np.arctan2(m[..., 2, 1], m[..., 1, 1]),
        np.arctan2(-m[..., 1, 2], m[..., 2, 2]),
    )
    c = np.where(locked, 0.0, np.arctan2(-m[..., 0, 1], m[..., 0, 0]))
    return np.asarray(np.degrees(np.stack([-a, b, c], axis=-1)))


def matrix_from_quaternion(quaternion: npt.ArrayLike) -> Array:
    """Matrices [..., 3, 3] from quaternions (x, y, z, w) [..., 4] of any non-zero length.

    Raises:
        DataError: a quaternion is zero or not finite.
    """
    q = _last_axis(quaternion, 4, "quaternion")
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    if not np.all(np.isfinite(length)) or np.any(length < 1e-12):
        raise DataError("a quaternion of length zero or with a non-finite part is no rotation")
    x, y, z, w = np.moveaxis(q / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)


def project_to_rotation(matrix: npt.ArrayLike) -> Array:
    """The rotation nearest to each matrix [..., 3, 3] in the Frobenius norm (SVD, det = +1)."""
    u, _, vt = np.linalg.svd(_matrices(matrix))
    sign = np.sign(np.linalg.det(u @ vt))
    u = u.copy()
    u[..., :, 2] *= sign[..., None]
    return np.asarray(u @ vt)


def mean_rotation(matrices: npt.ArrayLike, weights: Sequence[float] | Array | None = None) -> Array:
    """The chordal L2 mean of rotations [n, ..., 3, 3] over the first axis, as [..., 3, 3].

    Args:
        matrices: rotations, the first axis is averaged.
        weights: [n], non-negative; equal when omitted.
    """
    return project_to_rotation(np.average(_matrices(matrices), axis=0, weights=weights))


def rotation_spread(
    matrices: npt.ArrayLike, mean: npt.ArrayLike, weights: Sequence[float] | Array | None = None
) -> Array:
    """Root mean square geodesic distance, degrees, of rotations [n, ..., 3, 3] to their mean."""
    d = geodesic_degrees(_matrices(matrices), _matrices(mean)[None])
    return np.asarray(np.sqrt(np.average(d**2, axis=0, weights=weights)))


def geodesic_degrees(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """Geodesic distance in degrees, [0, 180], between rotations [..., 3, 3].

    Computed as 2 asin(norm(A - B) / sqrt 8), Frobenius norm, which keeps its accuracy near zero,
    where the usual acos((trace - 1) / 2) loses half of the digits.
    """
    chord = np.linalg.norm(_matrices(a) - _matrices(b), axis=(-2, -1)) / np.sqrt(8.0)
    return np.asarray(np.degrees(2.0 * np.arcsin(np.clip(chord, 0.0, 1.0))))


def vector_errors(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """Angles in degrees [..., 3] between the left, down and front axes of two rotations.

    Their mean over axes and samples is the MAEV of Cao et al., "A Vector-based Representation to
    Enhance Head Pose Estimation", WACV 2021 (section 3.2): the angle between matching columns.
    """
    ma, mb = _matrices(a), _matrices(b)
    half = np.linalg.norm(ma - mb, axis=-2) / 2.0
    return np.asarray(np.degrees(2.0 * np.arcsin(np.clip(half, 0.0, 1.0))))


def angle_errors(predicted: npt.ArrayLike, truth: npt.ArrayLike) -> Array:
    """Absolute wrapped differences [..., 3] in degrees, [0, 180], of Euler angles in degrees.

    The wrap is at 360 degrees only. Some published evaluations also take the minimum over +-180,
    which turns a random guess from 59.9 into 44.9 degrees; this one does not.
    """
    difference = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    return np.asarray(np.abs(wrap_degrees(difference)))


def flip_matrix(matrix: npt.ArrayLike) -> Array:
    """Rotations [..., 3, 3] of the mirrored photo."""
    return np.asarray(_MIRROR @ _matrices(matrix) @ _MIRROR)


def require_rotation(matrix: npt.ArrayLike, what: str, tolerance: float = 1e-3) -> Array:
    """Return `matrix` [3, 3] as float64 if it is a rotation.

    Raises:
        DataError: wrong shape, not finite, not orthogonal within `tolerance`, or a reflection.
    """
    m = np.asarray(matrix, np.float64)
    if m.shape != (3, 3) or not np.all(np.isfinite(m)):
        raise DataError(f"{what}: expected a finite 3x3 rotation matrix, found shape {m.shape}")
    error = float(np.abs(m @ m.T - np.eye(3)).max())
    if error > tolerance:
        raise DataError(f"{what}: not a rotation matrix, R R^T differs from 1 by {error:.3g}")
    if np.linalg.det(m) < 0:
        raise DataError(f"{what}: a reflection (determinant -1), expected a rotation")
    return m


def _matrices(matrix: npt.ArrayLike) -> Array:
    m = np.asarray(matrix, np.float64)
    if m.shape[-2:] != (3, 3):
        raise UsageError(f"expected matrices of shape [..., 3, 3], found {list(m.shape)}")
    return m


def _last_axis(values: npt.ArrayLike, size: int, what: str) -> Array:
    v = np.asarray(values, np.float64)
    if v.ndim == 0 or v.shape[-1] != size:
        raise UsageError(f"expected {what} of shape [..., {size}], found {list(v.shape)}")
    return v
