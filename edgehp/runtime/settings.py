"""The runtime's settings, and the TOML file they are read from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgehp._toml import load_toml
from edgehp._toml_fields import Fields
from edgehp.errors import UsageError
from edgehp.runtime.distraction import Area, DistractionRules, SpeedTime

__all__ = ["CaptureSettings", "FilterSettings", "Settings", "TrackingSettings", "load_settings"]


@dataclass(frozen=True)
class CaptureSettings:
    """When frames are late, stuck or lost; seconds.

    Attributes:
        stale: the newest frame is older than this: ``stale_frame``. Also a result that took longer.
        lost: no frame for so long: ``camera_lost``.
        hang: opening or reading has not come back for so long: the process ends, as nothing else
            frees a driver; the service manager starts it again.
        frozen: identical frames over so long: ``stuck_camera``.
        reopen: a camera stuck for so long is closed and opened again.
        retry_first: pause before a lost camera is opened again; doubled each time.
        retry_longest: the longest such pause.
        heartbeat: a state that lasts is told again so often.
        bit_depth: significant bits of frames with 16 bits a pixel.
        grey: turn colour into grey: a near-infrared sensor behind a colour driver.
    """

    stale: float = 0.3
    lost: float = 0.8
    hang: float = 15.0
    frozen: float = 0.4
    reopen: float = 5.0
    retry_first: float = 0.2
    retry_longest: float = 5.0
    heartbeat: float = 1.0
    bit_depth: int = 16
    grey: bool = False


@dataclass(frozen=True)
class TrackingSettings:
    """How the face is found.

    Attributes:
        every: frames between detections.
        patience: detections in a row that may miss a tracked face.
        min_face_score: least score of a detected face.
        min_confidence: less is ``low_confidence``.
    """

    every: int = 15
    patience: int = 2
    min_face_score: float = 0.5
    min_confidence: float = 0.5


@dataclass(frozen=True)
class FilterSettings:
    """Of `edgehp.runtime.filter.RotationFilter`."""

    min_cutoff: float = 1.0
    beta: float = 0.1
    speed_cutoff: float = 1.0
    reset_after: float = 0.5


@dataclass(frozen=True)
class Settings:
    """Everything that may be set in the file."""

    capture: CaptureSettings = field(default_factory=CaptureSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    filter: FilterSettings = field(default_factory=FilterSettings)
    distraction: DistractionRules = field(default_factory=DistractionRules)
    speed_max_age: float = 2.0


_Section = TypeVar("_Section", CaptureSettings, TrackingSettings, FilterSettings)


def load_settings(path: Path) -> Settings:
    """Read a settings file; what it does not say keeps its default.

    Raises:
        DataError: missing, not TOML, or a key or value that is not known.
    """
    where = str(path)
    top = _Table(where, load_toml(path))
    settings = Settings(
        _section(top.sub("capture"), CaptureSettings()),
        _section(top.sub("tracking"), TrackingSettings()),
        _section(top.sub("filter"), FilterSettings()),
        _distraction(top.sub("distraction")),
        top.number("speed_max_age") if top.has("speed_max_age") else Settings().speed_max_age,
    )
    top.done()
    return settings


class _Table(Fields):
    """A table with the kinds of values that settings need more."""

    def sub(self, key: str) -> _Table:
        """A table, empty where the key is absent."""
        values = self._take(key, (dict,), "a table", {})
        return _Table(self._file, values, f"{self._prefix}{key}.")

    def subs(self, key: str) -> list[_Table]:
        """An array of tables."""
        values = self._take(key, (list,), "an array of tables", [])
        if not all(isinstance(value, dict) for value in values):
            raise self.error(key, f"holds something else than tables; expected [[{key}]]")
        return [_Table(self._file, v, f"{self._prefix}{key}[{i}].") for i, v in enumerate(values)]

    def not_negative(self, key: str) -> float:
        """A finite number, zero or more."""
        value = float(self._take(key, (int, float), "zero or a positive number", None))
        if not (math.isfinite(value) and value >= 0):
            raise self.error(key, f"is {value!r}; expected zero or a positive number")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers of any sign."""
        values = self._take(key, (list,), f"a list of {count} numbers", None)
        if len(values) != count or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
            for v in values
        ):
            raise self.error(key, f"is {values!r}; expected a list of {count} numbers")
        return tuple(float(v) for v in values)


# Zero means something for these: no dependence on speed, no threshold, at once.
_MAY_BE_ZERO = ("beta", "min_face_score", "min_confidence", "back", "hold")


def _value(table: _Table, key: str, default: object) -> object:
    if not table.has(key):
        return default
    if isinstance(default, bool):
        return table.boolean(key)
    if isinstance(default, int):
        return table.integer(key)
    return table.not_negative(key) if key in _MAY_BE_ZERO else table.number(key)


def _section(table: _Table, default: _Section) -> _Section:
    changes: dict[str, Any] = {
        f.name: _value(table, f.name, getattr(default, f.name)) for f in dataclasses.fields(default)
    }
    table.done()
    return dataclasses.replace(default, **changes)


def _distraction(table: _Table) -> DistractionRules:
    default = DistractionRules()
    changes: dict[str, Any] = {k: _value(table, k, getattr(default, k)) for k in ("back", "hold")}
    if table.has("straight_ahead"):
        changes["straight_ahead"] = table.numbers("straight_ahead", 3)
    if table.has("area"):
        changes["areas"] = tuple(_area(t) for t in table.subs("area"))
    if table.has("time"):
        changes["times"] = tuple(_time(t) for t in table.subs("time"))
    table.done()
    return dataclasses.replace(default, **changes)


def _area(table: _Table) -> Area:
    name = table.text("name")
    ranges: dict[str, Any] = {k: table.numbers(k, 2) for k in ("pitch", "yaw") if table.has(k)}
    try:
        area = Area(name, **ranges)
    except UsageError as e:
        raise table.error("name", f"is refused: {e}") from e
    table.done()
    return area


def _time(table: _Table) -> SpeedTime:
    found = SpeedTime(table.not_negative("speed_kmh"), table.number("seconds"))
    table.done()
    return found
