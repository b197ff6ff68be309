"""What every power meter has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["ENERGY", "POWER", "TOTAL", "Meter", "MeterInfo", "Rail", "Sample", "Unwrapper"]

# What the samples of a meter are: watts at an instant, or joules since it was opened.
POWER, ENERGY = "power", "energy"
# How the sum that a meter may state is called.
TOTAL = "total"


@dataclass(frozen=True)
class Rail:
    """One supply that a meter sees: its name and what hangs on it."""

    name: str
    description: str


@dataclass(frozen=True)
class MeterInfo:
    """A meter.

    Attributes:
        name: ``"jtop"``, ``"ina3221"``, ``"nvml"``, ``"rapl"``, ``"csv"`` or ``"command"``.
        kind: `POWER` or `ENERGY`.
        rails: what it sees, one by one.
        total: rails whose sum is the total; they are disjoint. Empty where there is no total.
        includes: what is inside the total, for people, or why there is none.
        period_s: seconds between samples.
        buffered: several readings may be waiting; it is read until there is none.
    """

    name: str
    kind: str
    rails: tuple[Rail, ...]
    total: tuple[str, ...]
    includes: str
    period_s: float
    buffered: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "rails": {r.name: r.description for r in self.rails},
            "total_rails": list(self.total),
            "includes": self.includes,
            "period_s": self.period_s,
        }


@dataclass(frozen=True)
class Sample:
    """One reading.

    Attributes:
        time: seconds of the monotonic clock (`time.perf_counter`) at which the values hold.
        values: rail -> watts or joules, as the meter's `kind` says; a rail that could not be read
            is absent.
    """

    time: float
    values: Mapping[str, float]


class Meter(Protocol):
    """An opened meter. It is read by one thread."""

    @property
    def info(self) -> MeterInfo:
        """What it is."""

    def read(self) -> Sample | None:
        """One reading; None where there is no new one.

        Raises:
            MeasurementError: the meter stopped working.
        """

    def close(self) -> None:
        """Let go of it; calling it again does nothing."""


@dataclass
class Unwrapper:
    """Makes a counter that starts again at zero into one that does not.

    Attributes:
        modulus: the value at which it starts again, in its own unit.
    """

    modulus: float
    _last: float | None = field(default=None, repr=False)
    _offset: float = field(default=0.0, repr=False)
    _first: float = field(default=0.0, repr=False)

    def add(self, value: float) -> float:
        """The count since the first value.

        A value below the last one means one wrap: the meter must be read more than once a wrap.
        """
        if self._last is None:
            self._first = value
        elif value < self._last:
            self._offset += self.modulus
        self._last = value
        return value + self._offset - self._first
