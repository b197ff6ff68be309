"""Signs, orders and conventions: a swapped one anywhere must fail here."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from edgehp import pose
from edgehp.errors import DataError, UsageError

NOSE = np.array([0.0, 0.0, -1.0])  # towards the camera
CROWN = np.array([0.0, -1.0, 0.0])  # up in the picture


@pytest.fixture
def angles(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform([-89, -89, -179], [89, 89, 179], (200, 3))


def test_where_positive_angles_turn_the_head() -> None:
    x, y, z = pose.matrix_from_euler([0, 30, 0]) @ NOSE
    assert (x, y) == (pytest.approx(-0.5), pytest.approx(0)) and z < 0, "to the picture's left"
    x, y, _ = pose.matrix_from_euler([30, 0, 0]) @ NOSE
    assert (x, y) == (pytest.approx(0), pytest.approx(-0.5)), "up"
    x, y, _ = pose.matrix_from_euler([0, 0, 30]) @ CROWN
    assert (x, y) == (pytest.approx(0.5), pytest.approx(-np.cos(np.radians(30)))), "clockwise"


def test_biwi_is_intrinsic_xyz_with_the_pitch_negated(angles: np.ndarray) -> None:
    matrix = Rotation.from_euler("XYZ", angles * [-1, 1, 1], degrees=True).as_matrix()
    np.testing.assert_allclose(pose.matrix_from_euler(angles), matrix, atol=1e-12)
    np.testing.assert_allclose(pose.euler_from_matrix(matrix), angles, atol=1e-9)


def test_300w_lp_is_the_same_rotation_seen_with_y_up(angles: np.ndarray) -> None:
    p, y, r = np.radians(angles).T

    def elementary(axis: str, t: np.ndarray) -> np.ndarray:
        return Rotation.from_rotvec(np.outer(t, np.eye(3)["xyz".index(axis)])).as_matrix()

    y_up = elementary("x", -p) @ elementary("y", -y) @ elementary("z", -r)
    s = np.diag([1, -1, -1])
    np.testing.assert_allclose(pose.matrix_from_euler(angles), s @ y_up @ s, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("aflw2000", [10, 20, 30], [10, 20, 30]),
        ("hopenet", [10, 20, 30], [10, 20, 30]),
        ("sixdrepnet", [10, 20, 30], [10, 20, 30]),
        ("kd-resnet", [10, 20, 30], [-10, 20, 30]),
        ("biwi", [10, 20, 30], [-10, 20, 30]),
        ("300w-lp", np.radians([10, 20, 30]), [10, 20, 30]),
        ("aflw", np.radians([10, 20, 30]), [10, 20, -30]),
    ],
)
def test_named_conventions(name: str, value: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(pose.to_aflw2000(value, name), expected)


def test_an_unknown_convention_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'bivi'.*biwi"):
        pose.convention("bivi")


def test_quaternions_agree_with_scipy(angles: np.ndarray) -> None:
    rotation = Rotation.from_euler("XYZ", angles * [-1, 1, 1], degrees=True)
    scaled = rotation.as_quat() * 3.7
    np.testing.assert_allclose(
        pose.euler_from_matrix(pose.matrix_from_quaternion(scaled)), angles, atol=1e-9
    )
    for bad in ([0, 0, 0, 0], [np.nan, 0, 0, 1]):
        with pytest.raises(DataError, match="quaternion"):
            pose.matrix_from_quaternion(bad)


def test_mirroring_agrees_for_angles_and_matrices(angles: np.ndarray) -> None:
    np.testing.assert_allclose(
        pose.matrix_from_euler(angles * [1, -1, -1]),
        pose.flip_matrix(pose.matrix_from_euler(angles)),
        atol=1e-12,
    )


def test_geodesic_distance_agrees_with_scipy_and_is_exact_near_zero(angles: np.ndarray) -> None:
    a, b = pose.matrix_from_euler(angles), pose.matrix_from_euler(angles[::-1])
    expected = (Rotation.from_matrix(a).inv() * Rotation.from_matrix(b)).magnitude()
    np.testing.assert_allclose(pose.geodesic_degrees(a, b), np.degrees(expected), atol=1e-6)
    tiny = pose.geodesic_degrees(np.eye(3), pose.matrix_from_euler([0, 1e-7, 0]))
    assert tiny == pytest.approx(1e-7, rel=1e-4)


def test_vector_errors_of_a_turn_about_one_axis() -> None:
    errors = pose.vector_errors(np.eye(3), pose.matrix_from_euler([0, 40, 0]))
    np.testing.assert_allclose(errors, [40, 0, 40], atol=1e-9)


def test_differences_wrap_at_360_and_not_at_180() -> None:
    np.testing.assert_allclose(pose.angle_errors([179, 0, 0], [-179, 170, 0]), [2, 170, 0])
    np.testing.assert_allclose(pose.wrap_degrees([180, -180, 540, 359]), [-180, -180, -180, -1])


def test_gimbal_lock_keeps_the_rotation() -> None:
    locked = pose.matrix_from_euler([20, 90, 30])
    again = pose.matrix_from_euler(pose.euler_from_matrix(locked))
    assert pose.geodesic_degrees(locked, again) < 1e-6


def test_mean_and_spread_of_rotations() -> None:
    parts = pose.matrix_from_euler([[0, 10, 0], [0, 20, 0]])
    mean = pose.mean_rotation(parts)
    np.testing.assert_allclose(pose.euler_from_matrix(mean), [0, 15, 0], atol=1e-9)
    assert pose.rotation_spread(parts, mean) == pytest.approx(5)
    weighted = pose.mean_rotation(parts, [1, 0])
    np.testing.assert_allclose(pose.euler_from_matrix(weighted), [0, 10, 0], atol=1e-9)
    assert pose.rotation_spread(parts, weighted, [1, 0]) == pytest.approx(0, abs=1e-6)


def test_the_nearest_rotation_of_a_reflection_is_a_rotation(rng: np.random.Generator) -> None:
    m = pose.project_to_rotation(rng.normal(size=(50, 3, 3)))
    np.testing.assert_allclose(np.linalg.det(m), 1)
    np.testing.assert_allclose(m @ np.swapaxes(m, 1, 2), np.tile(np.eye(3), (50, 1, 1)), atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3) * 1.1, "not a rotation"),
        (np.diag([1, 1, -1]), "reflection"),
        (np.full((3, 3), np.nan), "finite"),
        (np.eye(2), "3x3"),
    ],
)
def test_what_is_no_rotation_is_refused(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pose.require_rotation(matrix, "frame_00003_pose.txt")


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(UsageError, match=r"\[2\]"):
        pose.matrix_from_euler([1, 2])
    with pytest.raises(UsageError, match="matrices"):
        pose.euler_from_matrix(np.zeros((3, 4)))
