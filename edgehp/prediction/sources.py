"""Where frames come from: a photo, a folder of photos, a video file, a camera."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp._opencv import opencv_silenced
from edgehp.errors import DataError, EnvironmentalError, UsageError
from edgehp.images import PHOTO_SUFFIXES, decode_photo, read_bytes

__all__ = ["VIDEO_SUFFIXES", "Frame", "Source", "open_source"]

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
_CAMERA = re.compile(r"camera:([0-9]{1,3})")


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture.

    Attributes:
        source: the photo's or video's path, or ``camera:N``, as the user wrote it.
        name: the photo's path relative to the source; the file's name for a single one.
        index: number of the frame in its video, from 0; None for a photo.
        seconds: its time in the video by the frame rate; None for photos and cameras.
        photo: uint8 [H, W, 3], RGB; None where it cannot be read.
        problem: why it cannot be read.
    """

    source: str
    name: str
    index: int | None = None
    seconds: float | None = None
    photo: Image | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """What the user named.

    Attributes:
        kind: ``"photo"``, ``"folder"``, ``"video"`` or ``"camera"``.
        text: as the user wrote it.
        photos: files of a photo or folder, sorted.
        camera: number of the camera.
    """

    kind: str
    text: str
    photos: tuple[Path, ...] = ()
    camera: int | None = None

    def rate(self) -> float | None:
        """Frames per second of a video; None for the others, or where the file does not say."""
        if self.kind != "video":
            return None
        capture = cv2.VideoCapture(self.text)
        try:
            rate = capture.get(cv2.CAP_PROP_FPS) if capture.isOpened() else 0.0
        finally:
            capture.release()
        return rate if 0 < rate <= 1000 else None

    def frames(self, upright: bool = True) -> Iterator[Frame]:
        """The frames in order; a camera's never end.

        Args:
            upright: turn photos as their EXIF orientation says, as viewers do. A head pose is
                relative to the picture's upright. Box lists refer to the pixels as stored: pass
                False with one.

        A photo of a folder that cannot be read becomes a frame with a problem, since one bad file
        must not hide the others.

        Raises:
            DataError: a single photo or the video cannot be read.
            EnvironmentalError: the camera cannot be opened.
        """
        if self.kind == "photo":
            path = self.photos[0]
            yield Frame(self.text, path.name, photo=_load(path, upright))
        elif self.kind == "folder":
            for path in self.photos:
                name = path.relative_to(self.text).as_posix()
                try:
                    yield Frame(self.text, name, photo=_load(path, upright))
                except DataError as e:
                    yield Frame(self.text, name, problem=str(e))
        else:
            yield from self._video()

    def _video(self) -> Iterator[Frame]:
        with opencv_silenced(logger):
            capture = cv2.VideoCapture(self.text if self.camera is None else self.camera)
        try:
            if not capture.isOpened():
                raise self._unreadable("cannot be opened")
            rate = 0.0 if self.camera is not None else capture.get(cv2.CAP_PROP_FPS)
            index = 0
            while True:
                got, pixels = capture.read()
                if not got or pixels is None:
                    break
                seconds = index / rate if rate > 0 else None
                photo = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
                yield Frame(self.text, Path(self.text).name, index, seconds, photo)
                index += 1
            if index == 0 or self.camera is not None:
                raise self._unreadable("gave no frame" if index == 0 else "stopped giving frames")
        finally:
            capture.release()

    def _unreadable(self, what: str) -> DataError | EnvironmentalError:
        if self.camera is not None:
            return EnvironmentalError(
                f"{self.text} {what}; is a camera connected, free, and yours to use (group video)?"
            )
        return DataError(
            f"{self.text}: the video {what}: it is damaged, or in a format this OpenCV lacks; "
            "convert it to H.264 in MP4"
        )


def open_source(text: str) -> Source:
    """What `text` names; nothing is decoded yet.

    Args:
        text: a photo (JPEG, PNG), a folder of them (searched with its subfolders), a video file,
            or ``camera:N``.

    Raises:
        DataError: nothing there, or a folder without photos.
        UsageError: a file of another kind.
    """
    if match := _CAMERA.fullmatch(text):
        return Source("camera", text, camera=int(match[1]))
    path = Path(text)
    if path.is_dir():
        photos = tuple(
            sorted(p for p in path.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file())
        )
        if not photos:
            raise DataError(f"{text}: no photos ({', '.join(PHOTO_SUFFIXES)}) in this folder")
        return Source("folder", text, photos)
    suffix = path.suffix.lower()
    if not path.is_file():
        hint = "; a camera is called camera:0" if text.lower().startswith("camera") else ""
        raise DataError(f"{text}: no such photo, folder or video{hint}")
    if suffix in PHOTO_SUFFIXES:
        return Source("photo", text, (path,))
    if suffix in VIDEO_SUFFIXES:
        return Source("video", text)
    raise UsageError(
        f"{text}: expected a photo ({', '.join(PHOTO_SUFFIXES)}), a folder, a video "
        f"({', '.join(VIDEO_SUFFIXES)}) or camera:N"
    )


def _load(path: Path, upright: bool) -> Image:
    data = read_bytes(path, "a photo")
    photo = decode_photo(data, str(path))
    # The EXIF segment comes first; a second decoding is spared where there is none.
    if not upright or b"Exif" not in data[:65536]:
        return photo
    turned = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if turned is None:
        return photo
    return np.asarray(cv2.cvtColor(turned, cv2.COLOR_BGR2RGB), np.uint8)
