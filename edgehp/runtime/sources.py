"""What delivers frames: a camera, a GStreamer pipeline, a video file, a folder of photos."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from edgehp.errors import DataError, EdgehpError, EnvironmentalError, UsageError
from edgehp.images import PHOTO_SUFFIXES
from edgehp.prediction.sources import open_source

__all__ = ["Capture", "CaptureSource", "FolderCapture", "parse_source"]

_CAMERA = re.compile(r"camera:([0-9]{1,3})")
_GSTREAMER = "gstreamer:"


class Capture(Protocol):
    """An opened device or file, as `cv2.VideoCapture` is one."""

    def read(self) -> tuple[bool, object]:
        """Whether there is a frame, and the frame (BGR or grey); may block until there is one."""

    def release(self) -> None:
        """Close it."""


@dataclass(frozen=True)
class CaptureSource:
    """What the user named, ready to be opened, and opened again.

    Attributes:
        name: as the user wrote it.
        live: a device that must not end: an end is a loss. Files end.
        open: opens it; raises an EdgehpError where that fails.
        fps: frames per second at which a file is played; None for a device, which has its own.
    """

    name: str
    live: bool
    open: Callable[[], Capture]
    fps: float | None = None

    def named(self, reason: str) -> str:
        """A fault of the source, with its name once."""
        return reason if self.name in reason else f"{self.name}: {reason}"


class FolderCapture:
    """The photos of a folder, sorted by name, as frames; one that cannot be read is no frame."""

    def __init__(self, photos: tuple[Path, ...]) -> None:
        self._photos = iter(photos)

    def read(self) -> tuple[bool, object]:
        """The next photo as it is stored, BGR or grey; not ok at the end."""
        path = next(self._photos, None)
        if path is None:
            return False, None
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as e:
            return True, DataError(f"{path}: {e.strerror}")
        photo = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
        return True, photo if photo is not None else DataError(f"{path}: not a photo")

    def release(self) -> None:
        """Nothing is open."""


def parse_source(text: str, fps: float | None = None) -> CaptureSource:
    """What `text` names; nothing is opened yet.

    Args:
        text: ``camera:N``, ``gstreamer:PIPELINE`` (its last element an appsink), a video file or
            a folder of photos.
        fps: play a file at this rate; by default a video's own, and 30 for a folder.

    Raises:
        UsageError: none of these.
        DataError: nothing there.
        EnvironmentalError: this OpenCV has no GStreamer.
    """
    if match := _CAMERA.fullmatch(text):
        number = int(match[1])
        return CaptureSource(text, True, lambda: _opened(cv2.VideoCapture(number), text))
    if text.startswith(_GSTREAMER):
        pipeline = text.removeprefix(_GSTREAMER).strip()
        if not pipeline:
            raise UsageError("gstreamer: needs a pipeline, such as 'gstreamer:v4l2src ! appsink'")
        _require_gstreamer()
        return CaptureSource(
            text, True, lambda: _opened(cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER), text)
        )
    found = open_source(text)
    if found.kind == "folder":
        photos = found.photos
        return CaptureSource(text, False, lambda: FolderCapture(photos), fps or 30.0)
    if found.kind == "video":
        rate = fps or found.rate() or 30.0
        return CaptureSource(text, False, lambda: _opened(cv2.VideoCapture(text), text), rate)
    raise UsageError(
        f"{text}: one photo is no source of frames; use 'edgehp predict', or give a folder "
        f"({', '.join(PHOTO_SUFFIXES)}), a video, camera:N or gstreamer:PIPELINE"
    )


def _opened(capture: cv2.VideoCapture, name: str) -> Capture:
    if capture.isOpened():
        return capture
    capture.release()
    raise _cannot_open(name)


def _cannot_open(name: str) -> EdgehpError:
    if name.startswith("camera:"):
        return EnvironmentalError(
            f"{name} cannot be opened; is it connected, free, and yours to use (group video)?"
        )
    if name.startswith(_GSTREAMER):
        return EnvironmentalError(
            f"{name} cannot be opened; try the pipeline with gst-launch-1.0, with fakesink in "
            "place of appsink; OpenCV's own words come with edgehp -vv run"
        )
    return DataError(
        f"{name}: the video cannot be opened: it is damaged, or in a format this OpenCV lacks; "
        "convert it to H.264 in MP4"
    )


def _require_gstreamer() -> None:
    for line in cv2.getBuildInformation().splitlines():
        if line.strip().startswith("GStreamer:") and "YES" in line:
            return
    raise EnvironmentalError(
        "this OpenCV was built without GStreamer, as the wheels on PyPI are; use the OpenCV of "
        "JetPack or of the distribution (python3-opencv), or camera:N"
    )
