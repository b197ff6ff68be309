"""Face boxes: the lists published with Sheka & Samun, and boxes from landmarks.

A list is JSON, ``{"file": [{"bbox": [x_min, y_min, x_max, y_max], "type": "train" | "test",
"faceid": 46712}]}``, in pixels; ``type`` and ``faceid`` may be missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.table import LARGEST_FRACTION
from edgehp.errors import DataError, UsageError
from edgehp.files import sha256_bytes
from edgehp.images import read_bytes

__all__ = [
    "LANDMARK_MARGIN",
    "LANDMARK_RULE",
    "SPLITS",
    "BoxEntry",
    "BoxList",
    "box_from_landmarks",
    "find_boxes",
    "load_boxes",
    "parse_box",
    "require_split",
]

SPLITS = ("train", "test")
# Hopenet and 6DRepNet evaluate AFLW2000 with this margin.
LANDMARK_MARGIN = 0.2
LANDMARK_RULE = f"landmarks, Hopenet's rule with k = {LANDMARK_MARGIN}"


def parse_box(text: str) -> Box:
    """A box from ``"x_min,y_min,x_max,y_max"`` in pixels.

    Raises:
        UsageError: it is something else, or no box.
    """
    try:
        values = [float(part) for part in text.split(",")]
        x0, y0, x1, y1 = values
    except ValueError:
        raise UsageError(f"--boxes {text!r}: expected x_min,y_min,x_max,y_max in pixels") from None
    if not (all(abs(v) < 1e5 for v in values) and x0 < x1 and y0 < y1):
        raise UsageError(f"--boxes {text!r}: expected x_min < x_max and y_min < y_max, in pixels")
    return Box(x0, y0, x1, y1)


@dataclass(frozen=True)
class BoxEntry:
    """One face of a list: its box, its split if given, its face number if given."""

    box: Box
    split: str | None = None
    face_id: int | None = None


@dataclass(frozen=True)
class BoxList:
    """A published list.

    Attributes:
        faces: the faces of every file, by the file's path within the data set.
        source: the list's file name and the start of its SHA-256, for protocols.
    """

    faces: Mapping[str, Sequence[BoxEntry]]
    source: str

    def chosen(self, file: str, split: str | None) -> list[BoxEntry]:
        """The faces of `file` in `split`; all where `split` is None."""
        return [e for e in self.faces.get(file, ()) if split in (None, e.split)]

    def files(self, split: str | None) -> list[str]:
        """The files with a face in `split`.

        Raises:
            DataError: the list has no such split.
        """
        files = [f for f in self.faces if self.chosen(f, split)]
        if not files:
            raise DataError(f"{self.source}: the list has no faces of split {split!r}")
        return files


def load_boxes(path: Path) -> BoxList:
    """Read a published box list.

    Raises:
        DataError: missing, not JSON, or an entry is not as described above; the message names it.
    """
    data = read_bytes(path, "a JSON list of face boxes")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: expected a JSON list of face boxes: {e}") from e
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path}: expected {{"file": [{{"bbox": [...]}}]}}, found no files')
    faces = {}
    for file, entries in content.items():
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: {file}: expected a list of faces")
        faces[file] = tuple(_entry(e, f"{path}: {file}") for e in entries)
    first = [e.box for entries in faces.values() for e in entries]
    if all(max(map(abs, (b.x_min, b.y_min, b.x_max, b.y_max))) <= LARGEST_FRACTION for b in first):
        raise DataError(
            f"{path}: all {len(first)} boxes lie between 0 and 1, as fractions of the photo do; "
            "expected pixels\nhint: multiply x by the photo's width and y by its height"
        )
    digest = sha256_bytes(data)[:16]
    return BoxList(faces, f"{path.name} (sha256 {digest})")


def _entry(entry: Any, at: str) -> BoxEntry:
    box = entry.get("bbox") if isinstance(entry, dict) else None
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(v) in (int, float) and math.isfinite(v) for v in box)
        or box[0] >= box[2]
        or box[1] >= box[3]
    ):
        raise DataError(f"{at}: expected bbox [x_min, y_min, x_max, y_max], found {box!r}")
    split, face_id = entry.get("type"), entry.get("faceid")
    if split is not None and split not in SPLITS:
        raise DataError(f"{at}: expected type train or test, found {split!r}")
    if face_id is not None and not isinstance(face_id, int):
        raise DataError(f"{at}: expected a whole number as faceid, found {face_id!r}")
    return BoxEntry(Box(*map(float, box)), split, face_id)


def find_boxes(root: Path, file: str, boxes: Path | str | None) -> BoxList | None:
    """The box list to use.

    Args:
        root: the data set's folder.
        file: the usual name of its list, e.g. ``"BIWI.json"``.
        boxes: the list that was asked for; None looks for ``boxes.json`` and `file` in `root`,
            then for `file` beside it and in a folder ``boxes`` beside it.

    Returns:
        The list, None if none was asked for and none is there.

    Raises:
        DataError: the list cannot be read.
    """
    if boxes is not None:
        return load_boxes(Path(boxes))
    beside = root.resolve().parent
    for path in (root / "boxes.json", root / file, beside / file, beside / "boxes" / file):
        if path.is_file():
            return load_boxes(path)
    return None


def require_split(split: str | None, boxes: BoxList | None, name: str) -> None:
    """Check that `split` can be had.

    Raises:
        UsageError: `split` is not a split, or there is no list to say which face belongs to it.
    """
    if split is None:
        return
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is none of {', '.join(SPLITS)}")
    if boxes is None:
        raise UsageError(f"{name}: the split {split!r} needs a box list that defines it (--boxes)")


def box_from_landmarks(points: npt.ArrayLike, margin: float = LANDMARK_MARGIN) -> Box:
    """The face box around landmarks, by Hopenet's rule.

    With `margin` k: 2k to the left and on top, then k to the right and 0.6k below, the last two
    of the sides already widened by the first two (read in Hopenet's published loader).

    Args:
        points: [2, n], x and y in pixels.
        margin: k.

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
    x_min -= 2 * margin * (x_max - x_min)
    y_min -= 2 * margin * (y_max - y_min)
    x_max += margin * (x_max - x_min)
    y_max += 0.6 * margin * (y_max - y_min)
    return Box(x_min, y_min, x_max, y_max)
