"""INA3221 power monitors of Jetson boards, read from sysfs.

``/sys/bus/i2c/devices/*/hwmon/hwmon*/in{n}_label``, ``in{n}_input`` (mV), ``curr{n}_input`` (mA):
Linux kernel, Documentation/hwmon/ina3221.rst. Channels 1 to 3 are inputs; a channel called ``NC``
is not connected, and channel 7 is a sum of shunt voltages, no rail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from edgehp.benchmark.power.base import POWER, MeterInfo, Rail, Sample
from edgehp.benchmark.power.rails import describe_rail, total_of
from edgehp.device import SYSTEM_ROOT, read_integer, read_text
from edgehp.errors import EnvironmentalError, MeasurementError

__all__ = ["Ina3221Meter"]

_CHANNELS = (1, 2, 3)
# The chip averages over some milliseconds; reading more often only loads the bus.
_PERIOD_S = 0.1


@dataclass(frozen=True)
class _Channel:
    rail: str
    millivolts: Path
    milliamperes: Path


class Ina3221Meter:
    """All connected rails of all INA3221 of a board."""

    def __init__(self, root: Path = SYSTEM_ROOT, clock: Callable[[], float] = perf_counter) -> None:
        """Find the rails.

        Raises:
            EnvironmentalError: there are none, or they may not be read.
        """
        self._clock = clock
        self._channels = _channels(root)
        if not self._channels:
            raise EnvironmentalError("no INA3221 power monitor with a connected rail in sysfs")
        names = tuple(c.rail for c in self._channels)
        total, includes = total_of(names)
        self._info = MeterInfo(
            "ina3221",
            POWER,
            tuple(Rail(n, describe_rail(n)) for n in names),
            total,
            includes,
            _PERIOD_S,
        )
        self.read()

    @property
    def info(self) -> MeterInfo:
        """What it is."""
        return self._info

    def read(self) -> Sample:
        """Watts of every rail that answers.

        Raises:
            MeasurementError: none does.
        """
        before = self._clock()
        watts = {}
        for channel in self._channels:
            volts, amperes = read_integer(channel.millivolts), read_integer(channel.milliamperes)
            if volts is not None and amperes is not None:
                watts[channel.rail] = volts * amperes * 1e-6
        if not watts:
            raise MeasurementError("the INA3221 power monitors no longer answer")
        return Sample((before + self._clock()) / 2, watts)

    def close(self) -> None:
        """Nothing is held."""


def _channels(root: Path) -> tuple[_Channel, ...]:
    found: dict[str, _Channel] = {}
    for device in sorted((root / "sys/bus/i2c/devices").glob("*")):
        if (read_text(device / "name", 64) or "").strip() != "ina3221":
            continue
        for monitor in sorted(device.glob("hwmon/hwmon*")):
            for n in _CHANNELS:
                label = (read_text(monitor / f"in{n}_label", 64) or "").strip()
                if not label or label.upper() == "NC":
                    continue
                name = label if label not in found else f"{label} ({device.name})"
                found[name] = _Channel(name, monitor / f"in{n}_input", monitor / f"curr{n}_input")
    return tuple(found.values())
