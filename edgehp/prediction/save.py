"""Write pictures and videos with the poses drawn into them, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np

from edgehp.errors import DataError, UsageError
from edgehp.files import output_to, write_whole
from edgehp.images import PHOTO_SUFFIXES
from edgehp.prediction.draw import Image, draw_pose
from edgehp.prediction.run import FrameResult
from edgehp.prediction.sources import Source

__all__ = ["Saver", "open_saver"]

# Container -> codec that OpenCV's own FFmpeg writes everywhere.
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}
# Cameras do not say their rate; a video needs one.
_DEFAULT_RATE = 30.0


class Saver(Protocol):
    """Draws and writes results."""

    def add(self, result: FrameResult) -> None:
        """Draw the faces of one frame and write the picture.

        Raises:
            DataError: it cannot be encoded.
            EnvironmentalError: it cannot be written.
        """

    def __enter__(self) -> Saver: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_saver(target: Path, source: Source) -> Saver:
    """Where the drawn results of `source` go.

    Args:
        target: a photo for a photo, a video for a video or camera, or a folder; a folder is made.
        source: what is predicted on.

    Raises:
        UsageError: the kind of file does not fit the source, or it would overwrite the source.
    """
    suffix = target.suffix.lower()
    moving = source.kind in ("video", "camera")
    if target.resolve() == Path(source.text).resolve() or (
        source.kind == "photo"
        and (target / source.photos[0].name).resolve() == source.photos[0].resolve()
    ):
        raise UsageError(f"--save {target} would overwrite the source; name another place")
    if not moving:
        single = suffix in PHOTO_SUFFIXES
        if (single and source.kind != "photo") or suffix in _CODECS:
            raise UsageError(
                f"--save {target}: a {source.kind} needs a folder"
                + (", or a .jpg or .png file" if source.kind == "photo" else "")
            )
        return _PhotoSaver(target, single)
    if suffix not in _CODECS:
        if suffix and not target.is_dir():
            raise UsageError(f"--save {target}: a video ends with {', '.join(_CODECS)}")
        name = Path(source.text).stem if source.camera is None else f"camera-{source.camera}"
        target = target / f"{name}-poses.mp4"
    return _VideoSaver(target, source.rate() or _DEFAULT_RATE)


def _drawn(result: FrameResult) -> Image | None:
    if result.frame.photo is None:
        return None
    picture = result.frame.photo.copy()
    for face in result.faces:
        draw_pose(picture, face.box, face.angles, face.judgement.state)
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8)


class _PhotoSaver:
    def __init__(self, target: Path, single: bool) -> None:
        self._target = target
        self._single = single

    def __enter__(self) -> _PhotoSaver:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, result: FrameResult) -> None:
        picture = _drawn(result)
        if picture is None:
            return
        path = self._target if self._single else self._target / result.frame.name
        ok, data = cv2.imencode(path.suffix, picture)
        if not ok:
            raise DataError(f"{path}: OpenCV cannot encode this picture")
        with output_to(path, "--save"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data.tobytes())


class _VideoSaver:
    """One video. What is complete is kept when the user stops a camera."""

    def __init__(self, target: Path, rate: float) -> None:
        self._target = target
        self._rate = rate
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _VideoSaver:
        with output_to(self._target, "--save"):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # A folder of its own beside the target: FFmpeg chooses the container by the suffix.
            self._folder = tempfile.TemporaryDirectory(prefix=".edgehp-", dir=self._target.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._folder is None:
            return
        try:
            if self._writer is not None:
                self._writer.release()
                if kind is None or issubclass(kind, KeyboardInterrupt):
                    with output_to(self._target, "--save"):
                        (Path(self._folder.name) / self._target.name).replace(self._target)
        finally:
            self._folder.cleanup()

    def add(self, result: FrameResult) -> None:
        picture = _drawn(result)
        if picture is None or self._folder is None:
            return
        size = picture.shape[1], picture.shape[0]
        if self._writer is None:
            path = Path(self._folder.name) / self._target.name
            codec = cv2.VideoWriter.fourcc(*_CODECS[self._target.suffix.lower()])
            self._writer = cv2.VideoWriter(str(path), codec, self._rate, size)
            self._size = size
            if not self._writer.isOpened():
                raise DataError(
                    f"{self._target}: this OpenCV cannot write such a video; save to a .avi file"
                )
        if size != self._size:
            raise DataError(f"{self._target}: the frame size changed from {self._size} to {size}")
        self._writer.write(picture)
