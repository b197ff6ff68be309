"""Rendered samples as trees in the exact layouts of BIWI and AFLW2000-3D; no renderer needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.base import Sample
from edgehp.datasets.faces import read_rendered
from edgehp.pose import matrix_from_euler

Array = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]

# Sequences that Sheka & Samun test on (their protocol ap3).
_BIWI_TEST = {"06", "07", "10", "13", "15", "18", "21", "22"}
BIWI_SEQUENCES = ("01", "02", "06", "07")
# A Kinect's cameras, as in BIWI's own files.
_FOCAL_RGB, _FOCAL_DEPTH = 517.679, 575.816
# The depth camera's axes in the colour camera's: about 1.2 degrees, as in BIWI.
RGB_CAL_ROTATION = matrix_from_euler([-0.86, 0.53, -0.25])
_RGB_CAL_SHIFT = (-24.0198, 5.8896, -13.2308)
# Millimetres of the published box's height on an average face.
_BOX_HEIGHT_MM = 190.0


def write_layout(layout: str, source: Path, output: Path, limit: int | None = None) -> int:
    """Write the samples of `source` (zip or folder) below `output` as ``biwi`` or ``aflw2000``.

    Returns:
        How many were written.
    """
    writers: dict[str, Callable[[Sequence[Sample], Path], None]] = {
        "biwi": write_biwi,
        "aflw2000": write_aflw2000,
    }
    samples = list(read_rendered(source).samples)[:limit]
    writers[layout](samples, output)
    return len(samples)


def write_biwi(samples: Sequence[Sample], root: Path) -> None:
    """``NN/frame_XXXXX_{rgb.png,pose.txt}``, ``NN/{rgb,depth}.cal`` and ``BIWI.json``.

    The pose file holds the exact label, so a reader must give it back with ``rgb.cal`` off.
    """
    boxes = {}
    for i, sample in enumerate(samples):
        sequence = BIWI_SEQUENCES[i % len(BIWI_SEQUENCES)]
        folder = root / sequence
        if not folder.is_dir():
            folder.mkdir(parents=True)
            _calibration(folder / "rgb.cal", _FOCAL_RGB, RGB_CAL_ROTATION, _RGB_CAL_SHIFT)
            _calibration(folder / "depth.cal", _FOCAL_DEPTH, np.eye(3), (0, 0, 0))
        stem = f"frame_{3 + i // len(BIWI_SEQUENCES):05d}"
        photo, box = _on_canvas(sample, 640, 480)
        _save(folder / f"{stem}_rgb.png", photo)
        rows = "".join(" ".join(f"{v:.7g}" for v in row) + " \n" for row in _matrix(sample))
        place = " ".join(f"{v:.6g}" for v in _position(box))
        (folder / f"{stem}_pose.txt").write_text(f"{rows}\n{place} \n", encoding="ascii")
        kind = "test" if sequence in _BIWI_TEST else "train"
        boxes[f"{sequence}/{stem}_rgb.png"] = [{"bbox": _corners(box), "type": kind}]
    _dump(root / "BIWI.json", boxes)


def write_aflw2000(samples: Sequence[Sample], root: Path) -> None:
    """``imageNNNNN.jpg`` of 450x450 with ``imageNNNNN.mat``, and ``AFLW2000.json``.

    The 68 landmarks of the files are no landmarks: they only have the extent of real ones, so
    that the landmark box rules can be tested.
    """
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    boxes = {}
    for i, sample in enumerate(samples):
        name = f"image{2 + 2 * i:05d}"
        photo, box = _on_canvas(sample, 450, 450)
        _save(root / f"{name}.jpg", photo)
        points = _outline(box)
        pose = np.zeros((1, 7), np.float32)
        pose[0, :3] = np.radians(_angles(sample))
        pose[0, 3:] = ((box.x_min + box.x_max) / 2, 450 - (box.y_min + box.y_max) / 2, -60, 1e-3)
        savemat(
            root / f"{name}.mat",
            {
                "Pose_Para": pose,
                "Shape_Para": np.zeros((199, 1)),
                "Exp_Para": np.zeros((29, 1)),
                "Tex_Para": np.zeros((199, 1), np.float32),
                "Color_Para": np.ones((1, 7), np.float32),
                "Illum_Para": np.ones((1, 10), np.float32),
                "pt2d": points[:2, :21],
                "pt3d_68": points,
                "roi": np.array([[1, 450, 1, 450]], np.int16),
            },
            do_compression=True,
        )
        boxes[f"{name}.jpg"] = [{"bbox": _corners(box)}]
    _dump(root / "AFLW2000.json", boxes)


def _matrix(sample: Sample) -> Array:
    if sample.matrix is None:
        raise ValueError(f"{sample.name} has no label")
    return sample.matrix


def _angles(sample: Sample) -> Array:
    if sample.angles is None:
        raise ValueError(f"{sample.name} has no label")
    return sample.angles


def _on_canvas(sample: Sample, width: int, height: int) -> tuple[Image, Box]:
    """The picture in the middle of a larger one, its border replicated, and its box there."""
    photo, box = sample.load(), sample.box
    if box is None:
        raise ValueError(f"{sample.name} has no box")
    x, y = (width - photo.shape[1]) // 2, (height - photo.shape[0]) // 2
    right, bottom = width - photo.shape[1] - x, height - photo.shape[0] - y
    if min(x, y, right, bottom) < 0:
        raise ValueError(f"{sample.name}: larger than {width}x{height}")
    large = cv2.copyMakeBorder(photo, y, bottom, x, right, cv2.BORDER_REPLICATE)
    moved = Box(box.x_min + x, box.y_min + y, box.x_max + x, box.y_max + y)
    return large, moved  # type: ignore[return-value]


def _position(box: Box) -> Array:
    """Where a head of average size would be, millimetres in the camera frame."""
    z = _FOCAL_DEPTH * _BOX_HEIGHT_MM / box.height
    x = (box.x_min + box.x_max) / 2 - 320
    y = (box.y_min + box.y_max) / 2 - 240
    return np.array([x * z / _FOCAL_DEPTH, y * z / _FOCAL_DEPTH, z])


def _outline(box: Box) -> Array:
    """68 points [3, 68] whose extent is the landmarks' that the box was made from."""
    w, h = box.width / 1.43, box.height / 1.41
    cx = (box.x_min + box.x_max) / 2
    cy = box.y_min + 0.31 * h + h / 2
    t = np.arange(68) * 2 * np.pi / 68
    return np.stack([cx + w / 2 * np.cos(t), cy + h / 2 * np.sin(t), np.zeros(68)])


def _calibration(path: Path, focal: float, rotation: Array, shift: Sequence[float]) -> None:
    """BIWI's format: intrinsic matrix, distortion, rotation, translation (mm), size."""
    blocks = [
        [[focal, 0, 320], [0, focal, 240.5], [0, 0, 1]],
        [[0, 0, 0, 0]],
        rotation.tolist(),
        [list(shift)],
    ]
    text = "\n".join(
        "".join(" ".join(f"{v:.6g}" for v in row) + " \n" for row in block) for block in blocks
    )
    path.write_text(f"{text}\n640 480\n", encoding="ascii")


def _corners(box: Box) -> list[float]:
    return [box.x_min, box.y_min, box.x_max, box.y_max]


def _save(path: Path, photo: Image) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(photo, cv2.COLOR_RGB2BGR)):
        raise OSError(f"OpenCV could not write {path}")


def _dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
