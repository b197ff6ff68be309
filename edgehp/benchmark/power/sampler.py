"""Reads a meter in a thread of its own while something else is measured."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter

from edgehp.benchmark.power.base import POWER, Meter, MeterInfo, Sample
from edgehp.errors import EdgehpError

__all__ = ["PowerRecorder"]

logger = logging.getLogger(__name__)

# A thread that hangs in a driver must not keep the command from ending.
_JOIN_S = 10.0


class PowerRecorder:
    """Samples a meter from `start` to `stop`.

    Attributes:
        failure: why the meter stopped working, or None.
    """

    def __init__(self, meter: Meter, clock: Callable[[], float] = perf_counter) -> None:
        """Record `meter`, which stays the caller's to close."""
        self._meter = meter
        self._clock = clock
        self._samples: list[Sample] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: str | None = None

    @property
    def info(self) -> MeterInfo:
        """The meter."""
        return self._meter.info

    @property
    def period_s(self) -> float:
        """Seconds between samples."""
        return self._meter.info.period_s

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What was read until now."""
        return tuple(self._samples)

    def watts(self) -> float | None:
        """Power right now for a display: of the total, else of the first rail; None if unknown."""
        recent = self._samples[-2:]
        names = self.info.total or tuple(r.name for r in self.info.rails[:1])
        if len(recent) < 2 or any(n not in s.values for s in recent for n in names):
            return None
        before, now = (sum(s.values[n] for n in names) for s in recent)
        if self.info.kind == POWER:
            return now
        seconds = recent[1].time - recent[0].time
        return (now - before) / seconds if seconds > 0 else None

    def start(self) -> None:
        """Begin to sample."""
        self._thread = threading.Thread(target=self._run, name="edgehp-power", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _read(self) -> None:
        while (sample := self._meter.read()) is not None:
            self._samples.append(sample)
            if not self.info.buffered:
                return

    def _run(self) -> None:
        due = self._clock()
        while not self._end.is_set():
            try:
                self._read()
            except (EdgehpError, OSError) as e:
                self.failure = str(e)
                logger.warning("power meter %s: %s", self._meter.info.name, e)
                return
            # On a grid, so that a slow read does not shift all that follow.
            due = max(due + self.period_s, self._clock())
            self._end.wait(max(0.0, due - self._clock()))
