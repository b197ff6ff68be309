"""A meter outside the machine, for power at the wall: a CSV file that it writes, or a command."""

from __future__ import annotations

import codecs
import csv
import datetime
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from edgehp.benchmark.power.base import MOST_WATTS, POWER, Meter, MeterInfo, Sample
from edgehp.errors import DataError, EnvironmentalError, MeasurementError, UsageError

_WALL = {"wall": "what the external meter measures"}
_INCLUDES = "whatever the external meter measures"
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?")
# Both clocks are at network time: further apart, the time is in another unit or zone.
_LARGEST_SHIFT_S = 86_400.0
_BYTES_A_LINE = 1 << 16
_PERIOD_S = 1.0


class CsvMeter(Meter):
    """A CSV file that a meter's logger appends to while the benchmark runs.

    Its header names a time (``time``: seconds since 1970, or ISO 8601 with a zone) and ``watts``;
    other columns are ignored, in whatever encoding they are. Rows that were there before are not
    read. Both clocks must agree: run the logger on this machine, or keep both at network time.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Open the file at its end.

        Raises:
            DataError: it cannot be read, or its header lacks a column.
        """
        self._path = path
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("rb"))
                first = self._file.readline(_BYTES_A_LINE)
                end = self._file.seek(0, os.SEEK_END)
                # A row that is being written now is skipped as a whole.
                self._file.seek(max(end - 1, 0))
                self._skip = end > 0 and self._file.read(1) != b"\n"
            except OSError as e:
                raise DataError(
                    f"{path} cannot be read ({e.strerror or e}); expected the CSV of a power meter "
                    "with the columns time and watts"
                ) from e
            self._header = _header(path, first)
            stack.pop_all()
        self._wall = wall
        self._to_clock = clock() - wall()
        self._rest = b""
        self._last = -math.inf
        self.info = MeterInfo("csv", POWER, _WALL, ("wall",), _INCLUDES, _PERIOD_S, True)

    def read(self) -> Sample | None:
        """The next row, at the time it says, or None where there is none yet.

        Raises:
            MeasurementError: a row that is not a time and a plausible number of watts.
        """
        self._rest += self._file.readline(_BYTES_A_LINE)
        if not self._rest.endswith(b"\n"):
            return None
        line, self._rest = _text(self._rest), b""
        if self._skip:
            self._skip = False
            return self.read()
        row = next(csv.reader([line]), [])
        if not any(cell.strip() for cell in row):
            return None
        try:
            if len(row) != len(self._header):
                raise ValueError(f"found {len(row)} columns, expected {len(self._header)}")
            seconds = parse_time(row[self._header.index("time")])
            shift = seconds - self._wall()
            if not abs(shift) <= _LARGEST_SHIFT_S:
                raise ValueError(f"its time is {shift:.0f} s from this machine's clock")
            if seconds < self._last:
                raise ValueError(f"its time is {self._last - seconds:g} s before the last row's")
            watts = parse_watts(row[self._header.index("watts")])
        except ValueError as e:
            raise MeasurementError(
                f"{self._path}: the row {line.strip()[:60]!r} is not a time and watts: {e}"
            ) from e
        self._last = seconds
        return Sample(seconds + self._to_clock, {"wall": watts})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _text(line: bytes) -> str:
    """A line, whatever its encoding: a NUL, of UTF-16, ends csv's reader in Python 3.10."""
    return line.decode("utf-8", "replace").replace("\0", "\ufffd")


def _header(path: Path, line: bytes) -> list[str]:
    """The names of the columns, in lower case."""
    text = _text(line.removeprefix(codecs.BOM_UTF8))
    names = [name.strip().lower() for name in next(csv.reader([text]), [])]
    if not {"time", "watts"} <= set(names):
        raise DataError(
            f"{path}: the header is {text.strip()[:80]!r}, expected the columns time and watts\n"
            "hint: let the logger write UTF-8 with commas between the columns time (seconds since "
            "1970, or ISO 8601 with a zone) and watts"
        )
    return names


class CommandMeter(Meter):
    """A command that prints watts, run once a sample: one number, with the unit W or none."""

    def __init__(self, command: str) -> None:
        """Try the command once.

        Raises:
            UsageError: it is empty or cannot be split into words.
            EnvironmentalError: it fails, or prints something else than watts.
        """
        try:
            self._words = shlex.split(command)
        except ValueError as e:
            raise UsageError(f"--power command:{command!r} cannot be read: {e}") from e
        if not self._words:
            raise UsageError("--power command: needs a command that prints watts")
        self.info = MeterInfo("command", POWER, _WALL, ("wall",), _INCLUDES, _PERIOD_S)
        try:
            self.values()
        except MeasurementError as e:
            raise EnvironmentalError(str(e)) from e

    def values(self) -> dict[str, float]:
        """Run it: watts at the wall."""
        try:
            done = subprocess.run(self._words, capture_output=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError) as e:
            raise MeasurementError(f"the power command failed: {e}") from e
        text = done.stdout.decode("utf-8", "replace").strip()
        try:
            return {"wall": parse_watts(text)}
        except ValueError as e:
            raise MeasurementError(
                f"the power command printed {text[:60]!r}, expected a number of watts: {e}"
            ) from e


def parse_watts(text: str) -> float:
    """Watts from a text with one number in it, in watts or without a unit.

    Raises:
        ValueError: no or several numbers, a decimal comma, another unit, or a value that no wall
            socket gives.
    """
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        raise ValueError(f"found {len(found) or 'no'} numbers")
    number = found[0][0]
    if "," in number:
        raise ValueError(f"{number} has a comma, expected a decimal point")
    unit = re.match(r"\s*([^\W\d_]*)", text[found[0].end() :])
    if unit is not None and unit[1].lower() not in ("", "w", "watt", "watts"):
        raise ValueError(f"the unit is {unit[1]}")
    watts = float(number)
    if not 0 <= watts <= MOST_WATTS:
        raise ValueError(f"{watts:g} W is not between 0 and {MOST_WATTS:g}")
    return watts


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
