"""Rendered samples -> a zip with ``labels.csv``; the same samples always give the same bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.files import replacing

Array = npt.NDArray[np.float64]

_MATRIX = [f"r{i}{j}" for i in range(3) for j in range(3)]
_EPOCH = (1980, 1, 1, 0, 0, 0)
HEADER = ",".join(
    ["image", "width", "height", "x_min", "y_min", "x_max", "y_max", "pitch", "yaw", "roll",
     *_MATRIX, "nir", "seed"]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RenderedSample:
    """A row: pixels, degrees (convention ``"aflw2000"``) and the canonical matrix."""

    image: str
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    angles: Array
    matrix: Array
    nir: bool
    seed: int


def csv_line(s: RenderedSample) -> str:
    """The row's text; enough digits that the matrix stays a rotation."""
    values = [f"{v:.2f}" for v in s.box] + [f"{v:.6f}" for v in s.angles]
    values += [f"{v:.9f}" for v in s.matrix.ravel()]
    return ",".join(
        [s.image, str(s.size[0]), str(s.size[1]), *values, str(int(s.nir)), str(s.seed)]
    )


def encode(image: object, quality: int) -> bytes:
    """A JPEG file of an RGB picture."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)  # type: ignore[call-overload]
    good, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return bytes(data.tobytes())


def write_zip(path: Path, samples: Iterable[tuple[RenderedSample, bytes]]) -> int:
    """Write ``NAME/NNNNN.jpg`` and ``NAME/labels.csv``; nothing is left of a failed attempt."""
    name, lines = path.stem, [HEADER]
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for sample, data in samples:
            archive.writestr(zipfile.ZipInfo(f"{name}/{sample.image}", _EPOCH), data)
            lines.append(csv_line(sample))
        info = zipfile.ZipInfo(f"{name}/labels.csv", _EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, "\n".join(lines) + "\n")
    return len(lines) - 1
