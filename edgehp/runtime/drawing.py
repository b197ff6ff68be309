"""Draw head poses into photos, and write the photos and films, whole or not at all.

A pose is drawn as three axes fixed to the head, and the box.

The axes start at the centre of the box and are projected straight onto the picture:

* red: to the image's right for a frontal face (x), which is the subject's own left,
* green: down through the chin (y),
* blue: out of the face, where the nose points (-z: z runs away from the camera).

For a frontal face blue is a dot, since it points at the viewer. With +yaw blue goes to the
image's left, with +pitch up, with +roll red and green turn clockwise.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.errors import DataError, UsageError
from edgehp.files import output_to, write_output
from edgehp.images import PHOTO_SUFFIXES
from edgehp.pose import matrix_from_euler
from edgehp.runtime.predict import FrameResult
from edgehp.runtime.sources import Source

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

# RGB
_RED, _GREEN, _BLUE = (230, 40, 40), (40, 200, 40), (60, 90, 255)
_BOX = {"ok": (255, 255, 255), "out_of_range": (255, 170, 0), "low_confidence": (150, 150, 150)}
# Head axes that are drawn, as columns: right, down, out of the face.
_AXES = np.diag([1.0, 1.0, -1.0])


def axis_ends(angles: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Where the drawn axes end: [3, 2], one row (x, y) each for red, green, blue.

    Args:
        angles: pitch, yaw, roll, degrees, convention ``"aflw2000"``.

    Returns:
        Offsets from the start of the axes, x to the right and y down, in units of their length.
    """
    return np.asarray((matrix_from_euler(angles) @ _AXES)[:2].T)


def draw_pose(photo: Image, box: Box, angles: npt.ArrayLike, state: str = "ok") -> None:
    """Draw box, axes and text into `photo` (uint8 [H, W, 3], RGB), which is changed.

    Args:
        photo: the photo.
        box: the face in pixels.
        angles: pitch, yaw, roll, degrees.
        state: the face's state; it sets the colour of the box.
    """
    height, width = photo.shape[:2]
    a = np.asarray(angles, np.float64)
    thick = max(1, round(max(height, width) / 400))
    centre = np.array([(box.x_min + box.x_max) / 2, (box.y_min + box.y_max) / 2])
    # OpenCV 5 crashes on letters far larger than the picture.
    length = min(max(box.width, box.height) / 2, 2.0 * max(height, width))
    colour = _BOX.get(state, _BOX["ok"])
    corner = _point((box.x_min, box.y_min))
    cv2.rectangle(photo, corner, _point((box.x_max, box.y_max)), colour, thick, cv2.LINE_AA)
    ends = centre + length * axis_ends(a)
    # Blue last: it is the one that tells where the head points.
    for end, axis in zip(ends, (_RED, _GREEN, _BLUE), strict=True):
        cv2.line(photo, _point(centre), _point(end), axis, 2 * thick, cv2.LINE_AA)
    cv2.circle(photo, _point(ends[2]), 3 * thick, _BLUE, -1, cv2.LINE_AA)
    text = f"p {a[0]:+.0f} y {a[1]:+.0f} r {a[2]:+.0f}"
    scale = float(np.clip(length / 200, 0.35, 5))
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    at = (
        int(np.clip(corner[0], 0, max(0, width - text_width))),
        int(np.clip(corner[1] - 2 * thick, text_height, max(text_height, height - 2))),
    )
    # A shadow, not an outline: a thicker letter is also a wider one in OpenCV 5.
    for ink, shift in (((0, 0, 0), thick), (colour, 0)):
        place = at[0] + shift, at[1] + shift
        cv2.putText(photo, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thick, cv2.LINE_AA)


def _point(values: npt.ArrayLike) -> tuple[int, int]:
    """Whole pixels, within what OpenCV draws."""
    x, y = np.clip(np.rint(np.asarray(values, np.float64)), -30_000, 30_000)
    return int(x), int(y)


# --- saving ---------------------------------------------------------------------------------------

# Container -> codec that OpenCV's own FFmpeg writes everywhere.
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}
# Cameras do not say their rate; a video needs one.
_DEFAULT_RATE = 30.0


class Saver:
    """Draws and writes results; a context manager that ends what it wrote."""

    def add(self, result: FrameResult) -> None:
        """Draw the faces of one frame and write the picture.

        Raises:
            DataError: it cannot be encoded.
            EnvironmentalError: it cannot be written.
        """

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def open_saver(target: Path, source: Source) -> Saver:
    """Where the drawn results of `source` go.

    Args:
        target: a photo for a photo, a video for a video or camera, or a folder; a folder is made.
        source: what is predicted on.

    Raises:
        UsageError: the kind of file does not fit the source, or it would overwrite the source.
    """
    suffix = target.suffix.lower()
    moving = source.kind in ("video", "camera", "gstreamer")
    if target.resolve() == Path(source.name).resolve() or (
        source.kind == "photo"
        and (target / source.photos[0].name).resolve() == source.photos[0].resolve()
    ):
        raise UsageError(f"--output {target} would overwrite the source; name another place")
    if not moving:
        single = suffix in PHOTO_SUFFIXES
        if (single and source.kind != "photo") or suffix in _CODECS:
            raise UsageError(
                f"--output {target}: a {source.kind} needs a folder"
                + (", or a .jpg or .png file" if source.kind == "photo" else "")
            )
        return _PhotoSaver(target, single)
    if suffix not in _CODECS:
        if suffix and not target.is_dir():
            raise UsageError(f"--output {target}: a video ends with {', '.join(_CODECS)}")
        name = "camera" if source.live else Path(source.name).stem
        target = target / f"{name}-poses.mp4"
    return _VideoSaver(target, source.fps or _DEFAULT_RATE)


def _drawn(result: FrameResult) -> Image | None:
    if result.frame.photo is None:
        return None
    picture = result.frame.photo.copy()
    for face in result.faces:
        draw_pose(picture, face.box, face.angles, face.result.state)
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8)


class _PhotoSaver(Saver):
    def __init__(self, target: Path, single: bool) -> None:
        self._target = target
        self._single = single

    def add(self, result: FrameResult) -> None:
        picture = _drawn(result)
        if picture is None:
            return
        path = self._target if self._single else self._target / result.frame.name
        ok, data = cv2.imencode(path.suffix, picture)
        if not ok:
            raise DataError(f"{path}: OpenCV cannot encode this picture")
        write_output(path, data.tobytes())


class _VideoSaver(Saver):
    """One video. What was drawn is kept, however the frames end: by Ctrl-C, a camera that stops."""

    def __init__(self, target: Path, rate: float) -> None:
        self._target = target
        self._rate = rate
        self._writer: cv2.VideoWriter | None = None
        self._size: tuple[int, int] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0
        self._failed = False

    def __enter__(self) -> _VideoSaver:
        with output_to(self._target, "--output"):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # A folder of its own beside the target: FFmpeg chooses the container by the suffix.
            self._folder = tempfile.TemporaryDirectory(prefix=".edgehp-", dir=self._target.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._folder is None:
            return
        with _uninterrupted():
            try:
                if self._writer is not None:
                    self._writer.release()
                    if not self._failed:
                        with output_to(self._target, "--output"):
                            (Path(self._folder.name) / self._target.name).replace(self._target)
                        if kind is not None:
                            logger.warning(
                                "%s holds the %d frames so far", self._target, self._count
                            )
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
                self._failed = True
                raise DataError(
                    f"{self._target}: this OpenCV cannot write such a video\nhint: save to a .avi "
                    "file"
                )
        if size != self._size:
            raise DataError(
                f"{self._target}: the frame size changed from {self._size} to {size} after "
                f"{self._count} frames; a film has one size"
            )
        self._writer.write(picture)
        self._count += 1


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM inside, for the moment that finishing a file takes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
