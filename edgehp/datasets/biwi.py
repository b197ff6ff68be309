"""BIWI Kinect Head Pose: ``NN/frame_XXXXX_rgb.png`` with ``NN/frame_XXXXX_pose.txt``."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgehp.datasets.base import Dataset, PoseSamples, Sample
from edgehp.datasets.lists import find_boxes, require_split
from edgehp.datasets.stores import Photo
from edgehp.errors import DataError
from edgehp.files import decode_text, read_bytes
from edgehp.pose import euler_from_matrix, project_to_rotation, require_rotation

Array = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)

LAYOUT = "01/frame_00003_rgb.png and 01/frame_00003_pose.txt ... 24/..."
LIST = "BIWI.json"
_ROOTS = (".", "hpdb", "faces_0", "kinect_head_pose_db", "kinect_head_pose_db/hpdb")
_SEQUENCE = re.compile(r"[0-9]{2}")


def read_biwi(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
    split: str | None = None,
    rgb_cal: bool = False,
) -> Dataset:
    """Read BIWI, all of its sequences or those that are there.

    The truth is the rotation of the pose file, in the depth camera's axes; these are the canonical
    ones of `edgehp.pose`. Frames of a present sequence that the list does not name are left out and
    counted: the published list has 15,677 of the 15,678.

    Args:
        root: the folder with the sequences 01 to 24, or one around it (``hpdb``, ``faces_0``).
        boxes: the published box list; None looks for it beside the data.
        skip_bad: list missing and damaged files under ``skipped`` instead of raising.
        split: ``"train"`` or ``"test"`` of the list; None takes both.
        rgb_cal: turn the truth into the colour camera's axes with each sequence's ``rgb.cal``
            (about 1.2 degrees). Published figures do not, so it is off by default.

    Raises:
        DataError: no frames, no box list, or a file is missing or damaged.
        UsageError: no such split.
    """
    folder, sequences = _sequences(Path(root))
    listed = find_boxes(folder, LIST, boxes)
    if listed is None:
        raise DataError(
            f"{folder}: BIWI has no face boxes of its own\n"
            f"hint: give a box list (--boxes {LIST}), or put it into the folder"
        )
    require_split(split, listed, "biwi")
    found = PoseSamples("biwi", skip_bad)
    absent = {f.split("/")[0] for f in listed.files(split)} - set(sequences)
    on_disk = {
        f"{s}/{p.name}" for s in sequences for p in (folder / s).glob("frame_[0-9]*_rgb.png")
    }
    if absent:
        logger.warning(
            "biwi: sequences %s of the box list are not in the folder: figures are of a part",
            ", ".join(sorted(absent)),
        )
    calibrations: dict[str, Array] = {}
    for name in sorted(listed.files(split)):
        sequence = name.split("/")[0]
        if sequence in absent:
            continue
        with found.skips.guard(name):
            entries = listed.chosen(name, split)
            if len(entries) != 1 or not name.endswith("_rgb.png"):
                raise DataError(f"{listed.source}: {name}: expected one face of a _rgb.png frame")
            photo = folder / name
            if name not in on_disk:
                raise DataError(f"{photo}: the frame is missing; {listed.source} lists it")
            matrix = read_biwi_pose(photo.with_name(photo.name.replace("_rgb.png", "_pose.txt")))
            if rgb_cal:
                if sequence not in calibrations:
                    calibrations[sequence] = read_rgb_cal(folder / sequence / "rgb.cal")
                matrix = calibrations[sequence] @ matrix
            angles = euler_from_matrix(matrix)
            matrix.flags.writeable = angles.flags.writeable = False
            if found.keeps(name, angles):
                box = entries[0].box
                found.samples.append(Sample(name, Photo(photo), box, matrix, angles))
    return found.dataset(
        listed.source,
        split=split,
        rgb_cal=rgb_cal,
        frames_not_listed=sorted(on_disk - set(listed.faces)),
        sequences_absent=sorted(absent),
    )


def read_biwi_pose(path: Path) -> Array:
    """The canonical rotation [3, 3] of a pose file: three rows of the matrix, then the position.

    Raises:
        DataError: missing, or not a rotation and a position.
    """
    return _rotation(path, "a BIWI pose file", (9, 3), 0)


def read_rgb_cal(path: Path) -> Array:
    """The rotation [3, 3] from the depth camera's axes to the colour camera's.

    ``rgb.cal`` holds the colour camera's intrinsic matrix (9 numbers), distortion (4), rotation (9)
    and translation (3, mm) from the depth camera, ``x_rgb = R x_depth + t``, and the photo's width
    and height. Two published converters read the rotation in this direction.

    Raises:
        DataError: missing, or not such a file.
    """
    return _rotation(path, "a BIWI rgb.cal file", (9, 4, 9, 3, 2), 13)


def _rotation(path: Path, what: str, parts: tuple[int, ...], at: int) -> Array:
    """The rotation that begins with number `at` of a file of so many numbers."""
    try:
        words = decode_text(read_bytes(path, what), str(path)).split()
        numbers = [float(word) for word in words]
    except ValueError as e:
        raise DataError(f"{path}: expected {what}, found something else: {e}") from e
    if len(numbers) != sum(parts):
        raise DataError(
            f"{path}: expected {what} of {' + '.join(map(str, parts))} numbers, found "
            f"{len(numbers)} numbers"
        )
    # The files have six digits or fewer; the nearest rotation undoes their rounding.
    rough = require_rotation(np.reshape(numbers[at : at + 9], (3, 3)), str(path), tolerance=1e-2)
    return project_to_rotation(rough)


def _sequences(root: Path) -> tuple[Path, list[str]]:
    for inner in _ROOTS:
        folder = root / inner
        if folder.is_dir():
            names = [p.name for p in folder.iterdir() if p.is_dir() and _SEQUENCE.fullmatch(p.name)]
            if names:
                return folder, sorted(names)
    raise DataError(f"{root}: no BIWI sequences; expected {LAYOUT}")
