"""Where frames come from: a photo, a folder of photos, a film, a camera, a GStreamer pipeline.

`edgehp predict` and `edgehp run` name their sources alike and read them here. A `Source` says what
the user named and opens it; what it opens delivers frames as `cv2.VideoCapture` does: BGR or grey,
8 or 16 bits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.errors import (
    DataError,
    EnvironmentalError,
    UsageError,
    without_password,
)
from edgehp.files import read_bytes, require_utf8, stand_in
from edgehp.images import PHOTO_SUFFIXES, decode_photo, find_photos
from edgehp.runtime.frames import to_rgb

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# Containers that count their frames; of the others OpenCV estimates the number from the duration.
_COUNTING = (".avi", ".m4v", ".mov", ".mp4")
_GSTREAMER = "gstreamer:"
_CAMERA_LINKS = (Path("/dev/v4l/by-id"), Path("/dev/v4l/by-path"))
_STREAM = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# The element that reads a stream, by its scheme.
_ELEMENTS = {
    "rtsp": "rtspsrc location=... latency=0",
    "http": "souphttpsrc location=...",
    "https": "souphttpsrc location=...",
    "udp": "udpsrc port=...",
}
_DEFAULT_RATE = 30.0
# In the caps of a GStreamer pipeline.
_FORMAT = re.compile(r"\bformat\s*=\s*(?:\(string\)\s*)?\"?(\w+)")


class Capture(Protocol):
    """An opened device or file, as `cv2.VideoCapture` is one."""

    def read(self) -> tuple[bool, object]:
        """Whether there is a frame, and the frame (BGR or grey); may block until there is one."""

    def release(self) -> None:
        """Close it."""


class TimedCapture(Capture, Protocol):
    """An opened file: its frames have times, and it knows whether it has given them all.

    Attributes:
        name: of the frame read last: the photo's path below the folder, or the film's file name.
        seconds: its time from the beginning.
    """

    name: str
    seconds: float

    def shortfall(self) -> str | None:
        """At the end: what is missing; None where all frames came."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture for `edgehp.runtime.predict`.

    Attributes:
        source: the photo's or film's path, or the camera, as the user wrote it.
        name: the photo's path relative to the source; the file's name for a single one.
        index: number of the frame in its film or from its camera, from 0; None for a photo.
        seconds: its time in the film; None for photos and cameras.
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
    """What the user named, ready to be opened, and opened again.

    Attributes:
        name: as the user wrote it, without passwords.
        live: a device that must not end: an end is a loss. Files end, and open as `TimedCapture`.
        open: opens it; raises an EdgehpError where that fails.
        fps: nominal frames per second of a file; None for a device, which has its own.
        kind: ``"photo"``, ``"folder"``, ``"video"``, ``"camera"`` or ``"gstreamer"``.
        photos: files of a photo or folder, sorted.
        nv12: its frames are NV12, uint8 [H * 3 / 2, W]: see `edgehp.crop.Picture`.
        bits: significant bits of a device's frames of 16 bits; see `edgehp.images.to_8_bits`.
    """

    name: str
    live: bool
    open: Callable[[], Capture]
    fps: float | None = None
    kind: str = "camera"
    photos: tuple[Path, ...] = ()
    nv12: bool = False
    bits: int | None = None

    def named(self, reason: str) -> str:
        """A fault of the source, with its name once and no password."""
        reason = without_password(reason)
        return reason if self.name in reason else f"{self.name}: {reason}"

    def frames(self) -> Iterator[Frame]:
        """The frames in order; a camera's never end.

        A photo of a folder that cannot be read becomes a frame with a problem, since one bad file
        must not hide the others.

        Raises:
            DataError: a single photo or the film cannot be read, or the film ends early (after
                the frames that it has).
            EnvironmentalError: the camera cannot be opened, or stopped.
        """
        capture = self.open()
        count = 0
        try:
            while True:
                got, pixels = _read(capture, self)
                if not got or pixels is None:
                    break
                yield self._frame(capture, pixels, count)
                count += 1
            self._check_end(capture, count)
        finally:
            capture.release()

    def _frame(self, capture: Capture, pixels: object, index: int) -> Frame:
        if isinstance(pixels, DataError):
            if self.kind == "photo":
                raise pixels
            return Frame(self.name, getattr(capture, "name", ""), problem=str(pixels))
        photo = to_rgb(np.asarray(pixels), bit_depth=self.bits, nv12=self.nv12)
        if self.kind in ("photo", "folder"):
            return Frame(self.name, getattr(capture, "name", ""), photo=photo)
        seconds = getattr(capture, "seconds", None) if self.kind == "video" else None
        return Frame(self.name, Path(self.name).name, index, seconds, photo)

    def _check_end(self, capture: Capture, count: int) -> None:
        if self.live:
            what = "stopped giving frames" if count else "gave no frame"
            raise EnvironmentalError(
                f"{self.name} {what}\nhint: is the camera connected, free, and yours to use "
                "(group video)?"
            )
        if self.kind == "video" and count == 0:
            raise _unreadable(self.name, "gave no frame")
        if isinstance(capture, Film) and (missing := capture.shortfall()) is not None:
            raise DataError(missing)


def _read(capture: Capture, source: Source) -> tuple[bool, object]:
    try:
        return capture.read()
    except (cv2.error, OSError) as e:
        raise EnvironmentalError(source.named(f"reading failed: {e}")) from e


class Photos:
    """Photos as frames; one that cannot be read comes as the `DataError` that says why."""

    def __init__(
        self, photos: tuple[Path, ...], root: Path, fps: float, upright: bool, bits: int | None
    ) -> None:
        self._photos, self._root, self._fps = photos, root, fps
        self._upright, self._bits = upright, bits
        self._next = 0
        self.name, self.seconds = "", 0.0

    def read(self) -> tuple[bool, object]:
        """The next photo, uint8 BGR, or what is wrong; not ok at the end."""
        if self._next == len(self._photos):
            return False, None
        path = self._photos[self._next]
        self.name = path.name if path == self._root else path.relative_to(self._root).as_posix()
        self.seconds = self._next / self._fps
        self._next += 1
        try:
            data = read_bytes(path, "a photo")
            photo = decode_photo(data, str(path), upright=self._upright, bits=self._bits)
        except DataError as e:
            return True, e
        return True, np.ascontiguousarray(photo[..., ::-1])

    def release(self) -> None:
        """Nothing is open."""

    def shortfall(self) -> str | None:
        """Nothing can be missing."""
        return None


class Film:
    """A video file whose frames have the times that the file gives them."""

    def __init__(self, path: str, fps: float | None = None) -> None:
        """Open it.

        Args:
            path: of the file.
            fps: play it at this rate instead.

        Raises:
            DataError: OpenCV cannot open it.
        """
        self.name, self.seconds = Path(path).name, 0.0
        self._path, self._fps = path, fps
        self._capture = cv2.VideoCapture(path)
        if not self._capture.isOpened():
            self._capture.release()
            raise _unreadable(path, "cannot be opened")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else _DEFAULT_RATE
        self._count = 0
        self._counting = False  # the times, for want of stamps

    def read(self) -> tuple[bool, object]:
        """The next frame, BGR; not ok at the end."""
        got, pixels = self._capture.read()
        if not got or pixels is None:
            return False, None
        stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if self._fps is not None:
            self.seconds = self._count / self._fps
        elif self._count == 0:
            self.seconds = max(0.0, stamp)
        elif stamp > self.seconds:
            self.seconds = stamp
        else:
            # A file without time stamps, or of which they begin anew.
            if not self._counting:
                logger.warning(
                    "%s: the time of frame %d, %.3f s, is not after that of the one before, %.3f s"
                    ": counting on at %g frames a second",
                    self._path,
                    self._count,
                    stamp,
                    self.seconds,
                    self.rate,
                )
            self._counting = True
            self.seconds += 1 / self.rate
        self._count += 1
        return True, pixels

    def release(self) -> None:
        """Close it."""
        self._capture.release()

    def shortfall(self) -> str | None:
        """What is missing where fewer frames came than the file announces."""
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not (0 < announced < 1e9) or announced - self._count <= max(1.0, announced / 100):
            return None
        counts = Path(self._path).suffix.lower() in _COUNTING
        if (
            not counts
            and self._fps is None
            and self.seconds + 2 / self.rate >= (announced / self.rate)
        ):
            return None  # of a variable rate: fewer frames, but up to the end
        return (
            f"{self._path}: the film gave {self._count} of {announced:.0f} frames, the last one at "
            f"{self.seconds:.2f} s: its end is missing, or it is damaged inside\n"
            "hint: copy it again from where it was recorded"
        )


def parse_source(
    text: str, fps: float | None = None, *, upright: bool = True, bits: int | None = None
) -> Source:
    """What `text` names; no camera is opened yet.

    Args:
        text: a photo (JPEG, PNG, TIFF, WebP), a folder of them (searched with its subfolders), a
            video file, a camera (``camera:0``, ``camera:/dev/video0``, ``/dev/v4l/by-id/...``, or
            ``camera:NAME`` of a link in /dev/v4l/by-id or by-path) or ``gstreamer:PIPELINE`` (its
            last element an appsink).
        fps: play a file at this rate; by default a video by its own times, a folder at 30.
        upright: turn photos as their EXIF orientation says, as viewers do. A head pose is relative
            to the picture's upright. Box lists refer to the pixels as stored: False with one.
        bits: significant bits of 16-bit samples; see `edgehp.images.to_8_bits`.

    Raises:
        UsageError: none of these.
        DataError: nothing there, or a folder without photos.
        EnvironmentalError: this OpenCV has no GStreamer.
    """
    name = without_password(text)
    if text.startswith(("camera:", "/dev/")):
        return replace(_camera(text.removeprefix("camera:"), name), bits=bits)
    if text.startswith(_GSTREAMER):
        return replace(_pipeline(text.removeprefix(_GSTREAMER).strip(), name), bits=bits)
    if _STREAM.match(text):
        scheme = text.partition("://")[0].lower()
        raise UsageError(
            f"{name}: a network stream is read through GStreamer\n"
            f"hint: give 'gstreamer:{_ELEMENTS.get(scheme, _ELEMENTS['rtsp'])} ! decodebin ! "
            "videoconvert ! video/x-raw,format=BGR ! appsink drop=1 max-buffers=1'"
        )
    return _file(text, fps, upright, bits)


def _camera(spec: str, name: str) -> Source:
    if re.fullmatch(r"[0-9]{1,3}", spec):
        number = int(spec)
        return Source(name, True, lambda: _opened(cv2.VideoCapture(number), name))
    if spec.startswith("/"):
        path = Path(spec)
    else:
        # The link may appear later, and then lead to another device: it is looked for each time.
        path = next((f / spec for f in _CAMERA_LINKS if (f / spec).exists()), Path())
        if not re.fullmatch(r"[\w.:+-]*[A-Za-z][\w.:+-]*", spec):
            raise UsageError(f"{name}: expected a camera{_cameras_hint()}")
        if path == Path():
            path = _CAMERA_LINKS[0] / spec
    if path.is_dir():
        raise UsageError(f"{name}: a folder, expected a camera{_cameras_hint()}")

    def opened() -> Capture:
        if not path.exists():
            where = "" if name.endswith(spec) and path == Path(spec) else f" at {path}"
            raise EnvironmentalError(f"{name}: there is no camera{where}{_cameras_hint()}")
        return _opened(cv2.VideoCapture(str(path), cv2.CAP_V4L2), name)

    return Source(name, True, opened)


def _cameras_hint() -> str:
    found = [str(p) for folder in _CAMERA_LINKS for p in sorted(folder.glob("*"))]
    found += map(str, sorted(Path("/dev").glob("video*")))
    here = f"; here are {', '.join(found[:4])}" if found else "; there is none here now"
    return f"\nhint: a camera is camera:0, /dev/video0 or /dev/v4l/by-id/NAME{here}"


def _pipeline(pipeline: str, name: str) -> Source:
    if not pipeline:
        raise UsageError("gstreamer: needs a pipeline, such as 'gstreamer:v4l2src ! appsink'")
    for line in cv2.getBuildInformation().splitlines():
        if line.strip().startswith("GStreamer:") and "YES" in line:
            break
    else:
        raise EnvironmentalError(
            "this OpenCV was built without GStreamer, as the wheels on PyPI are\nhint: use the "
            "OpenCV of JetPack or of the distribution (python3-opencv), or a camera by its number"
        )
    return Source(
        name,
        True,
        lambda: _opened(cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER), name),
        kind="gstreamer",
        # What reaches the appsink; OpenCV hands these planes over as they are.
        nv12=_FORMAT.findall(pipeline)[-1:] == ["NV12"],
    )


def _file(text: str, fps: float | None, upright: bool, bits: int | None) -> Source:
    path, rate = Path(text), fps or _DEFAULT_RATE
    suffix = path.suffix.lower()
    if path.is_dir() or (suffix in PHOTO_SUFFIXES and path.is_file()):
        kind = "folder" if path.is_dir() else "photo"
        # As stored means: a list of boxes says so.
        photos = find_photos(path, listed=not upright) if kind == "folder" else (path,)
        opener = partial(Photos, photos, path, rate, upright, bits)
        return Source(text, False, opener, rate, kind, photos)
    if not path.is_file():
        like = text.lower().startswith("camera") or text.isdigit()
        what = "a link to nowhere, expected a" if path.is_symlink() else "no such"
        raise DataError(
            f"{text}: {what} photo, folder or video" + ("\nhint: did you mean camera:0?" * like)
        )
    if suffix in VIDEO_SUFFIXES:
        require_utf8(text)
        with path.open("rb") as file:
            head = file.read(512)
        if (other := stand_in(head)) is not None or not head:
            raise DataError(f"{text} is {other or 'an empty file, expected a video'}")
        return Source(text, False, lambda: Film(text, fps), fps or _rate(text), "video")
    raise UsageError(
        f"{text}: expected a photo ({', '.join(PHOTO_SUFFIXES)}), a folder, a video "
        f"({', '.join(VIDEO_SUFFIXES)}), camera:N or gstreamer:PIPELINE\n"
        "hint: convert other photos to PNG and other videos to H.264 in MP4, unpack a zip"
    )


def _rate(path: str) -> float:
    try:
        film = Film(path)
    except DataError:
        return _DEFAULT_RATE  # opening it for reading will say so
    film.release()
    return film.rate


def _opened(capture: cv2.VideoCapture, name: str) -> Capture:
    if capture.isOpened():
        return capture
    capture.release()
    hint = "is it connected, free, and yours to use (group video)?"
    if name.startswith(_GSTREAMER):
        hint = (
            "try the pipeline with gst-launch-1.0, with fakesink in place of appsink; OpenCV's own "
            "words come with edgehp -vv"
        )
    raise EnvironmentalError(f"{name} cannot be opened\nhint: {hint}")


def _unreadable(name: str, what: str) -> DataError:
    return DataError(
        f"{name}: the video {what}: it is damaged, or in a format this OpenCV lacks\n"
        "hint: convert it to H.264 in MP4"
    )
