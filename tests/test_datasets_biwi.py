"""BIWI: pose files, `rgb.cal`, published boxes and splits, on a small tree of the exact layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edgehp.crop import Box
from edgehp.datasets.biwi import read_biwi, read_rgb_cal
from edgehp.datasets.lists import load_boxes
from edgehp.errors import DataError, UsageError
from edgehp.pose import geodesic_degrees, matrix_from_euler
from tests.dataset_trees import biwi_frame, rows, write

Array = npt.NDArray[np.float64]


def calibration(matrix: Array) -> str:
    intrinsic = "517.679 0 320 \n0 517.679 240.5 \n0 0 1 \n"
    return f"{intrinsic}\n0 0 0 0 \n\n{rows(matrix)}\n-24.02 5.89 -13.23 \n\n640 480\n"


TURN = matrix_from_euler((0.5, 0.9, -0.7))
POSES = {
    "01/frame_00003": matrix_from_euler((1, 2, 3)),
    "01/frame_00004": matrix_from_euler((-15, 32, 8)),
    "02/frame_00010": matrix_from_euler((40, -50, -20)),
}


def tree(root: Path) -> Path:
    for name, matrix in POSES.items():
        biwi_frame(root, name, matrix)
        write(root / name.split("/")[0] / "rgb.cal", calibration(TURN))
        write(root / name.split("/")[0] / "depth.cal", "1 2 3")
    write(root / "01.obj", "# a mesh")
    listed = {
        "01/frame_00004_rgb.png": [{"bbox": [290.5, 216, 397, 324.25], "type": "train"}],
        "02/frame_00010_rgb.png": [{"bbox": [1, 2, 3, 4], "type": "test"}],
        "24/frame_00020_rgb.png": [{"bbox": [1, 2, 3, 4], "type": "test"}],
    }
    write(root / "BIWI.json", json.dumps(listed))
    return root


@pytest.mark.parametrize("inner", [".", "hpdb", "faces_0"])
def test_reads_the_layout(tmp_path: Path, inner: str) -> None:
    root = tree(tmp_path / inner)
    data = read_biwi(tmp_path, boxes=root / "BIWI.json")
    assert [s.name for s in data.samples] == ["01/frame_00004_rgb.png", "02/frame_00010_rgb.png"]
    assert data.samples[0].box == Box(290.5, 216, 397, 324.25)
    pixels = data.samples[0].load()
    assert pixels[40, 8].tolist() == [220, 20, 20], "expected RGB: the left side is red"
    assert data.protocol["frames_not_listed"] == ["01/frame_00003_rgb.png"]
    assert data.protocol["sequences_absent"] == ["24"]
    assert data.protocol["rgb_cal"] is False


def test_the_matrix_is_the_files_and_the_angles_are_hopenets(tmp_path: Path) -> None:
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    for sample in read_biwi(tree(tmp_path)).samples:
        written = POSES[sample.name.removesuffix("_rgb.png")]
        assert sample.matrix is not None
        assert np.allclose(sample.matrix, written, atol=1e-5), "a transposed matrix would differ"
        # The published identity: Hopenet's (pitch, yaw, roll) = as_euler('XYZ') * [-1, 1, 1].
        published = rotation.from_matrix(written).as_euler("XYZ", degrees=True) * [-1, 1, 1]
        assert np.allclose(sample.angles, published, atol=1e-3)


def test_rounding_of_the_file_is_undone(tmp_path: Path) -> None:
    tree(tmp_path)
    rough = np.round(POSES["01/frame_00004"], 4)
    biwi_frame(tmp_path, "01/frame_00004", rough)
    matrix = read_biwi(tmp_path).samples[0].matrix
    assert matrix is not None
    assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no BIWI sequences; expected 01/frame_00003_rgb\.png"):
        read_biwi(tmp_path)
    tree(tmp_path)
    (tmp_path / "01" / "frame_00004_rgb.png").unlink()
    with pytest.raises(DataError, match=r"frame_00004_rgb\.png: the frame is missing"):
        read_biwi(tmp_path)
    assert len(read_biwi(tmp_path, skip_bad=True).skipped) == 1
    (tmp_path / "BIWI.json").unlink()
    with pytest.raises(DataError, match="no face boxes of its own\nhint: give a box list"):
        read_biwi(tmp_path)


def test_splits(tmp_path: Path) -> None:
    tree(tmp_path)
    assert [s.name[:2] for s in read_biwi(tmp_path, split="train").samples] == ["01"]
    assert [s.name[:2] for s in read_biwi(tmp_path, split="test").samples] == ["02"]
    with pytest.raises(UsageError, match="none of train, test"):
        read_biwi(tmp_path, split="dev")


def test_rgb_cal_turns_the_truth_from_the_left(tmp_path: Path) -> None:
    tree(tmp_path)
    plain, turned = read_biwi(tmp_path), read_biwi(tmp_path, rgb_cal=True)
    for a, b in zip(plain.samples, turned.samples, strict=True):
        assert a.matrix is not None and b.matrix is not None
        assert np.allclose(b.matrix, TURN @ a.matrix, atol=1e-5)
        assert float(geodesic_degrees(a.matrix, b.matrix)) == pytest.approx(1.24, abs=0.02)
    assert turned.protocol["rgb_cal"] is True
    assert turned.protocol["sha256"] != plain.protocol["sha256"]


def test_broken_calibration(tmp_path: Path) -> None:
    tree(tmp_path)
    write(tmp_path / "02" / "rgb.cal", "517 0 320")
    assert len(read_biwi(tmp_path)) == 2, "not needed, not read"
    with pytest.raises(DataError, match=r"02/rgb\.cal: expected .* found 3 numbers"):
        read_biwi(tmp_path, rgb_cal=True)
    write(tmp_path / "c.cal", calibration(2 * np.eye(3)))
    with pytest.raises(DataError, match="not a rotation"):
        read_rgb_cal(tmp_path / "c.cal")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1 2 3\n", "found 3 numbers"),
        ("", "empty file"),
        ("a b c\n", "something else"),
        (rows(np.eye(3) * 1.1) + "\n1 2 3\n", "not a rotation"),
        (rows(np.diag([1.0, 1, -1])) + "\n1 2 3\n", "reflection"),
        (rows(np.eye(3) * np.nan) + "\n1 2 3\n", "finite"),
        ("\0" * 200, "zero bytes"),
    ],
)
def test_broken_pose_file(tmp_path: Path, content: str, message: str) -> None:
    tree(tmp_path)
    write(tmp_path / "01" / "frame_00004_pose.txt", content)
    with pytest.raises(DataError, match=message) as found:
        read_biwi(tmp_path)
    assert "frame_00004_pose.txt" in str(found.value)
    data = read_biwi(tmp_path, skip_bad=True)
    assert [s.name for s in data.skipped] == ["01/frame_00004_rgb.png"] and len(data) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected object"),
        ("{}", "found no files"),
        ("{", "not valid JSON"),
        ("[" * 100000, "nested too deeply"),
        ('{"a": []}', "a: expected a list of faces"),
        ('{"a": [7]}', r"'a\[0\]' is 7; expected object"),
        ('{"a": [{"bbox": [1, 2, 3]}]}', r"bbox.*expected array of length 4"),
        ('{"a": [{"bbox": [1, 2, 3, "4"]}]}', r"bbox\[3\]' is '4'; expected float"),
        ('{"a": [{"bbox": [1, 2, 3, NaN]}]}', "NaN is no JSON number"),
        ('{"a": [{"bbox": [3, 2, 1, 4]}]}', "a: the box 3, 2, 1, 4 is empty"),
        ('{"a": [{"bbox": [1, 2, 3, true]}]}', r"bbox\[3\]' is true; expected float"),
        (
            '{"a": [{"bbox": [1, 2, 3, 4], "type": "dev"}]}',
            "'dev'; expected one of 'test', 'train'",
        ),
        ('{"a": [{"bbox": [1, 2, 3, 4], "faceid": "7"}]}', "faceid' is '7'; expected int"),
    ],
)
def test_broken_box_list(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "list.json", content)
    with pytest.raises(DataError, match=message) as found:
        load_boxes(path)
    assert "list.json" in str(found.value)


def test_published_lists(shared_data: Path) -> None:
    biwi = load_boxes(shared_data / "boxes" / "BIWI.json")
    assert len(biwi.faces) == 15677
    test = biwi.files("test")
    assert len(test) == 5065
    assert {f[:2] for f in test} == {"06", "07", "10", "13", "15", "18", "21", "22"}
    aflw = load_boxes(shared_data / "boxes" / "AFLW.json")
    assert sum(map(len, aflw.faces.values())) == 24383
