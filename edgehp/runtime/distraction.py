"""An example of a function on top of the head pose: how long the driver looks away.

This is an example and not a certified function. Its default times are those of Commission Delegated
Regulation (EU) 2023/2590 on advanced driver distraction warning (3.5 s at 50 km/h and more, 6 s
from 20 to 50 km/h, for gazes into the regulation's area 3, which lies low). The regulation speaks
of gaze; this looks at the head alone, which turns by only a part of the gaze and may not turn at
all. The default area is therefore the project's own choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.pose import euler_from_matrix, matrix_from_euler

__all__ = [
    "DOWN",
    "Area",
    "DistractionEvent",
    "DistractionMonitor",
    "DistractionRules",
    "SpeedTime",
]

ROAD = "road"


@dataclass(frozen=True)
class Area:
    """Directions of the head that count as looking away.

    Attributes:
        name: of the area.
        pitch: least and largest pitch relative to straight ahead, degrees (+ is up).
        yaw: least and largest yaw relative to straight ahead, degrees (+ is to the image's left).
    """

    name: str
    pitch: tuple[float, float] = (-180.0, 180.0)
    yaw: tuple[float, float] = (-180.0, 180.0)

    def __post_init__(self) -> None:
        """Refuse an area that holds nothing."""
        if self.name == ROAD or not self.name:
            raise UsageError(f"area name {self.name!r}: give one that is not empty and not {ROAD}")
        if not (self.pitch[0] < self.pitch[1] and self.yaw[0] < self.yaw[1]):
            raise UsageError(f"area {self.name}: expected pitch and yaw as [least, largest]")

    def holds(self, pitch: float, yaw: float) -> bool:
        """Whether the direction lies in the area."""
        return self.pitch[0] <= pitch <= self.pitch[1] and self.yaw[0] <= yaw <= self.yaw[1]


@dataclass(frozen=True)
class SpeedTime:
    """From `speed_kmh` on, looking away for `seconds` is a distraction."""

    speed_kmh: float
    seconds: float


# A head 20 degrees down, in the default example, for a gaze that is further down.
DOWN = Area("down", (-180.0, -20.0))


@dataclass(frozen=True)
class DistractionRules:
    """When looking away is a distraction.

    Attributes:
        areas: the first that holds the direction counts; the rest of the world is the road.
        times: by speed.
        straight_ahead: (pitch, yaw, roll) degrees of a driver who looks at the road, as this
            camera sees it.
        back: seconds on the road that end looking away; a glance shorter does not.
        hold: seconds that the last area is assumed to last while no pose is known; a head that
            turns far is often lost.
    """

    areas: tuple[Area, ...] = (DOWN,)
    times: tuple[SpeedTime, ...] = (SpeedTime(20.0, 6.0), SpeedTime(50.0, 3.5))
    straight_ahead: tuple[float, float, float] = (0.0, 0.0, 0.0)
    back: float = 0.2
    hold: float = 1.0

    def allowed(self, speed_kmh: float | None) -> float | None:
        """Seconds of looking away allowed at this speed; None: any (too slow, speed unknown)."""
        if speed_kmh is None:
            return None
        # Thresholds reached; the fastest decides.
        reached = [t for t in self.times if speed_kmh >= t.speed_kmh]
        return max(reached, key=lambda t: t.speed_kmh).seconds if reached else None


@dataclass(frozen=True)
class DistractionEvent:
    """A distraction begins or ends.

    Attributes:
        event: ``"distraction_start"`` or ``"distraction_end"``.
        seconds: how long the driver has looked away.
        area: where to, last.
        speed_kmh: at this moment.
        reason: why it ended.
    """

    event: str
    seconds: float
    area: str
    speed_kmh: float | None
    reason: str | None = None


class DistractionMonitor:
    """Watches the directions of one head."""

    def __init__(self, rules: DistractionRules) -> None:
        """Nothing seen yet."""
        self.rules = rules
        self._ahead = matrix_from_euler(rules.straight_ahead)
        self._area: str | None = None
        self._known_at = 0.0
        self._since: float | None = None
        self._where = ""
        self._road_at: float | None = None
        self._warned = False

    def area_of(self, rotation: npt.ArrayLike) -> str:
        """The area that a head rotation [3, 3] points into, or ``"road"``."""
        pitch, yaw, _ = euler_from_matrix(self._ahead.T @ np.asarray(rotation, np.float64))
        return next((a.name for a in self.rules.areas if a.holds(pitch, yaw)), ROAD)

    @property
    def area(self) -> str | None:
        """Where the head points now; None where nobody knows."""
        return self._area

    def update(
        self, seconds: float, rotation: npt.ArrayLike | None, speed_kmh: float | None
    ) -> list[DistractionEvent]:
        """Take the next moment into account.

        Args:
            seconds: its time.
            rotation: of the head, [3, 3]; None where it is not known.
            speed_kmh: of the car; None where it is not known: no distraction begins.

        Returns:
            What begins or ends now.
        """
        if rotation is not None:
            self._area, self._known_at = self.area_of(rotation), seconds
        elif self._area is not None and seconds - self._known_at > self.rules.hold:
            self._area = None
        if self._area is None:
            return self._end(seconds, speed_kmh, "the head pose is unknown")
        if self._area == ROAD:
            self._road_at = seconds if self._road_at is None else self._road_at
            if seconds - self._road_at >= self.rules.back:
                return self._end(seconds, speed_kmh, "back on the road")
            return []
        self._road_at, self._where = None, self._area
        self._since = seconds if self._since is None else self._since
        allowed = self.rules.allowed(speed_kmh)
        away = seconds - self._since
        if self._warned or allowed is None or away < allowed:
            return []
        self._warned = True
        return [DistractionEvent("distraction_start", away, self._where, speed_kmh)]

    def _end(self, seconds: float, speed: float | None, reason: str) -> list[DistractionEvent]:
        warned, since = self._warned, self._since
        self._warned, self._since, self._road_at = False, None, None
        if not warned or since is None:
            return []
        away = seconds - since
        return [DistractionEvent("distraction_end", away, self._where, speed, reason)]
