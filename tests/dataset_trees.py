"""Photos and small data sets written in the exact layouts, for the tests of the readers."""

from __future__ import annotations

import zipfile
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

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
