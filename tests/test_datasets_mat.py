"""AFLW2000-3D and 300W-LP: `.mat` files, boxes, filter, and the real development split."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgehp.crop import Box
from edgehp.datasets.base import Dataset
from edgehp.datasets.pose_mat import box_from_landmarks, read_300w_lp, read_aflw2000, read_mat
from edgehp.errors import DataError
from edgehp.pose import geodesic_degrees, matrix_from_euler
from tests.dataset_trees import write

savemat = pytest.importorskip("scipy.io").savemat

POINTS = np.array([[10.0, 50, 30, 20], [5, 20, 45, 25]])


def pair(folder: Path, stem: str, degrees: tuple[float, float, float], **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{stem}.jpg")
    pose = np.zeros((1, 7), np.float32)
    pose[0, :3] = np.radians(degrees)
    pose[0, 3:] = (231, 262, -102, 0.0016)
    values = {"Pose_Para": pose, "pt2d": POINTS, "roi": np.int16([[1, 2, 3, 4]]), **more}
    savemat(folder / f"{stem}.mat", values, do_compression=stem.endswith("2"))


def tree(folder: Path) -> Path:
    pair(folder, "image00002", (-22.5, 5.25, 10.75))
    pair(folder, "image00004", (1, 98.5, 3))
    pair(folder, "image00006", (1, 2, -99.5))
    return folder


def boxes(folder: Path, numbers: str = "00002 00004 00006") -> Path:
    entries = (
        f'"image{n}.jpg": [{{"bbox": [1.5, 2, {i + 30}, 40]}}]'
        for i, n in enumerate(numbers.split())
    )
    return write(folder / "AFLW2000.json", "{" + ", ".join(entries) + "}")


def test_order_sign_and_unit_of_the_pose(tmp_path: Path) -> None:
    data = read_aflw2000(tree(tmp_path))
    sample = data.samples[0]
    assert sample.name == "image00002.jpg"
    assert sample.angles is not None and sample.matrix is not None
    assert np.allclose(sample.angles, (-22.5, 5.25, 10.75), atol=1e-4)
    # 300W-LP's own matrix, Rx(-p) Ry(-y) Rz(-r) in y-up axes, turned into the y-down ones.
    p, y, r = np.radians((-22.5, 5.25, 10.75))
    rx = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    ry = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    rz = np.array([[np.cos(r), np.sin(r), 0], [-np.sin(r), np.cos(r), 0], [0, 0, 1]])
    up = np.diag([1.0, -1, -1])
    assert np.allclose(sample.matrix, up @ rx @ ry @ rz @ up, atol=1e-6)


def test_nose_of_positive_yaw_points_to_the_images_left(tmp_path: Path) -> None:
    data = read_aflw2000(tree(tmp_path))
    front = np.array([0, 0, -1.0])  # out of the face, towards the camera
    nose = data.samples[1].matrix @ front
    assert nose[0] < -0.9, "yaw 98.5: the nose points to -x"
    assert data.samples[1].angles[1] == pytest.approx(98.5, abs=1e-4), "as published"
    assert (data.samples[0].matrix @ front)[1] > 0.3, "pitch -22.5: the nose points down, +y"


def test_filter(tmp_path: Path) -> None:
    tree(tmp_path)
    usual = read_aflw2000(tmp_path)
    assert [s.name for s in usual.samples] == ["image00002.jpg", "image00004.jpg"]
    assert usual.protocol["filtered"] == ["image00006.jpg"] and usual.skipped == ()
    assert usual.protocol["filter"] == "all |angles| <= 99 degrees"
    # The few wild angles that are published are no reason to refuse.
    pair(tmp_path, "image00008", (10, -714, 3))
    data = read_aflw2000(tmp_path)
    assert len(data) == 2 and len(data.protocol["filtered"]) == 2
    for name in ("image00002", "image00004"):
        pair(tmp_path, name, (1, 120, 3))
    with pytest.raises(DataError, match=r"4 were left out by the filter \(.*99 deg.*radians"):
        read_aflw2000(tmp_path)


def in_degrees(folder: Path, stem: str, degrees: tuple[float, float, float]) -> None:
    """A pair whose pose is in degrees, not in radians as it should be."""
    pose = np.zeros((1, 7), np.float32)
    pose[0, :3] = degrees
    pair(folder, stem, (0, 0, 0), Pose_Para=pose)


@pytest.mark.parametrize("survivors", [0, 2])
def test_degrees_are_refused_even_where_some_photos_survive(tmp_path: Path, survivors: int) -> None:
    for i in range(survivors):
        in_degrees(tmp_path, f"image{i:05d}", (0.5, -1.2, 0.3))
    for i in range(survivors, 5):
        in_degrees(tmp_path, f"image{i:05d}", (-12.5, 30.0 + i, 4))
    with pytest.raises(DataError, match=r"radians.*looks like degrees") as e:
        read_aflw2000(tmp_path)
    assert f"({5 - survivors} are left out by the angle filter)" in str(e.value)


def test_boxes_given_found_or_from_landmarks(tmp_path: Path) -> None:
    root = tree(tmp_path / "AFLW2000")
    drawn = read_aflw2000(root)
    assert drawn.protocol["boxes"] == "landmarks, Hopenet's rule with k = 0.2"
    assert drawn.samples[0].box == box_from_landmarks(POINTS)
    listed = boxes(tmp_path / "elsewhere")
    given = read_aflw2000(root, boxes=listed)
    assert given.samples[0].box == Box(1.5, 2, 30, 40)
    assert given.protocol["boxes"].startswith("AFLW2000.json (sha256 ")
    boxes(tmp_path / "boxes")
    found = read_aflw2000(root)
    assert found.protocol == given.protocol
    assert read_aflw2000(root, boxes="landmarks").protocol == drawn.protocol
    assert found.protocol["sha256"] != drawn.protocol["sha256"]


def test_landmark_rule() -> None:
    # By hand: x 10..50, y 5..45; k = 0.2; the lower sides widen the ones after them.
    box = box_from_landmarks(POINTS)
    assert box.x_min == pytest.approx(10 - 0.4 * 40)
    assert box.y_min == pytest.approx(5 - 0.4 * 40)
    assert box.x_max == pytest.approx(50 + 0.2 * 56)
    assert box.y_max == pytest.approx(45 + 0.12 * 56)


def test_hidden_landmarks_do_not_stretch_the_box(tmp_path: Path) -> None:
    pair(tmp_path, "image1", (1, 2, 3), pt2d=np.hstack([POINTS, -np.ones((2, 3))]))
    assert read_aflw2000(tmp_path).samples[0].box == box_from_landmarks(POINTS)


def test_photo_without_a_listed_box(tmp_path: Path) -> None:
    tree(tmp_path)
    boxes(tmp_path, "00002 00006")
    with pytest.raises(DataError, match=r"image00004\.jpg: not in the box list"):
        read_aflw2000(tmp_path)
    data = read_aflw2000(tmp_path, skip_bad=True)
    assert [s.name for s in data.skipped] == ["image00004.jpg"]


@pytest.mark.parametrize("suffix", ["jpg", "mat"])
def test_missing_half_of_a_pair(tmp_path: Path, suffix: str) -> None:
    tree(tmp_path)
    (tmp_path / f"image00004.{suffix}").unlink()
    with pytest.raises(DataError, match=r"image00004\."):
        read_aflw2000(tmp_path)
    data = read_aflw2000(tmp_path, skip_bad=True)
    assert len(data) == 1 and [s.name for s in data.skipped] == ["image00004.jpg"]


@pytest.mark.parametrize(
    "values",
    [{"x": 1.0}, {"Pose_Para": np.zeros((1, 2))}, {"Pose_Para": "text"}, {"Pose_Para": 1j}],
)
def test_mat_without_a_usable_pose(tmp_path: Path, values: dict[str, object]) -> None:
    write(tmp_path / "image1.jpg")
    savemat(tmp_path / "image1.mat", values)
    with pytest.raises(DataError, match=r"image1\.mat: expected Pose_Para \[1, 7\]"):
        read_aflw2000(tmp_path)
    pair(tmp_path, "image1", (1, float("nan"), 2))
    with pytest.raises(DataError, match="finite angles"):
        read_aflw2000(tmp_path)
    with pytest.raises(DataError, match=r"no AFLW2000-3D photos; expected imageNNNNN\.jpg"):
        read_aflw2000(write(tmp_path / "empty" / "notes.txt", "no photo").parent)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_of_a_mat_is_refused(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"other": np.eye(3), "Pose_Para": np.ones((1, 7))}, do_compression=compressed)
    data = path.read_bytes()
    for length in range(1, len(data), 3):
        write(path, data[:length])
        try:
            found = read_mat(path, ("Pose_Para",))
        except DataError as e:
            assert "a.mat" in str(e)
        else:  # cut between two variables, or in the last one's padding
            assert found.get("Pose_Para", np.ones((1, 7))).tolist() == [[1.0] * 7]


def test_damaged_mat_never_crashes(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"Pose_Para": np.ones((1, 7)), "pt2d": POINTS})
    good = path.read_bytes()
    for _ in range(200):
        data = bytearray(good)
        for at in rng.integers(124, len(data), 2):
            data[at] = int(rng.integers(0, 256))
        write(path, bytes(data))
        try:
            read_mat(path, ("Pose_Para", "pt2d"))
        except DataError as e:
            assert "a.mat" in str(e)


def test_mat_types_shapes_and_small_elements(tmp_path: Path, rng: np.random.Generator) -> None:
    values = {
        "f4": rng.normal(size=(2, 3)).astype(np.float32),
        "f8": rng.normal(size=(3, 2)),
        "i2": np.array([[-3, 4]], np.int16),
        "u1": np.array([[7]], np.uint8),
        "name_longer_than_four": np.arange(5.0)[None],
    }
    for compressed in (False, True):
        savemat(tmp_path / "a.mat", values, do_compression=compressed)
        found = read_mat(tmp_path / "a.mat", list(values))
        assert found.keys() == values.keys()
        for name, value in values.items():
            assert np.array_equal(found[name], value), name


def test_bombs_and_other_files_are_no_mat(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(17 * 2**20))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    write(tmp_path / "a.mat", header + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(DataError, match="more than"):
        read_mat(tmp_path / "a.mat", ("Pose_Para",))
    for data in (b"hello", b"\x89HDF\r\n\x1a\n" + bytes(600)):
        write(tmp_path / "a.mat", data)
        with pytest.raises(DataError, match="expected a MATLAB 5 file"):
            read_mat(tmp_path / "a.mat", ("Pose_Para",))


def test_300w_lp(tmp_path: Path) -> None:
    root = tmp_path / "300W_LP"
    for folder, yaw in (("AFW", 20.0), ("AFW_Flip", -20.0), ("LFPW", 120.0)):
        pair(root / folder, f"{folder}_1_0", (5, yaw, 7))
    write(root / "Code" / "x.jpg")
    data = read_300w_lp(tmp_path)
    assert [s.name for s in data.samples] == ["AFW/AFW_1_0.jpg", "AFW_Flip/AFW_Flip_1_0.jpg"]
    assert [round(float(s.angles[1]), 3) for s in data.samples] == [20, -20]
    assert data.samples[0].box == box_from_landmarks(POINTS)
    assert data.protocol["folders"] == ["AFW", "AFW_Flip", "LFPW"]
    assert data.protocol["filtered"] == ["LFPW/LFPW_1_0.jpg"]
    with pytest.raises(DataError, match="expected folders AFW"):
        read_300w_lp(root / "AFW")


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Dataset:
    return read_aflw2000(shared_data / "AFLW2000")


def test_real_development_split(real: Dataset) -> None:
    assert len(real) == 593 and len(real.protocol["filtered"]) == 7
    assert real.protocol["boxes"].startswith("AFLW2000.json")
    assert real.protocol["listed_without_photo"] == 1400
    sample = real.samples[0]
    assert sample.load().shape == (450, 450, 3)
    # Pose_Para of image00002 as scipy prints it: -0.39923078, 0.018226579, 0.085676216.
    assert np.allclose(sample.angles, (-22.874, 1.0443, 4.9089), atol=1e-3)
    for s in real.samples:
        assert float(geodesic_degrees(s.matrix, matrix_from_euler(s.angles))) < 1e-6


def test_real_files_read_as_scipy_reads_them(real: Dataset, shared_data: Path) -> None:
    from scipy.io import loadmat

    for sample in real.samples[::20]:
        path = (shared_data / "AFLW2000" / sample.name).with_suffix(".mat")
        truth = loadmat(path)
        found = read_mat(path, ("Pose_Para", "pt2d", "pt3d_68", "roi"))
        for name, values in found.items():
            assert np.array_equal(values, truth[name])


def test_real_landmarks_lie_in_the_published_boxes(real: Dataset, shared_data: Path) -> None:
    """Boxes and photos belong together: x and y are not swapped, no scale is lost."""
    for sample in real.samples[::10]:
        path = (shared_data / "AFLW2000" / sample.name).with_suffix(".mat")
        x, y = read_mat(path, ("pt3d_68",))["pt3d_68"][:2].mean(axis=1)
        box = sample.box
        assert box is not None
        assert box.x_min < x < box.x_max and box.y_min < y < box.y_max, sample.name
