"""AFLW: a small database of the same schema, several faces a photo, signs of the angles."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgehp.crop import Box
from edgehp.datasets.aflw import read_aflw
from edgehp.errors import DataError, UsageError
from tests.dataset_trees import write

SCHEMA = """
CREATE TABLE Faces (face_id INTEGER PRIMARY KEY, file_id TEXT, db_id TEXT);
CREATE TABLE FacePose (face_id INTEGER, roll REAL, pitch REAL, yaw REAL, annot_type_id INTEGER);
CREATE TABLE FaceRect (face_id INTEGER, x INTEGER, y INTEGER, w INTEGER, h INTEGER);
CREATE TABLE FaceImages (image_id INTEGER PRIMARY KEY, db_id TEXT, file_id TEXT, filepath TEXT,
                         width INTEGER, height INTEGER);
INSERT INTO FaceImages VALUES (1, 'aflw', 'image00002.jpg', '0/image00002.jpg', 64, 48);
INSERT INTO FaceImages VALUES (2, 'aflw', 'image00004.jpg', '2/image00004.jpg', 64, 48);
INSERT INTO Faces VALUES (101, 'image00002.jpg', 'aflw'), (102, 'image00002.jpg', 'aflw'),
                         (103, 'image00004.jpg', 'aflw'), (104, 'image00004.jpg', 'aflw'),
                         (105, 'image00004.jpg', 'aflw');
INSERT INTO FacePose VALUES (101, 0.3, 0.1, 0.2, 1), (102, -0.3, -0.1, -0.2, 1),
                            (103, 0.0, 0.0, 2.5, 1), (105, 0.0, 0.5, 0.0, 1);
INSERT INTO FaceRect VALUES (101, 5, 6, 10, 20), (101, 0, 0, 1, 1), (102, 30, 6, 10, 10),
                            (103, 1, 2, 3, 4), (104, 1, 2, 3, 4), (105, 7, 8, 9, 10);
"""


def tree(root: Path, more: str = "", inner: str = "data") -> Path:
    root.joinpath(inner).mkdir(parents=True)
    with closing(sqlite3.connect(root / inner / "aflw.sqlite")) as connection:
        connection.executescript(SCHEMA + more)
    for name in ("0/image00002.jpg", "2/image00004.jpg"):
        write(root / inner / "flickr" / name)
    return root


def boxes(path: Path) -> Path:
    def face(number: int, split: str) -> dict[str, object]:
        return {"bbox": [number, 2.5, number + 10, 40], "faceid": number, "type": split}

    listed = {
        "0/image00002.jpg": [face(102, "train"), face(101, "test")],
        "2/image00004.jpg": [face(105, "train")],
    }
    return write(path, json.dumps(listed))


@pytest.mark.parametrize("inner", ["data", "."])
def test_order_sign_and_unit_of_the_angles(tmp_path: Path, inner: str) -> None:
    data = read_aflw(tree(tmp_path / "aflw", inner=inner))
    sample = data.samples[0]
    assert sample.name == "0/image00002.jpg#101"
    # pitch, yaw, roll in degrees; AFLW's roll has the other sign.
    assert np.allclose(sample.angles, np.degrees((0.1, 0.2, -0.3)))
    assert sample.box == Box(5, 6, 15, 26), "x, y, w, h; the first of two rectangles"
    assert sample.load()[40, 8, 0] > 200
    assert [s.name.split("#")[1] for s in data.samples] == ["101", "102", "105"]
    assert data.protocol["filtered"] == ["2/image00004.jpg#103"]  # yaw 143 degrees
    assert data.protocol["faces_without_pose"] == 1
    assert data.protocol["boxes"] == "FaceRect of aflw.sqlite"


def test_faces_of_the_list(tmp_path: Path) -> None:
    root = tree(tmp_path / "aflw")
    listed = boxes(tmp_path / "list.json")
    data = read_aflw(root, boxes=listed)
    assert [s.name.split("#")[1] for s in data.samples] == ["102", "101", "105"]
    first, second = data.samples[:2]
    assert first.box == Box(102, 2.5, 112, 40)
    assert np.allclose(first.angles, np.degrees((-0.1, -0.2, 0.3)))
    assert np.allclose(second.angles, np.degrees((0.1, 0.2, -0.3)))
    assert [s.name for s in read_aflw(root, boxes=listed, split="test").samples] == [second.name]
    with pytest.raises(UsageError, match="needs a box list"):
        read_aflw(root, split="test")


def test_listed_face_is_missing(tmp_path: Path) -> None:
    root = tree(tmp_path / "aflw", "DELETE FROM Faces WHERE face_id = 101;")
    listed = boxes(tmp_path / "list.json")
    with pytest.raises(DataError, match="face 101 is not in the database"):
        read_aflw(root, boxes=listed)
    data = read_aflw(root, boxes=listed, skip_bad=True)
    assert [s.name for s in data.skipped] == ["0/image00002.jpg#101"] and len(data) == 2


def test_angles_in_degrees_and_a_pointer_are_named(tmp_path: Path) -> None:
    degrees = "UPDATE FacePose SET pitch = pitch * 57.3, yaw = yaw * 57.3, roll = roll * 57.3;"
    with pytest.raises(DataError, match="table FacePose must be pitch, yaw, roll in radians"):
        read_aflw(tree(tmp_path / "aflw", degrees))
    pointer = write(tmp_path / "p" / "aflw.sqlite", b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="Git LFS pointer"):
        read_aflw(pointer.parent)


def test_missing_photo(tmp_path: Path) -> None:
    root = tree(tmp_path / "aflw")
    (root / "data" / "flickr" / "2" / "image00004.jpg").unlink()
    with pytest.raises(DataError, match=r"image00004\.jpg: the photo of face \d+ is missing"):
        read_aflw(root)
    assert len(read_aflw(root, skip_bad=True).skipped) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("DROP TABLE FacePose;", "no such table: FacePose"),
        ("ALTER TABLE FacePose RENAME COLUMN yaw TO turn;", r"no such column: FacePose\.yaw"),
        ("UPDATE FacePose SET yaw = 'left' WHERE face_id = 101;", "expected a number"),
        ("UPDATE FaceRect SET w = 0 WHERE face_id = 101;", "face 101 .* has no rectangle"),
        ("UPDATE FaceImages SET filepath = '../../etc/passwd';", "leaves the data set"),
    ],
)
def test_databases_that_are_not_aflws(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        read_aflw(tree(tmp_path / "aflw", more))
    assert "aflw.sqlite" in str(found.value)


def test_no_database_or_a_damaged_one(tmp_path: Path) -> None:
    database = tree(tmp_path / "aflw") / "data" / "aflw.sqlite"
    data = database.read_bytes()
    with pytest.raises(DataError, match=r"no aflw\.sqlite; expected data/aflw\.sqlite"):
        read_aflw(tmp_path)
    for damaged in (b"hello", data[: len(data) // 3], data[:100] + bytes(len(data) - 100)):
        write(database, damaged)
        with pytest.raises(DataError, match=r"aflw\.sqlite"):
            read_aflw(tmp_path / "aflw")


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    root = tree(tmp_path / "aflw with a # and ?")
    before = sorted(p.name for p in (root / "data").iterdir())
    assert len(read_aflw(root)) == 3
    assert sorted(p.name for p in (root / "data").iterdir()) == before
