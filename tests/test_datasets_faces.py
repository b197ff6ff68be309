"""Folders and zips of faces: boxes, labels, and lists that cannot be right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from edgehp.crop import Box
from edgehp.datasets.base import Dataset
from edgehp.datasets.faces import read_faces
from edgehp.datasets.lists import load_boxes, parse_table
from edgehp.errors import DataError
from edgehp.pose import geodesic_degrees, matrix_from_euler
from tests.dataset_trees import encoded, write, zip_of

BOXES = "image,width,height,x_min,y_min,x_max,y_max\n"


def labelled_row(image: str, angles: tuple[float, float, float]) -> str:
    entries = ",".join(f"{v:.7f}" for v in matrix_from_euler(angles).ravel())
    return f"{image},64,48,1,2,31,42,{angles[0]},{angles[1]},{angles[2]},{entries}\n"


MATRIX = ",".join(f"r{i}{j}" for i in range(3) for j in range(3))
LABELLED = f"{BOXES.strip()},pitch,yaw,roll,{MATRIX}\n"


def tree(folder: Path, table: str, photos: int = 2) -> Path:
    for i in range(photos):
        write(folder / "a" / f"{i:05d}.jpg")
    write(folder / "a" / "boxes.csv", table)
    return folder


def one(folder: Path, table: str) -> Dataset:
    return read_faces(tree(folder, table, photos=1))


def test_zip_with_boxes(tmp_path: Path) -> None:
    rows = "a/00000.jpg,64,48,-3.5,1,40,44.25\na/00001.jpg,64,48,0,0,64,48\n"
    photos = {f"a/0000{i}.jpg": encoded() for i in range(3)}
    faces = read_faces(zip_of(tmp_path / "x.zip", {**photos, "a/boxes.csv": BOXES + rows}))
    assert [s.name for s in faces.samples] == ["a/00000.jpg", "a/00001.jpg"]
    assert faces.samples[0].box == Box(-3.5, 1, 40, 44.25)
    assert faces.samples[0].matrix is None and faces.samples[0].angles is None
    assert not faces.labelled
    pixels = faces.samples[1].load()
    assert pixels.shape == (48, 64, 3)
    assert pixels[40, 8, 0] > 200 > 50 > pixels[40, 8, 2], "expected RGB: the left side is red"
    assert faces.protocol["boxes"] == "boxes.csv"
    assert faces.protocol["photos_not_listed"] == 1
    assert faces.protocol["frames"] == 2


@pytest.mark.parametrize("inside", [False, True])
def test_extracted_folder_gives_the_same_samples(tmp_path: Path, inside: bool) -> None:
    root = tree(tmp_path, BOXES + "a/00000.jpg,64,48,1,2,3,4\na/00001.jpg,64,48,5,6,7,8\n")
    faces = read_faces(root / "a" if inside else root)
    assert [s.box for s in faces.samples] == [Box(1, 2, 3, 4), Box(5, 6, 7, 8)]


def test_folder_of_zips_is_one_data_set(tmp_path: Path) -> None:
    for name in "ba":
        members = {
            f"{name}/0.jpg": encoded(),
            f"{name}/boxes.csv": f"{BOXES}{name}/0.jpg,64,48,1,2,3,4",
        }
        zip_of(tmp_path / f"{name}.zip", members)
    faces = read_faces(tmp_path)
    assert [s.name for s in faces.samples] == ["a/0.jpg", "b/0.jpg"]
    assert [p["dataset"] for p in faces.protocol["parts"]] == ["a", "b"]


def test_plain_folder_takes_the_whole_photo(tmp_path: Path) -> None:
    write(tmp_path / "b.png")
    write(tmp_path / "sub" / "a.JPG", encoded())
    write(tmp_path / "notes.txt", "no photo")
    faces = read_faces(tmp_path)
    assert [s.name for s in faces.samples] == ["b.png", "sub/a.JPG"]
    assert all(s.box is None and s.matrix is None for s in faces.samples)
    assert faces.protocol["boxes"] == "whole photo"
    assert len({s.load().tobytes() for s in faces.samples}) == 2


def test_labels_as_matrix_with_angles_or_alone(tmp_path: Path) -> None:
    angles = (10.0, -95.5, 5.25)  # beyond 90 degrees of yaw: kept as it is written
    faces = one(tmp_path, LABELLED + labelled_row("a/00000.jpg", angles))
    sample = faces.samples[0]
    assert sample.angles is not None and sample.matrix is not None
    assert sample.angles.tolist() == list(angles)
    assert float(geodesic_degrees(sample.matrix, matrix_from_euler(angles))) < 1e-3
    assert faces.labelled and faces.protocol["convention"] == "aflw2000"
    entries = ",".join(f"{v:.7f}" for v in matrix_from_euler((11, -22, 33)).ravel())
    (alone,) = one(tmp_path / "alone", f"image,{MATRIX}\na/00000.jpg,{entries}\n").samples
    assert np.allclose(alone.angles, (11, -22, 33), atol=1e-3) and alone.box is None


@pytest.mark.parametrize("changed", [(-10, 20, 30), (10, -20, 30), (10, 20, -30), (20, 10, 30)])
def test_swapped_sign_or_order_is_noticed(
    tmp_path: Path, changed: tuple[float, float, float]
) -> None:
    row = labelled_row("a/00000.jpg", (10, 20, 30)).replace("10,20,30", "{},{},{}".format(*changed))
    with pytest.raises(DataError, match="differ by"):
        one(tmp_path, LABELLED + row)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "empty file"),
        ("name\n", "missing columns image"),
        ("image,x_min,y_min\n", "missing columns x_max,y_max"),
        ("image,pitch,roll\n", "missing columns yaw"),
        ("image,image\n", "occurs twice"),
        (BOXES, "no rows"),
        (BOXES + "a/00000.jpg,64,48,1,2,3\n", "line 2: 6 values, expected 7"),
        (BOXES + "a/00000.jpg,64,48,1,2,x,4\n", "expected finite numbers"),
        (BOXES + "a/00000.jpg,64,48,1,2,nan,4\n", "expected finite numbers"),
        (BOXES + "a/00000.jpg,64,48,3,2,1,4\n", "the box .* is empty"),
        (BOXES + "a/00000.jpg,64.5,48,1,2,3,4\n", "whole pixels"),
        (BOXES + ",64,48,1,2,3,4\n", "image column is empty"),
        (BOXES + "a/00009.jpg,64,48,1,2,3,4\n", "a/00009.jpg is not there"),
        (BOXES + "../../etc/passwd,64,48,1,2,3,4\n", "leaves the data set"),
        (BOXES + "/etc/passwd,64,48,1,2,3,4\n", "leaves the data set"),
        (BOXES + 2 * "a/00000.jpg,64,48,1,2,3,4\n", "listed twice"),
        (f"image,{MATRIX}\na/00000.jpg,1,0,0,0,2,0,0,0,1\n", "not a rotation"),
        (f"image,{MATRIX}\na/00000.jpg,-1,0,0,0,1,0,0,0,1\n", "reflection"),
        ("image,pitch,yaw,roll\na/00000.jpg,0,0,400\n", "within"),
        ('image,pitch\n"a', "not valid CSV|missing columns"),
    ],
)
def test_lists_that_cannot_be_right(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        one(tmp_path, table)
    assert "boxes.csv" in str(found.value)


def test_photo_of_another_size_than_listed(tmp_path: Path) -> None:
    sample = one(tmp_path, BOXES + "a/00000.jpg,640,480,1,2,3,4\n").samples[0]
    with pytest.raises(DataError, match="64x48 pixels, its list says 640x480"):
        sample.load()


def test_skip_bad_counts_and_lists(tmp_path: Path) -> None:
    table = BOXES + "a/00000.jpg,64,48,1,2,3,4\na/00009.jpg,64,48,1,2,3,4\n"
    faces = read_faces(tree(tmp_path, table), skip_bad=True)
    assert [s.name for s in faces.samples] == ["a/00000.jpg"]
    assert [s.name for s in faces.skipped] == ["a/00009.jpg"]
    assert "not there" in faces.skipped[0].reason
    assert faces.protocol["skipped"] == 1
    with pytest.raises(DataError, match="no samples are left; 1 were skipped"):
        read_faces(tree(tmp_path / "none", BOXES + "a/9.jpg,64,48,1,2,3,4\n"), skip_bad=True)


@pytest.mark.parametrize("what", ["absent", "empty", "text"])
def test_no_faces_at_all(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "text":
        write(path, "hello")
    with pytest.raises(DataError, match=what):
        read_faces(path)


def labels(count: int, scale: float) -> str:
    turns = [scale * (i % 7 - 3) for i in range(count)]
    rows = "".join(f"{i:05d}.jpg,{t / 2},{t},{t / 3}\n" for i, t in enumerate(turns))
    return f"image,pitch,yaw,roll\n{rows}"


def test_labels_in_radians_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(60):
        write(tmp_path / f"{i:05d}.jpg", b"x")
    write(tmp_path / "labels.csv", labels(60, math.pi / 6))
    with pytest.raises(DataError, match="looks like radians"):
        read_faces(tmp_path)
    write(tmp_path / "labels.csv", labels(60, 30.0))
    assert len(read_faces(tmp_path)) == 60
    assert "radians" not in caplog.text
    # Too few to tell the unit: a handful of frontal faces, perhaps.
    write(tmp_path / "labels.csv", labels(20, 0.5))
    assert len(read_faces(tmp_path)) == 20
    assert "all 20 rows have |angles| <= pi, which looks like radians" in caplog.text


def test_digest_follows_names_boxes_and_labels(tmp_path: Path) -> None:
    def digest(name: str, row: str) -> str:
        return str(one(tmp_path / name, LABELLED + row).protocol["sha256"])

    row = labelled_row("a/00000.jpg", (1, 2, 3))
    first = digest("1", row)
    assert first == digest("2", row)
    assert first != digest("3", row.replace(",31,42,", ",31,43,"))
    assert first != digest("4", labelled_row("a/00000.jpg", (1, 2, 3.5)))


def test_shared_zip(shared_data: Path) -> None:
    faces = read_faces(shared_data / "faces" / "lfw.zip")
    assert len(faces) == 4000
    sample = faces.samples[0]
    assert sample.size == (160, 160) and sample.load().shape == (160, 160, 3)
    assert sample.box == Box(32.3, 30.0, 127.7, 130.0)


def test_boxes_of_other_forms_are_taken_or_refused() -> None:
    (row,) = parse_table(b"image,x,y,w,h\na.jpg,10,20,30,40\n", "here")
    assert row.box == Box(10, 20, 40, 60)
    with pytest.raises(DataError, match="fractions of the photo"):
        parse_table(b"image,x_min,y_min,x_max,y_max\na.jpg,.1,.2,.6,.7\n", "here")
    with pytest.raises(DataError, match=r"no columns of boxes.*\nhint: call a box x_min"):
        parse_table(b"image,left,top,right,bottom\na.jpg,10,20,30,40\n", "here")


def test_a_list_of_another_name_is_not_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a" / "0.jpg", encoded())
    write(tmp_path / "a" / "Boxes.csv", b"image,x,y,w,h\n0.jpg,10,10,20,20\n")
    write(tmp_path / "a" / "faces.csv", b"image,x,y,w,h\n0.jpg,10,10,20,20\n")
    assert read_faces(tmp_path / "a").samples[0].box == Box(10, 10, 30, 30)
    assert "lists that are not used: faces.csv; those that are used" in caplog.text


def test_columns_have_other_usual_names_and_those_not_used_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "filename,class,xmin,ymin,xmax,ymax\na/00000.jpg,face,1,2,31,42\n"
    assert one(tmp_path / "1", rows).samples[0].box == Box(1, 2, 31, 42)
    assert "columns that are not used: class" in caplog.text
    # A label without the box that its list has under an unknown name.
    one(tmp_path / "2", "image,bbox,pitch,yaw,roll\na/00000.jpg,1 2 31 42,1,2,3\n")
    assert "columns that are not used: bbox" in caplog.text


def test_boxes_and_labels_in_a_list_each_are_one(tmp_path: Path) -> None:
    write(tmp_path / "0.jpg", encoded())
    write(tmp_path / "boxes.json", '{"0.jpg": [{"bbox": [1, 2, 31, 42]}]}')
    write(tmp_path / "labels.csv", "image,pitch,yaw,roll\n0.jpg,1,2,3\n")
    (sample,) = read_faces(tmp_path).samples
    assert sample.box == Box(1, 2, 31, 42) and not sample.upright
    assert sample.angles is not None and sample.angles.tolist() == [1, 2, 3]
    write(tmp_path / "boxes.csv", "image,x,y,w,h\n0.jpg,10,10,20,20\n")
    with pytest.raises(DataError, match=r"boxes\.json: 0\.jpg is listed twice"):
        read_faces(tmp_path)


def test_box_lists_are_json_or_csv_and_name_a_face_once(tmp_path: Path) -> None:
    row = "a.jpg,1,2,31,42\n"
    header = "image,x_min,y_min,x_max,y_max\n"
    table = load_boxes(write(tmp_path / "a.csv", header + row + "a.jpg,5,5,25,25\nb.jpg,1,2,9,9\n"))
    assert [e.box for e in table.of("./a.jpg")] == [Box(1, 2, 31, 42), Box(5, 5, 25, 25)]
    face = '{"bbox": [1, 2, 31, 42]}'
    for name, text in (
        ("t.csv", header + row + row),
        ("t.json", f'{{"a.jpg": [{face}, {face}]}}'),
        ("u.json", f'{{"a.jpg": [{face}], "./a.jpg": [{face}]}}'),
    ):
        with pytest.raises(DataError, match="listed twice"):
            load_boxes(write(tmp_path / name, text))
    coco = '{"images": [{"id": 1}], "annotations": [{"bbox": [1, 2, 3, 4]}]}'
    with pytest.raises(DataError, match=r"bbox.*\nhint: a list of boxes is \{\"file\": \[\{\"bbox"):
        load_boxes(write(tmp_path / "coco.json", coco))
    with pytest.raises(DataError, match="no columns of a box"):
        load_boxes(write(tmp_path / "l.csv", "image,pitch,yaw,roll\na.jpg,1,2,3\n"))


def test_names_are_compared_in_one_spelling_and_a_near_one_is_suggested(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """macOS takes accents apart, Windows writes backslashes and a byte order mark."""
    write(tmp_path / "x" / "Bj\N{LATIN SMALL LETTER O WITH DIAERESIS}rn.jpg", encoded())
    write(tmp_path / "x" / "b.jpg", encoded())
    table = "\ufeffImage,X,Y,W,H\r\nx\\Bjo\N{COMBINING DIAERESIS}rn.jpg,10,10,20,20\r\n"
    write(tmp_path / "boxes.csv", table)
    (sample,) = read_faces(tmp_path).samples
    assert sample.box == Box(10, 10, 30, 30) and sample.load().shape == (48, 64, 3)
    # Linux can hold both spellings; each then means itself.
    other = write(tmp_path / "x" / "Bjo\N{COMBINING DIAERESIS}rn.jpg", encoded())
    assert read_faces(tmp_path).samples[0].name == f"x/{other.name}"
    other.unlink()
    assert "1 of 2 photos are not in its list" in caplog.text
    write(tmp_path / "boxes.csv", "image,x,y,w,h\nx/B.JPG,10,10,20,20\n")
    with pytest.raises(DataError, match=r"B\.JPG is not there.*\nhint: did you mean x/b\.jpg\?"):
        read_faces(tmp_path)


def test_tables_of_other_forms_say_what_is_wrong() -> None:
    for data, words in (
        (b"image;x;y;w;h\na.jpg;1;2;3;4\n", "separated by ';', expected commas"),
        ("image,x".encode("utf-16"), "UTF-16"),
        (b"image,x,y,w,h\nb\xe9.jpg,1,2,30,40\n", "line 2 is not UTF-8 text"),
        (encoded(), "text in UTF-8"),
    ):
        with pytest.raises(DataError, match=words):
            parse_table(data, "here")
