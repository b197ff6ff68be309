"""The car's speed: a constant, a file that somebody keeps up to date, or lines on stdin."""

from __future__ import annotations

import math
import os
import stat
import threading
import time
from pathlib import Path
from typing import IO, Protocol

from edgehp.errors import UsageError

__all__ = ["ConstantSpeed", "FileSpeed", "LineSpeed", "SpeedSource", "parse_speed"]

# A number; anything longer is not one.
_MOST_BYTES = 64
# Beyond any car: a wrong unit or a broken sender.
_FASTEST = 500.0


class SpeedSource(Protocol):
    """Says how fast the car is."""

    def read(self) -> float | None:
        """Kilometres per hour; None where it is not known, or known too long ago."""


class ConstantSpeed:
    """The same speed always; for trials."""

    def __init__(self, kmh: float | None) -> None:
        self._kmh = kmh

    def read(self) -> float | None:
        """The speed."""
        return self._kmh


class FileSpeed:
    """A small file with one number; its time of change says how old the number is."""

    def __init__(self, path: Path, max_age: float) -> None:
        self._path, self._max_age = path, max_age

    def read(self) -> float | None:
        """The number, unless it is missing, no number, or older than `max_age` seconds."""
        try:
            with open(self._path, "rb", opener=_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    return None
                raw = file.read(_MOST_BYTES)
        except OSError:
            return None
        # Either way: where the clock was set back, an old number would look fresh for long.
        fresh = abs(time.time() - status.st_mtime) <= self._max_age
        return _number(raw.decode("ascii", "replace")) if fresh else None


class LineSpeed:
    """Lines of one number each, read in a thread of its own."""

    def __init__(self, lines: IO[bytes], max_age: float) -> None:
        self._lines, self._max_age = lines, max_age
        self._last: tuple[float | None, float] = (None, -math.inf)
        threading.Thread(target=self._run, name="speed", daemon=True).start()

    def read(self) -> float | None:
        """The last line's number, unless it is no number or older than `max_age` seconds."""
        value, at = self._last
        return value if time.monotonic() - at <= self._max_age else None

    def _run(self) -> None:
        while line := self._lines.readline(_MOST_BYTES):
            # One assignment: the loop never sees half of it.
            self._last = (_number(line.decode("ascii", "replace")), time.monotonic())


def parse_speed(text: str | None, lines: IO[bytes], max_age: float) -> SpeedSource:
    """A speed source from what the user wrote.

    Args:
        text: a number of km/h, ``-`` for lines on stdin, ``file:PATH``; None: not known.
        lines: stdin, as bytes: one that is no text must not end the reading.
        max_age: seconds after which a number from a file or line no longer counts.

    Raises:
        UsageError: none of these.
    """
    if text is None:
        return ConstantSpeed(None)
    if text == "-":
        return LineSpeed(lines, max_age)
    if text.startswith("file:"):
        return FileSpeed(Path(text.removeprefix("file:")), max_age)
    if (value := _number(text)) is None:
        raise UsageError(
            f"speed {text!r}: expected km/h from 0 to {_FASTEST:.0f}, file:PATH, or - for stdin"
        )
    return ConstantSpeed(value)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if 0 <= value <= _FASTEST else None


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a named pipe without a writer must not hold the loop."""
    return os.open(path, flags | os.O_NONBLOCK)
