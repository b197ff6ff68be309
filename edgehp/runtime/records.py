"""The records: the state of a pose, and the JSON lines of `edgehp run` and `edgehp predict`.

The heads of the network give a distribution over angle bins; ``spread`` is its standard deviation,
the network's own doubt. From it follow:

* ``confidence`` is 1 / (1 + (s / 10)^2) with s the root mean square of the three spreads in
  degrees: 1 for a sharp peak, 0.5 at 10 degrees. A monotone scale, not a probability.
* ``low_confidence``: the confidence is below a limit (0.5, so s above 10 degrees).
* ``out_of_range``: an angle plus or minus two of its spreads reaches past the outermost bin. The
  distribution is then cut off at the end of the bins, and its mean is pulled inwards by an unknown
  amount; the head may be turned further than the angle says.

A network of others without bins says nothing of the kind: spread and confidence are null, and its
poses are ok wherever they are numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

from edgehp.crop import Box
from edgehp.runtime.capture import CapturedFrame

# What a reader may do with each is in docs/runtime.md.
STATES = (
    "ok",
    "searching",
    "no_face",
    "low_confidence",
    "out_of_range",
    "stale_frame",
    "stuck_camera",
    "unreadable",
    "camera_lost",
    "detector_fault",
    "engine_fault",
)
ANGLE_NAMES = ("pitch", "yaw", "roll")
# The filter of the training data, for networks whose bins are not known.
DEFAULT_BINS = (-99.0, 99.0)
# Degrees of spread at which the confidence is one half.
_HALF_AT = 10.0
# How many spreads of room an angle needs to the outermost bin.
_REACH = 2.0


@dataclass(frozen=True)
class StateRules:
    """Limits of the states.

    Attributes:
        bins: first and last bin value in degrees.
        min_confidence: less is ``low_confidence``.
    """

    bins: tuple[float, float] = DEFAULT_BINS
    min_confidence: float = 0.5


@dataclass(frozen=True)
class PoseState:
    """State, confidence (0..1; None where the network gives no spread) and flag of one pose."""

    state: str
    confidence: float | None
    out_of_range: bool


def classify_pose(
    angles: npt.NDArray[np.floating], spread: npt.NDArray[np.floating] | None, rules: StateRules
) -> PoseState:
    """The state of one pose.

    Low confidence comes before range in `PoseState.state`, as a wide distribution reaches the ends
    of the bins from anywhere; the flag tells both.

    Args:
        angles: [3] degrees, pitch, yaw, roll.
        spread: [3] degrees; None of a network without bins.
        rules: the limits.
    """
    a = np.asarray(angles, np.float64)
    if spread is None:
        known = bool(np.isfinite(a).all())
        return PoseState("ok" if known else "low_confidence", None, not known)
    s = np.asarray(spread, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(s).all()):
        return PoseState("low_confidence", 0.0, True)
    rms = math.sqrt(float((s**2).mean()))
    confidence = 1 / (1 + (rms / _HALF_AT) ** 2)
    first, last = rules.bins
    out = bool((a - _REACH * s < first).any() or (a + _REACH * s > last).any())
    if confidence < rules.min_confidence:
        state = "low_confidence"
    else:
        state = "out_of_range" if out else "ok"
    return PoseState(state, confidence, out)


@dataclass(frozen=True)
class Pose:
    """What is known about the head in one frame; None where there is nothing to know.

    Attributes:
        box: what the network saw, pixels of the frame.
        detected: the box comes from a detection in this frame, else it was tracked or given.
        raw: pitch, yaw, roll, degrees, of the network.
        filtered: the same after the filter.
        spread: standard deviations, degrees.
        confidence: 0..1.
    """

    box: Box | None = None
    detected: bool = False
    raw: tuple[float, ...] | None = None
    filtered: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None
    confidence: float | None = None


_State = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(STATES)})]
_Angles = dict[str, float | None]


class FrameRecord(TypedDict):
    """What was seen in one frame.

    Attributes:
        type: of the line.
        frame: number of the frame that was read, from 1; those dropped leave gaps.
        captured: when it was captured, UTC.
        captured_ns: the same on the monotonic clock, nanoseconds.
        seconds: the time that filter and timers go by; of a video, that in the film.
        result_ns: when the line was made, monotonic clock, nanoseconds.
        latency_ms: from capture to the line.
        dropped: frames dropped since the start.
        state: whether there is a pose to use, or why not.
        reason: the same for people; null where the state is ok.
        box: x_min, y_min, x_max, y_max of what the network saw, pixels of the frame.
        detected: the box comes from a detection in this frame, else it was tracked or given.
        raw: pitch, yaw, roll of the network, degrees.
        filtered: the same after the filter; null where the network was not sure.
        spread: standard deviations of the three, degrees.
        confidence: 0 to 1.
    """

    type: Literal["frame"]
    frame: int
    captured: str
    captured_ns: int
    seconds: float
    result_ns: int
    latency_ms: float
    dropped: int
    state: _State
    reason: str | None
    box: list[float] | None
    detected: bool
    raw: _Angles | None
    filtered: _Angles | None
    spread: _Angles | None
    confidence: float | None


class StatusRecord(TypedDict):
    """A moment without a frame: a state that began, or still lasts.

    Attributes:
        type: of the line.
        time: UTC.
        result_ns: when the line was made, monotonic clock, nanoseconds.
        state: of the camera or the engine.
        reason: the same for people.
        seconds: how long it has lasted.
    """

    type: Literal["status"]
    time: str
    result_ns: int
    state: _State
    reason: str
    seconds: float


class EndRecord(TypedDict):
    """The last line; totals of the run (frames, drops, faults) follow as further integers.

    Attributes:
        type: of the line.
        time: UTC.
        reason: why the run ended.
    """

    type: Literal["end"]
    time: str
    reason: str


def json_line(values: Mapping[str, Any]) -> bytes:
    """One record as a JSON line with its newline."""
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def utc(nanoseconds: int) -> str:
    """ISO 8601 with microseconds, UTC."""
    whole = datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 1_000_000_000 // 1000:06d}Z"


def named_angles(values: Iterable[float] | None) -> dict[str, float | None] | None:
    """Hundredths of a degree: more is noise; null where the engine gave no number."""
    if values is None:
        return None
    return {
        name: round(float(v), 2) if math.isfinite(v) else None
        for name, v in zip(ANGLE_NAMES, values, strict=True)
    }


def rounded(confidence: float | None) -> float | None:
    """A confidence with four digits; null where there is none."""
    return None if confidence is None else round(confidence, 4)


def corners(box: Box | None) -> list[float] | None:
    """A box as [x_min, y_min, x_max, y_max], in tenths of a pixel."""
    if box is None:
        return None
    return [round(v, 1) for v in (box.x_min, box.y_min, box.x_max, box.y_max)]


def frame_record(
    frame: CapturedFrame,
    result_ns: int,
    state: str,
    reason: str | None,
    pose: Pose,
    dropped: int,
) -> FrameRecord:
    """The record of one frame of `edgehp run`.

    Args:
        frame: as it was captured.
        result_ns: now, `time.monotonic_ns`.
        state: one of `STATES`.
        reason: for people, where the state is not ok.
        pose: of the head.
        dropped: frames dropped since the start.
    """
    return {
        "type": "frame",
        "frame": frame.number,
        "captured": utc(frame.utc_ns),
        "captured_ns": frame.monotonic_ns,
        "seconds": round(frame.seconds, 6),
        "result_ns": result_ns,
        "latency_ms": round((result_ns - frame.monotonic_ns) / 1e6, 3),
        "dropped": dropped,
        "state": state,
        "reason": reason,
        "box": corners(pose.box),
        "detected": pose.detected,
        "raw": named_angles(pose.raw),
        "filtered": named_angles(pose.filtered),
        "spread": named_angles(pose.spread),
        "confidence": rounded(pose.confidence),
    }


def status_record(state: str, reason: str, since_ns: int, now_ns: int, utc_ns: int) -> StatusRecord:
    """The record of a moment without a frame: a state that began, or still lasts."""
    return {
        "type": "status",
        "time": utc(utc_ns),
        "result_ns": now_ns,
        "state": state,
        "reason": reason,
        "seconds": round((now_ns - since_ns) / 1e9, 3),
    }


def end_record(reason: str, totals: Mapping[str, int], utc_ns: int) -> dict[str, Any]:
    """The last record."""
    return {"type": "end", "time": utc(utc_ns), "reason": reason, **totals}
