"""Moving heads with exactly known pose in 1080p frames, and a camera that plays them.

A head is pasted onto a background with a soft edge, moved, scaled and turned in the image plane.
Turning a picture clockwise by phi about the optical axis turns the head by Rz(phi), so the pose of
every frame is known exactly: Rz(phi) R. With `rendered_heads` R itself moves too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.datasets.faces import read_rendered
from edgehp.datasets.lists import read_table
from edgehp.datasets.stores import open_store
from edgehp.pose import matrix_from_euler

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

SIZE = (1920, 1080)
FPS = 30.0


@dataclass(frozen=True, eq=False)
class Head:
    """A picture of a head: uint8 RGB [S, S, 3], its face box in pixels, its rotation [3, 3]."""

    image: Image
    box: Box
    rotation: Array


@dataclass(frozen=True, eq=False)
class ClipFrame:
    """A frame: uint8 BGR [H, W, 3] as cameras give it, the face's centre and side, the truth."""

    pixels: Image
    box: Box
    rotation: Array


class Clip:
    """Frames of a moving head, each a function of its number alone."""

    def __init__(
        self, heads: Sequence[Head], seed: int, size: tuple[int, int] = SIZE, fps: float = FPS
    ) -> None:
        """`heads`: one for every frame in turn, or a single one."""
        self.heads, self.size, self.fps = list(heads), size, fps
        self.rng = np.random.default_rng(seed)
        self.phase = self.rng.uniform(0, 2 * np.pi, 4)
        back = _background(self.rng, size)
        # A sensor's noise; a few of it in turn, since drawing it takes longer than all else.
        self.backs = [_noisy(back, self.rng) for _ in range(4)]

    def frame(self, number: int) -> ClipFrame:
        """Frame `number`, from 0."""
        head = self.heads[number % len(self.heads)]
        t = number / self.fps
        width, height = self.size
        side = head.image.shape[0]
        # The face takes about a third of the height; centre and size move slowly.
        scale = height / 3 / head.box.height * (1 + 0.12 * np.sin(0.9 * t + self.phase[0]))
        phi = 22.0 * np.sin(1.3 * t + self.phase[1])
        cx = width * (0.5 + 0.12 * np.sin(0.7 * t + self.phase[2]))
        cy = height * (0.5 + 0.06 * np.sin(1.1 * t + self.phase[3]))
        # getRotationMatrix2D counts anticlockwise. Only the square that may be covered is drawn.
        reach = int(side * scale * 0.75)
        x0, y0 = int(np.clip(cx - reach, 0, width)), int(np.clip(cy - reach, 0, height))
        part = min(width, int(cx) + reach) - x0, min(height, int(cy) + reach) - y0
        m = cv2.getRotationMatrix2D((side / 2, side / 2), -phi, scale)
        m[:, 2] += (cx - side / 2 - x0, cy - side / 2 - y0)
        mask = cv2.warpAffine(_mask(side), m, part, flags=cv2.INTER_LINEAR)[..., None]
        face = cv2.warpAffine(head.image[..., ::-1].copy(), m, part, flags=cv2.INTER_LINEAR)
        pixels = self.backs[number % len(self.backs)].copy()
        window = pixels[y0 : y0 + part[1], x0 : x0 + part[0]]
        window[:] = window + (face.astype(np.float32) - window) * mask
        b = head.box
        middle = m @ [(b.x_min + b.x_max) / 2, (b.y_min + b.y_max) / 2, 1.0] + (x0, y0)
        half = np.array([b.width, b.height]) * scale / 2
        box = Box(*map(float, (*(middle - half), *(middle + half))))
        rotation = matrix_from_euler([0.0, 0.0, phi]) @ head.rotation
        return ClipFrame(pixels, box, rotation)

    def write(self, path: Path, count: int) -> list[ClipFrame]:
        """Write a video of `count` frames; returns their truth, without the pixels."""
        codec = "MJPG" if path.suffix == ".avi" else "mp4v"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), self.fps, self.size)
        if not writer.isOpened():
            raise RuntimeError(f"{path}: this OpenCV cannot write {codec} videos")
        truth = []
        for number in range(count):
            frame = self.frame(number)
            writer.write(frame.pixels)
            truth.append(ClipFrame(np.empty((0, 0, 3), np.uint8), frame.box, frame.rotation))
        writer.release()
        return truth


def _mask(side: int) -> npt.NDArray[np.float32]:
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    inwards = 1.0 - np.maximum(np.abs(x), np.abs(y))
    return np.asarray(np.clip(inwards / 0.12, 0, 1), np.float32)


def _noisy(back: npt.NDArray[np.float32], rng: np.random.Generator) -> Image:
    noise = rng.integers(-3, 4, (*back.shape[:2], 1), np.int8)
    return np.asarray(np.clip(back + noise, 0, 255), np.uint8)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    coarse = rng.uniform(40, 180, (9, 16, 3)).astype(np.float32)
    return np.asarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC), np.float32)


def packaged_head(archive: Path) -> Head:
    """The first packaged rendered head in colour that looks about straight ahead."""
    name = f"{archive.stem}/labels.csv"
    rows = read_table(open_store(archive).read(name), name).rows
    infrared = {f"{archive.stem}/{row['image']}" for _, row in rows if row["nir"] == "1"}
    for s in read_rendered(archive).samples:
        if s.name in infrared or s.angles is None or s.matrix is None or s.box is None:
            continue
        if np.abs(s.angles).max() <= 15:
            return Head(s.load(), s.box, s.matrix)
    raise ValueError(f"{archive}: no such head")


def rendered_heads(seed: int, count: int) -> list[Head]:
    """One person who turns the head smoothly; needs `anny` and `moderngl`."""
    from rendering.heads import HeadModel
    from rendering.scene import Ranges, Studio

    studio = Studio(HeadModel(), 384, 0.62)
    heads = []
    for number in range(count):
        t = number / FPS
        angles = np.array(
            [14 * np.sin(1.7 * t + 1), 38 * np.sin(1.1 * t), 6 * np.sin(2.3 * t + 2)], np.float64
        )
        r = studio.shoot(seed, Ranges(nir=0.0), angles)
        heads.append(Head(r.image, Box(*r.box), r.matrix))
    return heads


class Camera:
    """Gives the frames of a video at a camera's pace, over and over."""

    def __init__(self, path: Path, fps: float = FPS) -> None:
        self._path, self._fps = path, fps
        self._video = cv2.VideoCapture(str(path))
        self._start: float | None = None
        self._count = 0

    def read(self) -> tuple[bool, object]:
        """The next frame, when it is due."""
        got, pixels = self._video.read()
        if not got:
            self._video = cv2.VideoCapture(str(self._path))
            got, pixels = self._video.read()
        now = time.monotonic()
        if self._start is None:
            self._start = now
        time.sleep(max(0.0, self._start + self._count / self._fps - now))
        self._count += 1
        return got, pixels

    def release(self) -> None:
        """Close the video."""
        self._video.release()
