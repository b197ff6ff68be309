"""The lines: their states and fields, in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from edgehp.crop import Box
from edgehp.runtime.capture import CapturedFrame
from edgehp.runtime.distraction import DistractionEvent

__all__ = ["STATES", "Pose", "end_line", "event_line", "frame_line", "line", "status_line", "utc"]

# What a reader may do with each is in docs/runtime.md.
STATES = (
    "ok",
    "searching",
    "no_face",
    "low_confidence",
    "out_of_range",
    "stale_frame",
    "stuck_camera",
    "camera_lost",
    "engine_fault",
)
_NAMES = ("pitch", "yaw", "roll")


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
        area: where the head points, of the distraction example.
    """

    box: Box | None = None
    detected: bool = False
    raw: tuple[float, ...] | None = None
    filtered: tuple[float, ...] | None = None
    spread: tuple[float, ...] | None = None
    confidence: float | None = None
    area: str | None = None


def line(values: Mapping[str, Any]) -> bytes:
    """One JSON line."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def utc(nanoseconds: int) -> str:
    """ISO 8601 with microseconds, UTC."""
    whole = datetime.fromtimestamp(nanoseconds // 1_000_000_000, timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanoseconds % 1_000_000_000 // 1000:06d}Z"


def frame_line(
    frame: CapturedFrame,
    result_ns: int,
    state: str,
    reason: str | None,
    pose: Pose,
    speed_kmh: float | None,
    dropped: int,
) -> dict[str, Any]:
    """The record of one frame.

    Args:
        frame: as it was captured.
        result_ns: now, `time.monotonic_ns`.
        state: one of `STATES`.
        reason: for people, where the state is not ok.
        pose: of the head.
        speed_kmh: of the car.
        dropped: frames dropped since the start.
    """
    box = pose.box
    return {
        "type": "frame",
        "frame": frame.number,
        "captured": utc(frame.utc_ns),
        "captured_ns": frame.monotonic_ns,
        "result_ns": result_ns,
        "latency_ms": round((result_ns - frame.monotonic_ns) / 1e6, 3),
        "dropped": dropped,
        "state": state,
        "reason": reason,
        "box": None
        if box is None
        else [round(v, 1) for v in (box.x_min, box.y_min, box.x_max, box.y_max)],
        "detected": pose.detected,
        "raw": _named(pose.raw),
        "filtered": _named(pose.filtered),
        "spread": _named(pose.spread),
        "confidence": None if pose.confidence is None else round(pose.confidence, 4),
        "speed_kmh": speed_kmh,
        "area": pose.area,
    }


def status_line(state: str, reason: str, since_ns: int, now_ns: int, utc_ns: int) -> dict[str, Any]:
    """The record of a moment without a frame: a state that began, or still lasts."""
    return {
        "type": "status",
        "time": utc(utc_ns),
        "result_ns": now_ns,
        "state": state,
        "reason": reason,
        "seconds": round((now_ns - since_ns) / 1e9, 3),
    }


def event_line(event: DistractionEvent, captured: str, captured_ns: int) -> dict[str, Any]:
    """The record of an event of the distraction example."""
    return {
        "type": "event",
        "event": event.event,
        "captured": captured,
        "captured_ns": captured_ns,
        "seconds": round(event.seconds, 3),
        "area": event.area,
        "speed_kmh": event.speed_kmh,
        "reason": event.reason,
    }


def end_line(reason: str, totals: Mapping[str, int], utc_ns: int) -> dict[str, Any]:
    """The last record."""
    return {"type": "end", "time": utc(utc_ns), "reason": reason, **totals}


def _named(values: tuple[float, ...] | None) -> dict[str, float | None] | None:
    if values is None:
        return None
    return {
        n: round(float(v), 2) if np.isfinite(v) else None
        for n, v in zip(_NAMES, values, strict=True)
    }
