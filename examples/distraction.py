"""An example on top of `edgehp run`: how long the driver looks away. Not a certified function.

    edgehp run camera:0 --artifact ARTIFACT | python examples/distraction.py --speed 60

Reads the runtime's JSON lines from stdin, or from its socket (--socket PATH), and writes a line
where a distraction begins or ends:

    {"type": "event", "event": "distraction_start", "captured": ..., "captured_ns": ...,
     "seconds": 3.53, "area": "down", "speed_kmh": 60.0, "reason": null}

The default times are those of Commission Delegated Regulation (EU) 2023/2590 on advanced driver
distraction warning (3.5 s at 50 km/h and more, 6 s from 20 to 50 km/h, for gazes into the
regulation's area 3, which lies low). The regulation speaks of gaze; this looks at the head alone,
which turns by only a part of the gaze and may not turn at all. The default area, 20 degrees down,
is therefore the project's own choice, and has been validated with nobody.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.pose import euler_from_matrix, matrix_from_euler

ROAD = "road"
# A speed is a short number; a faster car is a wrong unit or a broken sender.
_MOST_BYTES, _FASTEST = 64, 500.0


@dataclass(frozen=True)
class Area:
    """Directions of the head that count as looking away, degrees relative to straight ahead.

    Attributes:
        name: of the area.
        pitch: least and largest pitch (+ is up).
        yaw: least and largest yaw (+ is to the image's left).
    """

    name: str
    pitch: tuple[float, float] = (-180.0, 180.0)
    yaw: tuple[float, float] = (-180.0, 180.0)

    def holds(self, pitch: float, yaw: float) -> bool:
        """Whether the direction lies in the area."""
        return self.pitch[0] <= pitch <= self.pitch[1] and self.yaw[0] <= yaw <= self.yaw[1]


@dataclass(frozen=True)
class Rules:
    """When looking away is a distraction.

    Attributes:
        areas: the first that holds the direction counts; everything else is the road.
        times: (km/h, seconds): from this speed on, looking away for so long is a distraction.
        straight_ahead: (pitch, yaw, roll) degrees of a driver who looks at the road, as this camera
            sees it.
        back: seconds on the road that end looking away; a shorter glance does not.
        hold: seconds that the last area is assumed to last while no pose is known; a head that
            turns far is often lost.
    """

    areas: tuple[Area, ...] = (Area("down", pitch=(-180.0, -20.0)),)
    times: tuple[tuple[float, float], ...] = ((20.0, 6.0), (50.0, 3.5))
    straight_ahead: tuple[float, float, float] = (0.0, 0.0, 0.0)
    back: float = 0.2
    hold: float = 1.0

    def allowed(self, speed_kmh: float | None) -> float | None:
        """Seconds of looking away allowed; None: any (too slow, or the speed is not known)."""
        reached = [t for t in self.times if speed_kmh is not None and speed_kmh >= t[0]]
        return max(reached)[1] if reached else None


class Monitor:
    """Follows the directions of one head through the runtime's records."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._ahead = matrix_from_euler(rules.straight_ahead)
        self._area: str | None = None
        self._known_at = 0.0
        self._since: float | None = None
        self._away_to = ""
        self._road_at: float | None = None
        self._warned = False

    def area_of(self, rotation: npt.ArrayLike) -> str:
        """The area that a head rotation [3, 3] points into, or ``"road"``."""
        pitch, yaw, _ = euler_from_matrix(self._ahead.T @ np.asarray(rotation, np.float64))
        return next((a.name for a in self.rules.areas if a.holds(pitch, yaw)), ROAD)

    def update(
        self, seconds: float, angles: npt.ArrayLike | None, speed_kmh: float | None
    ) -> dict[str, Any] | None:
        """Take the next moment into account.

        Args:
            seconds: its time.
            angles: pitch, yaw, roll of the head, degrees; None where they are not known.
            speed_kmh: of the car; None where it is not known: no distraction begins.

        Returns:
            What begins or ends now, if anything.
        """
        if angles is not None:
            self._area, self._known_at = self.area_of(matrix_from_euler(angles)), seconds
        elif self._area is not None and seconds - self._known_at > self.rules.hold:
            self._area = None
        if self._area is None:
            return self._end(seconds, speed_kmh, "the head pose is unknown")
        if self._area == ROAD:
            self._road_at = seconds if self._road_at is None else self._road_at
            if seconds - self._road_at >= self.rules.back:
                return self._end(seconds, speed_kmh, "back on the road")
            return None
        self._road_at, self._away_to = None, self._area
        self._since = seconds if self._since is None else self._since
        allowed, away = self.rules.allowed(speed_kmh), seconds - self._since
        if self._warned or allowed is None or away < allowed:
            return None
        self._warned = True
        return self._event("distraction_start", away, speed_kmh, None)

    def _end(self, seconds: float, speed: float | None, reason: str) -> dict[str, Any] | None:
        warned, since = self._warned, self._since
        self._warned, self._since, self._road_at = False, None, None
        if not warned or since is None:
            return None
        return self._event("distraction_end", seconds - since, speed, reason)

    def _event(
        self, event: str, seconds: float, speed: float | None, reason: str | None
    ) -> dict[str, Any]:
        away = round(seconds, 3)
        return {"type": "event", "event": event, "seconds": away, "area": self._away_to,
                "speed_kmh": speed, "reason": reason}  # fmt: skip


def events(lines: Iterable[bytes], monitor: Monitor, speed: Speed) -> Iterator[dict[str, Any]]:
    """The events in the runtime's lines.

    Frames count at the time of their capture (of a film: in the film), so that an event is late by
    at most one frame. Poses with `low_confidence` are not known: their `filtered` is null.
    """
    for line in lines:
        record = json.loads(line)
        if record["type"] == "frame":
            seconds, filtered = record["seconds"], record["filtered"]
            when = {"captured": record["captured"], "captured_ns": record["captured_ns"]}
        elif record["type"] == "status":
            seconds, filtered = record["result_ns"] / 1e9, None
            when = {"captured": record["time"], "captured_ns": record["result_ns"]}
        else:
            continue
        usable = record["state"] in ("ok", "out_of_range", "stale_frame") and filtered is not None
        found = monitor.update(seconds, list(filtered.values()) if usable else None, speed.read())
        if found is not None:
            yield {**found, **when}


class Speed:
    """The car's speed: a fixed number, or a small file with one that somebody replaces."""

    def __init__(self, text: str | None, max_age: float = 2.0) -> None:
        """Take a number of km/h, ``file:PATH``, or None: not known."""
        self._path = Path(text[5:]) if text is not None and text.startswith("file:") else None
        self._fixed = None if text is None or self._path is not None else _number(text)
        self._max_age = max_age
        if text is not None and self._path is None and self._fixed is None:
            raise ValueError(f"found {text!r}, expected km/h from 0 to {_FASTEST:g} or file:PATH")

    def read(self) -> float | None:
        """Kilometers per hour; None where it is not known, or known too long ago."""
        if self._path is None:
            return self._fixed
        try:
            with open(self._path, "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                raw = file.read(_MOST_BYTES) if stat.S_ISREG(status.st_mode) else b""
        except OSError:
            return None
        # Either way: where the clock was set back, an old number would look fresh for long.
        fresh = abs(time.time() - status.st_mtime) <= self._max_age
        return _number(raw.decode("ascii", "replace")) if fresh else None


def _without_waiting(path: str, flags: int) -> int:
    """Open at once: a named pipe without a writer must not hold the events up."""
    return os.open(path, flags | os.O_NONBLOCK)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= _FASTEST else None


def main(argv: list[str] | None = None) -> int:
    """Read lines and write events until the lines end; the exit code."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--socket", type=Path, help="of 'edgehp run --socket', instead of stdin")
    p.add_argument("--speed", type=Speed, default=Speed(None), help="km/h, or file:PATH")
    p.add_argument(
        "--straight-ahead", nargs=3, type=float, default=(0.0, 0.0, 0.0), metavar="DEGREES",
        help="pitch, yaw and roll of a driver who looks at the road",
    )  # fmt: skip
    args = p.parse_args(argv)
    monitor = Monitor(Rules(straight_ahead=tuple(args.straight_ahead)))
    if args.socket is None:
        lines: Iterable[bytes] = sys.stdin.buffer
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(args.socket))
        lines = connection.makefile("rb")
    for event in events(lines, monitor, args.speed):
        print(json.dumps(event), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
