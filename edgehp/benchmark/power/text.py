"""A meter outside the machine, for power at the wall: a CSV file that it writes, or a command."""

from __future__ import annotations

import csv
import datetime
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from edgehp.benchmark.power.base import POWER, MeterInfo, Rail, Sample
from edgehp.errors import DataError, EnvironmentalError, MeasurementError, UsageError

__all__ = ["CommandMeter", "CsvMeter", "parse_time"]

_WALL = (Rail("wall", "what the external meter measures"),)
_INCLUDES = "whatever the external meter measures"
_TIME_NAMES = ("time", "timestamp", "t")
_WATT_NAMES = ("watts", "power", "w", "power_w")


class CsvMeter:
    """A CSV file that a meter's logger appends to while the benchmark runs.

    Its header names a time (``time``: seconds since 1970, or ISO 8601 with a zone) and ``watts``.
    Both clocks must agree: run the logger on this machine, or keep both at network time.
    """

    def __init__(
        self,
        path: Path,
        period_s: float = 1.0,
        clock: Callable[[], float] = perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Open the file at its end.

        Raises:
            DataError: it cannot be read, or its header lacks a column.
        """
        self._path = path
        try:
            self._file = path.open(encoding="utf-8", newline="")
        except OSError as e:
            raise DataError(
                f"{path} cannot be read ({e.strerror or e}); expected the CSV of a power meter "
                "with the columns time and watts"
            ) from e
        header = next(csv.reader([self._file.readline()]), [])
        names = [h.strip().lower() for h in header]
        try:
            self._time = next(i for i, n in enumerate(names) if n in _TIME_NAMES)
            self._watts = next(i for i, n in enumerate(names) if n in _WATT_NAMES)
        except StopIteration:
            self._file.close()
            raise DataError(
                f"{path}: the header is {','.join(header)!r}, expected the columns time and watts"
            ) from None
        self._to_clock = clock() - wall()
        self._line = 1
        self._rest = ""
        self._info = MeterInfo("csv", POWER, _WALL, ("wall",), _INCLUDES, period_s, True)

    @property
    def info(self) -> MeterInfo:
        """What it is."""
        return self._info

    def read(self) -> Sample | None:
        """The next row, at the time it says, or None where there is none yet.

        Raises:
            MeasurementError: a row that is not a time and a number.
        """
        self._rest += self._file.readline()
        if not self._rest.endswith("\n"):
            return None
        row, self._rest = next(csv.reader([self._rest]), []), ""
        self._line += 1
        if not any(cell.strip() for cell in row):
            return None
        try:
            seconds = parse_time(row[self._time])
            watts = float(row[self._watts])
        except (ValueError, IndexError) as e:
            raise MeasurementError(
                f"{self._path}: line {self._line} is {','.join(row)!r}, expected a time and watts"
            ) from e
        return Sample(seconds + self._to_clock, {"wall": watts})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CommandMeter:
    """A command that prints watts, run once a sample; the first number of its output counts."""

    def __init__(
        self, command: str, period_s: float = 1.0, clock: Callable[[], float] = perf_counter
    ) -> None:
        """Try the command once.

        Raises:
            UsageError: it is empty or cannot be split into words.
            EnvironmentalError: it fails, or prints no number.
        """
        try:
            self._words = shlex.split(command)
        except ValueError as e:
            raise UsageError(f"--power command:{command!r} cannot be read: {e}") from e
        if not self._words:
            raise UsageError("--power command: needs a command that prints watts")
        self._clock = clock
        self._info = MeterInfo("command", POWER, _WALL, ("wall",), _INCLUDES, period_s)
        try:
            self.read()
        except MeasurementError as e:
            raise EnvironmentalError(str(e)) from e

    @property
    def info(self) -> MeterInfo:
        """What it is."""
        return self._info

    def read(self) -> Sample:
        """Run it.

        Raises:
            MeasurementError: it fails, hangs, or prints no number.
        """
        before = self._clock()
        try:
            done = subprocess.run(
                self._words, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError) as e:
            raise MeasurementError(f"the power command failed: {e}") from e
        found = re.search(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", done.stdout)
        if found is None:
            raise MeasurementError(
                f"the power command printed {done.stdout[:60]!r}, expected a number of watts"
            )
        return Sample((before + self._clock()) / 2, {"wall": float(found[0])})

    def close(self) -> None:
        """Nothing is held."""


def parse_time(text: str) -> float:
    """Seconds since 1970 from a number or from ISO 8601 with a time zone.

    Raises:
        ValueError: it is neither.
    """
    text = text.strip()
    try:
        return float(text)
    except ValueError:
        # Python 3.10 does not know the Z.
        when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    if when.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return when.timestamp()
