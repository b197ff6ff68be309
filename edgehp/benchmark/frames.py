"""The frames a benchmark looks at: camera pictures of 1920x1080 pixels with a face in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgehp.artifact import Artifact, golden_crops
from edgehp.crop import Box, Preprocessing, crop_face
from edgehp.errors import DataError

__all__ = ["Frame", "Frames", "camera_frames", "photo_frames"]

Image = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 1920, 1080
# A driver's face, about 60 cm from a camera of 50 degrees, covers some 400 pixels of 1080.
FACE_SIDES = (320, 360, 400, 440, 480)
MOST_PHOTOS = 64


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture uint8 [H, W, 3], RGB, and the box of the face in it."""

    photo: Image
    box: Box | None


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames to go round.

    Attributes:
        source: where they come from, for people.
        items: at least one.
    """

    source: str
    items: tuple[Frame, ...]

    def crops(self, spec: Preprocessing) -> npt.NDArray[np.uint8]:
        """All of them cropped: uint8 [N, S, S, 3]."""
        return np.stack([crop_face(f.photo, f.box, spec) for f in self.items])


def camera_frames(artifact: Artifact) -> Frames:
    """The golden crops of an artifact, each put into a grey frame at another place and size.

    They travel with every artifact, so that a device needs no other file.
    """
    crops, spec = golden_crops(artifact), artifact.manifest.preprocessing
    frames = []
    # A gradient: real memory traffic without pretending to be a scene.
    ramp = np.linspace(40, 200, WIDTH).astype(np.uint8)
    for i, crop in enumerate(crops):
        photo = np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (HEIGHT, WIDTH, 3)))
        side = FACE_SIDES[i % len(FACE_SIDES)]
        x = (i * 211) % (WIDTH - side)
        y = (i * 97) % (HEIGHT - side)
        photo[y : y + side, x : x + side] = cv2.resize(crop, (side, side))
        whole = Box(x, y, x + side, y + side)
        frames.append(Frame(photo, whole.moved(0, 0, 1 / spec.box_scale)))
    return Frames(f"{len(frames)} golden crops in {WIDTH}x{HEIGHT} frames", tuple(frames))


def photo_frames(path: Path) -> Frames:
    """Photos of a folder or zip with their face boxes (`edgehp.datasets.faces`), the first 64.

    Raises:
        DataError: unreadable, or none.
    """
    from edgehp.datasets.faces import read_faces

    data = read_faces(path)
    samples = data.samples[:MOST_PHOTOS]
    if not samples:
        raise DataError(f"{path}: no photos to measure with")
    frames = tuple(Frame(s.load(), s.box) for s in samples)
    return Frames(f"{len(frames)} photos of {path.resolve().name}", frames)
