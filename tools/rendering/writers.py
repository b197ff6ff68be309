"""Samples -> a folder or zip with ``labels.csv``; the same samples always give the same bytes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import cv2

from edgehp.files import replacing

from .samples import HEADER, RenderedSample, csv_line

_EPOCH = (1980, 1, 1, 0, 0, 0)


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


def write_folder(path: Path, samples: Iterable[tuple[RenderedSample, bytes]]) -> int:
    """The same as files below `path`."""
    path.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    text.write(HEADER + "\n")
    count = 0
    for sample, data in samples:
        (path / sample.image).write_bytes(data)
        text.write(csv_line(sample) + "\n")
        count += 1
    (path / "labels.csv").write_text(text.getvalue(), encoding="utf-8")
    return count
