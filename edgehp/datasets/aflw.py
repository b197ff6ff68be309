"""AFLW: poses and face rectangles in ``aflw.sqlite``, photos under ``flickr/``."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgehp.crop import Box
from edgehp.datasets.base import Dataset, PoseSamples, Sample, Skips, labels_from_angles
from edgehp.datasets.lists import BoxList, find_boxes, require_split
from edgehp.datasets.stores import Photo, inside
from edgehp.errors import DataError
from edgehp.files import stand_in
from edgehp.pose import to_aflw2000

LAYOUT = "data/aflw.sqlite and data/flickr/0/image00002.jpg ..."
LIST = "AFLW.json"
_DATABASES = ("aflw.sqlite", "data/aflw.sqlite")
_PHOTOS = ("data/flickr", "flickr", "data", ".")
# A face may have several rectangles in the database; its first is taken, as by a plain query.
_QUERY = """
SELECT Faces.face_id, FaceImages.filepath, FacePose.pitch, FacePose.yaw, FacePose.roll,
       FaceRect.x, FaceRect.y, FaceRect.w, FaceRect.h
FROM Faces
JOIN FaceImages ON FaceImages.file_id = Faces.file_id
LEFT JOIN FacePose ON FacePose.face_id = Faces.face_id
LEFT JOIN FaceRect ON FaceRect.face_id = Faces.face_id
ORDER BY FaceImages.filepath, Faces.face_id, FacePose.rowid, FaceRect.rowid
"""


@dataclass(frozen=True)
class _Face:
    face_id: int
    file: str
    angles: tuple[float, float, float] | None  # pitch, yaw, roll as in the database, radians
    rectangle: tuple[float, float, float, float] | None  # x, y, w, h in pixels

    @property
    def name(self) -> str:
        return f"{self.file}#{self.face_id}"


def read_aflw(
    root: Path | str,
    *,
    boxes: Path | str | None = None,
    skip_bad: bool = False,
    split: str | None = None,
) -> Dataset:
    """Read AFLW. A photo may hold several faces; a sample is called ``FILE#FACE_ID``.

    Args:
        root: the folder with ``aflw.sqlite``, or one around its folder ``data``.
        boxes: the published box list, whose faces are found by their ``faceid``; None looks for it
            beside the data and takes the database's rectangles if there is none.
        skip_bad: list missing and damaged faces under ``skipped`` instead of raising.
        split: ``"train"`` or ``"test"`` of the list; None takes both.

    Raises:
        DataError: no database, it is not AFLW's, or a face of the list or a photo is missing.
        UsageError: no such split.
    """
    folder = Path(root)
    database = next((folder / d for d in _DATABASES if (folder / d).is_file()), None)
    if database is None:
        raise DataError(f"{folder}: no aflw.sqlite; expected {LAYOUT}")
    faces = {f.face_id: f for f in _faces(database)}
    listed = find_boxes(folder, LIST, boxes)
    require_split(split, listed, "aflw")
    some = [f.file for f in faces.values()][:100]  # enough to find the photos' folder by
    photos = next(
        (folder / p for p in _PHOTOS if any((folder / p / f).is_file() for f in some)),
        folder / _PHOTOS[0],
    )
    found = PoseSamples("aflw", skip_bad)
    if listed is None:
        chosen = _by_rectangle(faces, found.skips)
    else:
        chosen = _by_list(faces, listed, split, found.skips)
    for face, box in chosen:
        with found.skips.guard(face.name):
            photo = photos / face.file
            if face.angles is None:
                raise DataError(f"{database}: face {face.face_id} of {face.file} has no pose")
            if not photo.is_file():
                raise DataError(f"{photo}: the photo of face {face.face_id} is missing")
            published = to_aflw2000(face.angles, "aflw")
            matrix, angles = labels_from_angles(published, f"{database}: face {face.face_id}")
            if found.keeps(face.name, angles):
                found.samples.append(Sample(face.name, Photo(photo), box, matrix, angles))
    found.refuse_degrees(f"{database}: the faces", "table FacePose")
    return found.dataset(
        "FaceRect of aflw.sqlite" if listed is None else listed.source,
        split=split,
        faces_without_pose=sum(f.angles is None for f in faces.values()),
    )


def _by_rectangle(faces: dict[int, _Face], skips: Skips) -> list[tuple[_Face, Box]]:
    """Faces with a pose, in the database's rectangles; those without are no pose samples."""
    chosen = []
    for face in faces.values():
        if face.angles is None:
            continue
        with skips.guard(face.name):
            if face.rectangle is None or min(face.rectangle[2:]) <= 0:
                raise DataError(f"aflw.sqlite: face {face.face_id} of {face.file} has no rectangle")
            x, y, w, h = face.rectangle
            chosen.append((face, Box(x, y, x + w, y + h)))
    return chosen


def _by_list(
    faces: dict[int, _Face], listed: BoxList, split: str | None, skips: Skips
) -> list[tuple[_Face, Box]]:
    chosen = []
    for file in sorted(listed.files(split)):
        for entry in listed.chosen(file, split):
            with skips.guard(f"{file}#{entry.face_id}"):
                at, number = f"{listed.source}: {file}", entry.face_id
                if number is None:
                    raise DataError(
                        f"{at}: expected a faceid, by which the database knows the face"
                    )
                face = faces.get(number)
                if face is None or face.file != file:
                    found = "nothing" if face is None else face.file
                    raise DataError(f"{at}: face {number} is not in the database (found {found})")
                chosen.append((face, entry.box))
    return chosen


def _faces(database: Path) -> list[_Face]:
    # Immutable: no lock or journal beside a data set that may lie on a read-only medium.
    uri = f"{database.resolve().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            rows = connection.execute(_QUERY).fetchall()
    except sqlite3.Error as e:
        with database.open("rb") as file:
            if (other := stand_in(file.read(512))) is not None:
                raise DataError(f"{database} is {other}") from e
        raise DataError(f"{database}: expected AFLW's sqlite database: {e}") from e
    faces: dict[int, _Face] = {}
    for face_id, file, *numbers in rows:
        if face_id in faces:
            continue
        at = f"{database}: face {face_id}"
        inside(str(file), at)
        pitch, yaw, roll, x, y, w, h = (_number(v, at) for v in numbers)
        faces[face_id] = _Face(
            face_id,
            str(file),
            None if pitch is None or yaw is None or roll is None else (pitch, yaw, roll),
            None if x is None or y is None or w is None or h is None else (x, y, w, h),
        )
    return list(faces.values())


def _number(value: object, at: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{at}: expected a number, found {value!r}")
    return float(value)
