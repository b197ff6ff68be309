"""Run the face detector: at once, or in a thread beside the loop."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.errors import EdgehpError, EnvironmentalError
from edgehp.prediction.faces import DetectedFace, FaceDetector

__all__ = ["BackgroundDetection", "Detection", "Found", "InlineDetection", "Job"]

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Job:
    """A frame in which to look for faces: all of it, or a region."""

    photo: Image
    grey: Image
    region: Box | None


@dataclass(frozen=True, eq=False)
class Found:
    """The answer to a job; `error` where the detector failed."""

    job: Job
    faces: tuple[DetectedFace, ...]
    error: EdgehpError | None = None


class Detection(Protocol):
    """Runs a detector, at once or beside."""

    @property
    def busy(self) -> bool:
        """Whether a job is in work."""

    def request(self, job: Job) -> None:
        """Start a job; only while not busy."""

    def poll(self) -> Found | None:
        """The answer to the last job, once."""

    def close(self) -> None:
        """Stop."""


class InlineDetection:
    """Runs the detectors in the caller's thread: every frame waits, results do not depend on time.

    Two detectors, because a region needs fewer pixels than a whole frame, and OpenCV's network must
    keep one input shape.
    """

    def __init__(self, whole: FaceDetector, region: FaceDetector) -> None:
        self._whole, self._region = whole, region
        self._found: Found | None = None

    @property
    def busy(self) -> bool:
        """Never."""
        return False

    def request(self, job: Job) -> None:
        """Do the job now."""
        try:
            faces = self._look(job)
        except EdgehpError as e:
            self._found = Found(job, (), e)
        except cv2.error as e:
            self._found = Found(job, (), EnvironmentalError(f"the face detector failed: {e.err}"))
        else:
            self._found = Found(job, tuple(faces))

    def poll(self) -> Found | None:
        """The answer, once."""
        found, self._found = self._found, None
        return found

    def close(self) -> None:
        """Nothing runs."""

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


class BackgroundDetection:
    """Runs an `InlineDetection` in a thread of its own, one job at a time."""

    def __init__(self, inline: InlineDetection) -> None:
        self._inline = inline
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._found: Found | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="detection", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job is in work or its answer not yet taken."""
        with self._changed:
            return self._job is not None or self._found is not None

    def request(self, job: Job) -> None:
        """Start the job."""
        with self._changed:
            self._job = job
            self._changed.notify_all()

    def poll(self) -> Found | None:
        """The answer, once it is there.

        Raises:
            EnvironmentalError: the thread died; without this, there would be no face for ever.
        """
        if not self._thread.is_alive():
            raise EnvironmentalError("the face detector's thread died; start the process again")
        with self._changed:
            found, self._found = self._found, None
            return found

    def close(self) -> None:
        """Stop after the job in work."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(2.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._job is None and not self._closed:
                    self._changed.wait()
                if self._closed or self._job is None:
                    return
                job = self._job
            self._inline.request(job)
            found = self._inline.poll()
            with self._changed:
                self._job, self._found = None, found
