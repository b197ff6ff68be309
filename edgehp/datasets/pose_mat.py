"""AFLW2000-3D and 300W-LP: photos, and beside each a `.mat` file with its pose and landmarks.

Validation runs on the device, where scipy is not installed, and these files need little of their
format ("MAT-File Format", The MathWorks, chapter 1, "Level 5"): real numeric matrices,
zlib-compressed or not. Everything else in a file is passed over.
"""

from __future__ import annotations

import logging
import math
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.base import Dataset, PoseSamples, Sample, labels_from_angles
from edgehp.datasets.lists import BoxList, find_boxes
from edgehp.datasets.stores import Photo
from edgehp.errors import DataError
from edgehp.files import read_bytes, require_utf8
from edgehp.images import is_apple_double, report_left_out
from edgehp.pose import to_aflw2000

Array = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)

AFLW2000_LAYOUT = "imageNNNNN.jpg and imageNNNNN.mat"
W300LP_LAYOUT = "folders AFW, AFW_Flip, HELEN, ... with NAME.jpg and NAME.mat"
_FOLDERS = tuple(f"{n}{flip}" for n in ("AFW", "HELEN", "IBUG", "LFPW") for flip in ("", "_Flip"))
# Hopenet and 6DRepNet evaluate AFLW2000 with this margin.
LANDMARK_MARGIN = 0.2
LANDMARK_RULE = f"landmarks, Hopenet's rule with k = {LANDMARK_MARGIN}"
_MATRIX, _COMPRESSED = 14, 15
# Data types of the format (table 1-1) that hold numbers.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_NUMERIC_CLASSES = range(6, 16)  # mxDOUBLE_CLASS .. mxUINT64_CLASS
# 300W-LP's largest variable has some thousand bytes; more is an attack on memory.
_LARGEST_VARIABLE = 16 * 2**20


def read_aflw2000(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Read AFLW2000-3D, whole or a part of it: what is in the folder is the data set.

    Args:
        root: the folder.
        boxes: a published box list; ``"landmarks"`` takes the boxes from the landmarks; None looks
            for a list (see `edgehp.datasets.lists.find_boxes`), then takes landmarks.
        skip_bad: list missing and damaged files under ``skipped`` instead of raising.

    Raises:
        DataError: no photos, or one is without its pair or its box.
    """
    folder = Path(root)
    photos = _pairs(folder, "image", report=str(folder))
    if not photos:
        raise DataError(f"{folder}: no AFLW2000-3D photos; expected {AFLW2000_LAYOUT}")
    listed = None if boxes == "landmarks" else find_boxes(folder, "AFLW2000.json", boxes)
    absent = [] if listed is None else sorted(set(listed.faces) - {p.name for p in photos})
    found = _read("aflw2000", folder, photos, listed, skip_bad, listed_without_photo=len(absent))
    if absent:
        logger.warning(
            "aflw2000: %d photos of the box list are not in the folder: figures are of a part",
            len(absent),
        )
    return found


def read_300w_lp(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Read 300W-LP: folders AFW, HELEN, IBUG, LFPW and their mirror images.

    Args:
        root: the folder that holds AFW, HELEN, ..., or the folder ``300W_LP`` around it.
        boxes: a box list (keys ``AFW/NAME.jpg``); ``"landmarks"`` or, without a list, None takes
            the boxes from the landmarks. Hopenet draws the margin at random while training; here
            it is fixed, since augmentation is the training's business.
        skip_bad: list missing and damaged files under ``skipped`` instead of raising.

    Raises:
        DataError: no photos, or one is without its pair or its box.
    """
    folder = Path(root)
    if (folder / "300W_LP").is_dir():
        folder = folder / "300W_LP"
    present = [f for f in _FOLDERS if (folder / f).is_dir()]
    photos = [p for name in present for p in _pairs(folder / name, report=str(folder / name))]
    if not photos:
        raise DataError(f"{folder}: no 300W-LP photos; expected {W300LP_LAYOUT}")
    listed = None if boxes == "landmarks" else find_boxes(folder, "300W_LP.json", boxes)
    return _read("300w-lp", folder, photos, listed, skip_bad, folders=present)


def _pairs(folder: Path, start: str = "", *, report: str) -> list[Path]:
    """The photos of a folder, there or not, by the names of their halves that are there.

    Args:
        folder: with photos and `.mat` files; its subfolders are none of the data set.
        start: of the names.
        report: what to call the folder where files are left out.
    """
    stems: set[str] = set()
    left_out = Counter[str]()
    others: list[str] = []
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for path in folder.iterdir():
        if is_apple_double(path.name):
            left_out["of macOS ('._')"] += 1
        elif path.suffix in (".jpg", ".mat") and path.name.startswith(start):
            stems.add(path.stem)
        elif path.suffix in (".jpg", ".mat"):
            left_out[f"whose names do not begin with {start!r}"] += 1
        elif path.suffix.lower() in (".jpg", ".jpeg", ".png", ".mat"):
            left_out[f"called {path.suffix}, expected .jpg and .mat"] += 1
        elif not path.is_dir():
            others.append(path.name)
    report_left_out(report, left_out, others, lists=False)
    return [folder / f"{stem}.jpg" for stem in sorted(stems)]


def _read(
    name: str,
    root: Path,
    photos: Iterable[Path],
    boxes: BoxList | None,
    skip_bad: bool,
    **more: Any,
) -> Dataset:
    """A data set of photos with a `.mat` file beside each.

    Args:
        name: of the data set and of its convention.
        root: the data set's folder; names are relative to it.
        photos: paths of the photos, there or not.
        boxes: the list to take the boxes from; landmarks where None.
        skip_bad: list bad photos instead of raising.
        more: further JSON values for the protocol.

    Raises:
        DataError: a bad photo; labels that cannot be radians; or no samples are left.
    """
    found = PoseSamples(name, skip_bad)
    for photo in photos:
        require_utf8(photo)
        own = photo.relative_to(root).as_posix()
        with found.skips.guard(own):
            if not photo.is_file():
                what = "leads nowhere" if photo.is_symlink() else "is missing"
                raise DataError(f"{photo}: the photo {what}, its .mat file is there")
            truth = read_pose_mat(photo.with_suffix(".mat"))
            matrix, angles = labels_from_angles(truth.angles, str(photo))
            if found.keeps(own, angles):
                box = _box(own, photo, boxes, truth)
                found.samples.append(Sample(own, Photo(photo), box, matrix, angles))
    found.refuse_degrees(f"{root}: the .mat files", "Pose_Para")
    return found.dataset(LANDMARK_RULE if boxes is None else boxes.source, **more)


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


def _box(name: str, photo: Path, boxes: BoxList | None, truth: PoseMat) -> Box:
    if boxes is not None:
        faces = boxes.of(name)
        if len(faces) != 1:
            raise DataError(f"{photo}: expected one face in {boxes.source}, found {len(faces)}")
        return faces[0].box
    if truth.landmarks is None:
        raise DataError(f"{photo}: no landmarks in its .mat file; give a box list (--boxes)")
    try:
        return box_from_landmarks(truth.landmarks)
    except DataError as e:
        raise DataError(f"{photo}: {e}") from e


def box_from_landmarks(points: npt.ArrayLike) -> Box:
    """The face box around landmarks, by Hopenet's rule.

    With `LANDMARK_MARGIN` k: 2k to the left and on top, then k to the right and 0.6k below, the
    last two of the sides already widened by the first two (read in Hopenet's published loader).

    Args:
        points: [2, n], x and y in pixels.

    Raises:
        DataError: fewer than 2 points, not finite, or all in one place.
    """
    p = np.asarray(points, np.float64)
    if p.ndim != 2 or p.shape[0] != 2 or p.shape[1] < 2 or not np.all(np.isfinite(p)):
        raise DataError(f"expected at least 2 finite landmarks [2, n], found {list(p.shape)}")
    x_min, y_min = map(float, p.min(axis=1))
    x_max, y_max = map(float, p.max(axis=1))
    if x_min == x_max or y_min == y_max:
        raise DataError("all landmarks lie on one line: no box can be made of them")
    x_min -= 2 * LANDMARK_MARGIN * (x_max - x_min)
    y_min -= 2 * LANDMARK_MARGIN * (y_max - y_min)
    x_max += LANDMARK_MARGIN * (x_max - x_min)
    y_max += 0.6 * LANDMARK_MARGIN * (y_max - y_min)
    return Box(x_min, y_min, x_max, y_max)


# --- MATLAB 5 files ------------------------------------------------------------------------------


def read_mat(path: Path, names: Collection[str]) -> dict[str, Array]:
    """Read the real numeric arrays called `names`.

    Args:
        path: a MATLAB 5 file.
        names: the variables wanted; those the file does not have are missing from the result.

    Returns:
        float64 arrays in MATLAB's shape, by name.

    Raises:
        DataError: missing, truncated, damaged, or no MATLAB 5 file.
    """
    data = read_bytes(path, "a MATLAB 5 file")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128], "")
    if not order or not data.startswith(b"MATLAB 5.0"):
        raise DataError(f"{path}: expected a MATLAB 5 file, found bytes {data[:10]!r}")
    found: dict[str, Array] = {}
    try:
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                kind, body = next(_elements(_inflate(body), order))
            if kind == _MATRIX and (variable := _variable(body, order, names)) is not None:
                found[variable[0]] = variable[1]
                if len(found) == len(names):
                    break
    except (ValueError, struct.error, zlib.error, StopIteration) as e:
        raise DataError(f"{path}: truncated or damaged MATLAB file ({e}); fetch it again") from e
    return found


def _inflate(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    data = inflater.decompress(body, _LARGEST_VARIABLE)
    if inflater.unconsumed_tail:
        raise ValueError(f"a variable of more than {_LARGEST_VARIABLE} bytes")
    if not inflater.eof:
        raise ValueError("compressed data end early")
    return data


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The (type, bytes) of one data element after the other."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:  # small element: type and size share a word, the data are in the other
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
        else:
            start = at + 8
            # Compressed elements are not padded, all others are, to 8 bytes.
            end = start + (size if kind == _COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes goes beyond the end")
        yield kind, data[start : start + size]
        at = end


def _variable(body: bytes, order: str, names: Collection[str]) -> tuple[str, Array] | None:
    """Name and values of a matrix, None if it is not wanted or not real and numeric."""
    parts = _elements(body, order)
    flags = struct.unpack_from(order + "I", next(parts)[1])[0]
    shape = np.frombuffer(next(parts)[1], order + "i4").tolist()
    name = next(parts)[1].decode("latin-1")
    if name not in names:
        return None
    complex_values = flags & 0x0800
    if flags & 0xFF not in _NUMERIC_CLASSES or complex_values:
        return None
    kind, raw = next(parts)
    if kind not in _NUMBERS:
        raise ValueError(f"{name} has data of unknown type {kind}")
    values = np.frombuffer(raw, order + _NUMBERS[kind])
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"{name} has {values.size} values, its shape is {shape}")
    return name, values.astype(np.float64).reshape(shape, order="F")
