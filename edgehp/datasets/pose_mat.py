"""Photo and `.mat` pairs, the layout of AFLW2000-3D and 300W-LP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.base import Sample, Skips, labels_from_angles, within
from edgehp.datasets.boxes import BoxList, box_from_landmarks
from edgehp.datasets.mat5 import read_mat
from edgehp.datasets.stores import FilePhoto
from edgehp.errors import DataError
from edgehp.images import require_utf8
from edgehp.pose import to_aflw2000

__all__ = ["PoseMat", "paired_samples", "read_pose_mat"]

Array = npt.NDArray[np.float64]

# Half a turn: the median of labels in radians cannot be beyond it, that of labels in degrees is.
_MOST_IN_RADIANS_DEGREES = 180.0


@dataclass(frozen=True, eq=False)
class PoseMat:
    """What a `.mat` file says: (pitch, yaw, roll) [3] in degrees, and landmarks [2, n] or None."""

    angles: Array
    landmarks: Array | None


def read_pose_mat(path: Path) -> PoseMat:
    """Read the pose and the landmarks of an AFLW2000-3D or 300W-LP file.

    ``Pose_Para[0, :3]`` is pitch, yaw, roll in radians. The landmarks are ``pt3d_68`` (AFLW2000:
    all 68, hidden ones too), else ``pt2d`` without the points at (-1, -1), which AFLW2000 writes
    for hidden ones and which would stretch the box to the photo's corner.

    Raises:
        DataError: missing or damaged, or without a usable ``Pose_Para``.
    """
    found = read_mat(path, ("Pose_Para", "pt2d", "pt3d_68"))
    pose = found.get("Pose_Para")
    if pose is None or pose.ndim != 2 or pose.shape[0] != 1 or pose.shape[1] < 3:
        shape = "none" if pose is None else str(list(pose.shape))
        raise DataError(f"{path}: expected Pose_Para [1, 7] (pitch, yaw, roll, ...), found {shape}")
    points = found.get("pt3d_68", found.get("pt2d"))
    if points is not None:
        if points.ndim != 2 or points.shape[0] not in (2, 3):
            raise DataError(f"{path}: expected landmarks [2, n], found {list(points.shape)}")
        points = points[:2]
        if "pt3d_68" not in found:
            points = points[:, (points >= 0).all(axis=0)]
    return PoseMat(to_aflw2000(pose[0, :3], "300w-lp"), points)


def paired_samples(
    root: Path,
    photos: Iterable[Path],
    boxes: BoxList | None,
    max_angle: float | None,
    skips: Skips,
) -> tuple[list[Sample], list[str]]:
    """Samples of photos with a `.mat` file beside each.

    Args:
        root: the data set's folder; names are relative to it.
        photos: paths of the photos, there or not.
        boxes: the list to take the boxes from; landmarks where None.
        max_angle: leave out samples with an |angle| above it, degrees; None keeps all.
        skips: takes the bad ones.

    Returns:
        The samples, and the names of those left out by their angles.

    Raises:
        DataError: a bad photo, unless `skips` takes it; or labels that cannot be radians.
    """
    samples: list[Sample] = []
    filtered: list[str] = []
    largest: list[float] = []
    for photo in photos:
        require_utf8(photo)
        name = photo.relative_to(root).as_posix()
        with skips.guard(name):
            if not photo.is_file():
                raise DataError(f"{photo}: the photo is missing, its .mat file is there")
            truth = read_pose_mat(photo.with_suffix(".mat"))
            matrix, angles = labels_from_angles(truth.angles, str(photo))
            largest.append(float(np.abs(angles).max()))
            if within(angles, max_angle):
                box = _box(name, photo, boxes, truth)
                samples.append(Sample(name, FilePhoto(photo), box, matrix, angles))
            else:
                filtered.append(name)
    _refuse_degrees(largest, len(filtered), root)
    return samples, filtered


def _refuse_degrees(largest: Sequence[float], filtered: int, root: Path) -> None:
    """Refuse labels of which half cannot be angles of a head in radians.

    Not any one: a few files of AFLW2000-3D itself are beyond two turns. Half, and not all: small
    angles in degrees would pass for radians and the filter, and be validated on.

    Args:
        largest: the largest |angle| of each photo, degrees as converted.
        filtered: how many photos the angle filter left out.
        root: the data set's folder.
    """
    if not largest or (median := float(np.median(largest))) <= _MOST_IN_RADIANS_DEGREES:
        return
    raise DataError(
        f"{root}: half of the {len(largest)} .mat files hold an angle beyond {median:.0f} degrees "
        f"({filtered} are left out by the angle filter): Pose_Para must be pitch, yaw, roll in "
        f"radians, and {np.radians(median):.3g} looks like degrees; multiply them by pi/180"
    )


def _box(name: str, photo: Path, boxes: BoxList | None, truth: PoseMat) -> Box:
    if boxes is not None:
        faces = boxes.chosen(name, None)
        if len(faces) != 1:
            raise DataError(f"{photo}: expected one face in {boxes.source}, found {len(faces)}")
        return faces[0].box
    if truth.landmarks is None:
        raise DataError(f"{photo}: no landmarks in its .mat file; give a box list (--boxes)")
    try:
        return box_from_landmarks(truth.landmarks)
    except DataError as e:
        raise DataError(f"{photo}: {e}") from e
