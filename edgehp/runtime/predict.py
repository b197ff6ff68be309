"""From the frames of a photo, folder, film or camera to head poses: what `edgehp predict` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgehp.crop import Box, Image, Picture, Preprocessing, cut_of
from edgehp.engines.base import Engine, Prediction, infer_frames
from edgehp.errors import DataError
from edgehp.runtime.detection import DetectedFace, FaceDetector, network_box
from edgehp.runtime.records import (
    PoseState,
    StateRules,
    classify_pose,
    corners,
    named_angles,
    rounded,
)
from edgehp.runtime.sources import Frame

Triple = tuple[float, float, float]
# Gives the faces of a photo, by its name and its pixels: the boxes the network needs, and the
# detector's where they come from one. A `DataError` says that it cannot be told, not "no face".
FaceFinder = Callable[[str, Image], list[tuple[Box, DetectedFace | None]]]


@dataclass(frozen=True)
class FacePose:
    """One face of a frame.

    Attributes:
        box: what the network saw, pixels of the photo.
        detected: the detector's own box and score; None for a box from a list.
        angles: pitch, yaw, roll, degrees.
        spread: standard deviation of each in degrees; None of a network without bins.
        result: state, confidence, flag.
    """

    box: Box
    detected: DetectedFace | None
    angles: Triple
    spread: Triple | None
    result: PoseState


@dataclass(frozen=True)
class FrameResult:
    """One frame with its faces, none, or a problem."""

    frame: Frame
    faces: tuple[FacePose, ...] = ()
    problem: str | None = None

    @property
    def states(self) -> tuple[str, ...]:
        """One state a face; ``no_face`` or ``unreadable`` where there is none."""
        if self.problem is not None:
            return ("unreadable",)
        return tuple(f.result.state for f in self.faces) or ("no_face",)

    def records(self) -> list[dict[str, Any]]:
        """One JSON object a face; exactly one where there is none, with its state."""
        where = {
            "source": self.frame.source,
            "file": self.frame.name,
            "frame": self.frame.index,
            "seconds": self.frame.seconds,
        }
        if not self.faces:
            empty = dict.fromkeys(
                ("face", "box", "detector", "angles", "spread", "confidence", "out_of_range")
            )
            return [{**where, "state": self.states[0], **empty, "problem": self.problem}]
        return [
            {
                **where,
                "state": face.result.state,
                "face": i,
                "box": corners(face.box),
                "detector": None
                if face.detected is None
                else {
                    "box": corners(face.detected.box),
                    "score": round(face.detected.score, 4),
                },
                "angles": named_angles(face.angles),
                "spread": named_angles(face.spread),
                "confidence": rounded(face.result.confidence),
                "out_of_range": face.result.out_of_range,
                "problem": None,
            }
            for i, face in enumerate(self.faces)
        ]


def detected(detector: FaceDetector) -> FaceFinder:
    """The faces of a detector, the best first, with its boxes as those the network knows."""
    return lambda _, photo: [(network_box(f.box), f) for f in detector.detect(photo)]


def predict(
    frames: Iterable[Frame],
    engine: Engine,
    preprocessing: Preprocessing,
    faces: FaceFinder,
    rules: StateRules,
) -> Iterator[FrameResult]:
    """Predict the head poses of every frame.

    A frame whose photo or boxes cannot be used gives a result with a problem, never an exception:
    the next frame is worth as much as this one.

    Args:
        frames: what to look at.
        engine: opened.
        preprocessing: of the engine's network.
        faces: where the faces are.
        rules: of the states.

    Raises:
        EnvironmentalError: the engine failed.
    """
    for frame in frames:
        if frame.photo is None:
            yield FrameResult(frame, problem=frame.problem or "no picture")
            continue
        try:
            found = faces(frame.name, frame.photo)
            height, width = frame.photo.shape[:2]
            for box, _ in found:
                cut_of(width, height, box, preprocessing)
        except DataError as e:
            yield FrameResult(frame, problem=str(e))
            continue
        poses: tuple[FacePose, ...] = ()
        if found:
            picture = Picture(frame.photo)
            answer = infer_frames(engine, [(picture, box) for box, _ in found], preprocessing)
            poses = tuple(_poses(found, answer, rules))
        yield FrameResult(frame, poses)


def _poses(
    found: Sequence[tuple[Box, DetectedFace | None]], prediction: Prediction, rules: StateRules
) -> Iterator[FacePose]:
    spreads = [None] * len(found) if prediction.spread is None else prediction.spread
    for (box, detected), angles, spread in zip(found, prediction.angles, spreads, strict=True):
        result = classify_pose(angles, spread, rules)
        wide = None if spread is None else _triple(spread)
        yield FacePose(box, detected, _triple(angles), wide, result)


def _triple(values: Any) -> Triple:
    return float(values[0]), float(values[1]), float(values[2])
