"""Where the face is: found by a detector now and then, carried along in between.

Between detections the box follows the optical flow of points inside it, of which those that do not
find their way back are dropped and the median of the rest is believed (Median Flow: Kalal,
Mikolajczyk, Matas, "Forward-Backward Error: Automatic Detection of Tracking Failures", ICPR 2010).
A head that turns carries its surface across the box, so the box drifts; the detector corrects it
every few frames, looking only around the box, which costs a tenth of looking at everything.

Detection runs beside the loop (`edgehp.runtime.detection`): the frames that come meanwhile are
tracked, and a box found in an older frame is carried to the newest one in a single step of flow. So
a slow detector costs no frames; it only corrects later.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.runtime.detection import Detection, Job, network_box, overlap

Image = npt.NDArray[np.uint8]

# Width in pixels of the grey picture that flow is computed on.
_FLOW_WIDTH = 480
# Points a side of the grid, over the middle of the box: its edges show background.
_GRID, _MIDDLE = 9, 0.7
# Points that come back further than this from where they started, in flow pixels, are not believed,
# and a box with fewer believed points than this share is lost.
_COMES_BACK, _SHARE = 1.0, 0.35
# Room around a box in which it is looked for again, in box sides.
_ROOM = 2.2
# A detected box that overlaps the tracked one this much is the same face: half-way, not a jump.
_SAME = 0.5


@dataclass(frozen=True)
class TrackedFace:
    """A face in the present frame.

    Attributes:
        box: as the networks know it, pixels of the frame.
        detected: whether a detector's answer for the face came with this very frame.
    """

    box: Box
    detected: bool


class Tracker:
    """Says where the face is in each frame; this one knows no face, and has none to lose."""

    @property
    def looked(self) -> bool:
        """Whether anything has looked for a face since the start or the last `reset`."""
        return True

    def update(self, photo: Image) -> TrackedFace | None:
        """The face in the next frame (uint8 [H, W, 3], RGB); None where there is none."""

    def doubt(self) -> None:
        """The network was not sure about the last face: look again soon."""

    def lose(self) -> None:
        """Forget the face: it cannot be used where it is."""

    def reset(self) -> None:
        """Forget the face and that anything has looked for one: frames were lost."""

    def close(self) -> None:
        """Stop."""


class FixedBox(Tracker):
    """The face is where the user says."""

    def __init__(self, box: Box) -> None:
        self._face = TrackedFace(box, False)

    def update(self, photo: Image) -> TrackedFace | None:
        """The box, whatever the frame shows."""
        return self._face


class FaceTracker(Tracker):
    """Detects, carries along, detects again."""

    def __init__(self, detection: Detection, every: int = 15, patience: int = 2) -> None:
        """No face yet.

        Args:
            detection: runs the detector.
            every: look again after this many frames.
            patience: detections in a row that may miss a tracked face before it is given up.
        """
        self._detection, self._every, self._patience = detection, every, patience
        self._asked = 0  # number of the last job
        self.reset()

    @property
    def looked(self) -> bool:
        """Whether the detector has answered since the start or the last `reset`."""
        return self._looked

    def reset(self) -> None:
        """Forget the face, and what the detector has said before."""
        self.lose()
        self._looked = False

    def lose(self) -> None:
        """Forget the face; the answer to a running detection is not used."""
        self._box: Box | None = None  # the detector's own, pixels of the frame
        self._grey: Image | None = None
        self._since = self._misses = 0
        self._doubt = False
        self._forgotten = self._asked

    def doubt(self) -> None:
        """Look again at the next frame that the detector is free for."""
        self._doubt = True

    def close(self) -> None:
        """Stop the detector."""
        self._detection.close()

    def update(self, photo: Image) -> TrackedFace | None:
        """The face in `photo` (uint8 [H, W, 3], RGB).

        Raises:
            EdgehpError: the detector failed.
        """
        scale = min(1.0, _FLOW_WIDTH / photo.shape[1])
        grey = _grey(photo, scale)
        if self._grey is not None and self._grey.shape != grey.shape:
            self.reset()
        if self._box is not None and self._grey is not None:
            self._box = carry(self._box, self._grey, grey, scale)
        self._grey = grey
        self._since += 1
        if not self._detection.busy and (
            self._box is None or self._doubt or self._since >= self._every
        ):
            region = None if self._box is None else self._box.moved(0, 0, _ROOM)
            self._asked += 1
            self._since, self._doubt = 0, False
            self._detection.request(Job(photo, grey, region, self._asked))
        fresh = self._take(grey, scale)
        if self._box is None:
            return None
        return TrackedFace(network_box(self._box), fresh)

    def _take(self, grey: Image, scale: float) -> bool:
        """Use the detector's answer if there is one; whether it found the face."""
        found = self._detection.poll()
        if found is None or found.number == self._forgotten:
            return False
        if found.error is not None:
            raise found.error
        self._looked = True

        def worth(box: Box) -> float:
            """The driver is nearest to the middle of a region, else the largest."""
            return box.width * box.height if found.region is None else overlap(box, found.region)

        box = max((face.box for face in found.faces), key=worth, default=None)
        if box is not None and found.grey is not grey:
            box = carry(box, found.grey, grey, scale)
        if box is None:
            self._misses += 1
            # A miss in the whole frame is one of no face there was; around a box, patience.
            if found.region is not None and self._misses >= self._patience:
                self._box = None
            self._doubt = self._box is not None
            return False
        if self._box is not None and overlap(self._box, box) > _SAME:
            box = _between(self._box, box)
        self._box, self._misses = box, 0
        return True


def carry(box: Box, before: Image, after: Image, scale: float) -> Box | None:
    """The box moved and scaled as the picture inside it went; None where that cannot be said.

    Args:
        box: pixels of the frame.
        before: grey picture that the box belongs to, uint8 [h, w].
        after: the grey picture it is wanted in, of the same size.
        scale: pixels of the grey pictures for one pixel of the frame.
    """
    cx, cy = (box.x_min + box.x_max) / 2 * scale, (box.y_min + box.y_max) / 2 * scale
    half = np.array([box.width, box.height]) * scale / 2 * _MIDDLE
    line = np.linspace(-1, 1, _GRID)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) * half + (cx, cy)
    height, width = before.shape
    inside = (grid >= 1).all(1) & (grid[:, 0] < width - 1) & (grid[:, 1] < height - 1)
    start = grid[inside].astype(np.float32)
    if len(start) < 8:
        return None
    there, found = _flow(before, after, start)
    back, found_back = _flow(after, before, there)
    kept = found & found_back & (np.linalg.norm(back - start, axis=1) < _COMES_BACK)
    if kept.sum() < max(8, _SHARE * len(start)):
        return None
    p, q = start[kept].astype(np.float64), there[kept].astype(np.float64)
    move = np.median(q - p, axis=0)
    first, second = np.triu_indices(len(p), 1)
    # Pairs of near points say nothing about scale but noise.
    far = np.linalg.norm(p[first] - p[second], axis=1)
    pairs = far > float(half.min()) / 2
    ratio = np.linalg.norm(q[first] - q[second], axis=1)[pairs] / far[pairs]
    grown = float(np.clip(np.median(ratio), 0.8, 1.25)) if ratio.size else 1.0
    dx, dy = float(move[0]) / scale, float(move[1]) / scale
    moved = Box(box.x_min + dx, box.y_min + dy, box.x_max + dx, box.y_max + dy).moved(0, 0, grown)
    middle = ((moved.x_min + moved.x_max) / 2 * scale, (moved.y_min + moved.y_max) / 2 * scale)
    if not (0 <= middle[0] < width and 0 <= middle[1] < height):
        return None
    return moved if min(moved.width, moved.height) * scale >= 6 else None


def _flow(
    before: Image, after: Image, points: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Where points [n, 2] went (Lucas and Kanade over a pyramid), and whether that was found."""
    guess = np.zeros((len(points), 1, 2), np.float32)
    there, found, _ = cv2.calcOpticalFlowPyrLK(
        before, after, np.ascontiguousarray(points[:, None]), guess, winSize=(15, 15), maxLevel=3
    )
    return np.asarray(there, np.float32)[:, 0], np.asarray(found).ravel() == 1


def _grey(photo: Image, scale: float) -> Image:
    size = max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale))
    small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA) if scale < 1 else photo
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), np.uint8)


def _between(a: Box, b: Box) -> Box:
    return Box(
        (a.x_min + b.x_min) / 2,
        (a.y_min + b.y_min) / 2,
        (a.x_max + b.x_max) / 2,
        (a.y_max + b.y_max) / 2,
    )
