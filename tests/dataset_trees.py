"""Photos and small data sets written in the exact layouts, for the tests of the readers."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.datasets.base import Sample

Image = npt.NDArray[np.uint8]


def photo(width: int = 64, height: int = 48) -> Image:
    """A photo, RGB: red on the left, blue on the right, a green stripe on top."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 20, 20)
    pixels[:, width // 2 :] = (20, 20, 220)
    pixels[: height // 4] = (20, 220, 20)
    return pixels


def encoded(pixels: Image | None = None, suffix: str = ".jpg") -> bytes:
    """The photo as a JPEG or PNG file."""
    rgb = photo() if pixels is None else pixels
    good, data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    if not good:
        raise RuntimeError(f"cannot encode {suffix}")
    return data.tobytes()


def write(path: Path, data: bytes | str | None = None) -> Path:
    """Write a file, its folders too; a photo in the format of the suffix if no data are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(suffix=path.suffix) if data is None else data
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zip_of(path: Path, members: dict[str, bytes | str]) -> Path:
    """A zip of these members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def biwi_frame(
    root: Path, name: str, matrix: npt.NDArray[np.float64], pixels: Image | None = None
) -> None:
    """A photo and the file of its pose: three rows of a rotation, then a position."""
    write(root / f"{name}_rgb.png", encoded(pixels, ".png"))
    write(root / f"{name}_pose.txt", f"{rows(matrix)}\n63.6 -21.3 893.7 \n")


def rows(matrix: npt.NDArray[np.float64]) -> str:
    """A matrix as BIWI's files have it."""
    return "".join(" ".join(f"{v:.9g}" for v in row) + " \n" for row in matrix)


def biwi_tree(root: Path, samples: Sequence[Sample], sequences: int = 1) -> Path:
    """Labelled samples as BIWI publishes its own: a rotation matrix beside each frame."""
    boxes = {}
    for i, sample in enumerate(samples):
        name = f"{i % sequences + 1:02d}/frame_{i + 3:05d}"
        biwi_frame(root, name, _known(sample.matrix), sample.load())
        boxes[f"{name}_rgb.png"] = [{"bbox": _corners(sample), "type": "train"}]
    write(root / "BIWI.json", json.dumps(boxes))
    return root


def aflw2000_tree(root: Path, samples: Sequence[Sample]) -> Path:
    """Labelled samples as AFLW2000-3D publishes its own: radians in a .mat file."""
    from scipy.io import savemat

    boxes = {}
    for i, sample in enumerate(samples):
        name = f"image{i + 2:05d}"
        write(root / f"{name}.jpg", encoded(sample.load()))
        pose = np.zeros((1, 7), np.float32)
        pose[0, :3] = np.radians(_known(sample.angles))
        savemat(root / f"{name}.mat", {"Pose_Para": pose, "pt3d_68": np.zeros((3, 68))})
        boxes[f"{name}.jpg"] = [{"bbox": _corners(sample)}]
    write(root / "AFLW2000.json", json.dumps(boxes))
    return root


def _corners(sample: Sample) -> list[float]:
    box = _known(sample.box)
    return [box.x_min, box.y_min, box.x_max, box.y_max]


def _known(value: Any) -> Any:
    """What every labelled sample has."""
    assert value is not None
    return value
