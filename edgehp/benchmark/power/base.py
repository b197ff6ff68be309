"""Power meters: their protocol, a recorder, and energy by integration.

A figure that is not available is None with a reason. Nothing is estimated, and rails are never
summed unless they are disjoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from edgehp.benchmark.host import Recorder
from edgehp.errors import EdgehpError, MeasurementError
from edgehp.files import Record

# What the samples of a meter are: watts at an instant, or joules since it was opened.
POWER, ENERGY = "power", "energy"
# How the sum that a meter may state is called.
TOTAL = "total"
# More than any machine that is measured at one socket; milliwatts look like this.
MOST_WATTS = 20_000.0


class MeterInfo(Record, frozen=True):
    """A meter.

    Attributes:
        name: ``"jtop"``, ``"ina3221"``, ``"nvml"``, ``"rapl"``, ``"csv"`` or ``"command"``.
        kind: `POWER` or `ENERGY`.
        rails: the supplies that it sees, and what hangs on each.
        total: rails whose sum is the total; they are disjoint. Empty where there is no total.
        includes: what is inside the total, for people, or why there is none.
        period_s: seconds between samples.
        buffered: several readings may be waiting; it is read until there is none.
    """

    name: str
    kind: str
    rails: dict[str, str]
    total: tuple[str, ...]
    includes: str
    period_s: float
    buffered: bool = False


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


class Meter:
    """An opened meter. It is read by one thread.

    A kind of meter gives its `info` and `values`; one whose readings have a time of their own, or
    may be missing, has a `read` of its own.
    """

    info: MeterInfo

    def values(self) -> dict[str, float]:
        """Watts, or joules since it was opened, by rail.

        Raises:
            MeasurementError: the meter stopped working.
        """
        raise NotImplementedError

    def read(self) -> Sample | None:
        """One reading; None where there is no new one. Errors as of `values`."""
        before = perf_counter()
        values = self.values()
        return Sample((before + perf_counter()) / 2, values)

    def close(self) -> None:
        """Let go of what it holds; calling it again does nothing."""


Array = npt.NDArray[np.float64]
# One dropped sample is bridged by a straight line, more in a row are a hole.
_LARGEST_GAP_PERIODS = 5.0


class Energy(Record, frozen=True):
    """Energy over some windows of time.

    Attributes:
        seconds: length of the windows together.
        joules: by rail, and ``total`` where the meter has one; None where it cannot be said.
        watts: their mean power.
        reasons: why, by rail, for every None.
    """

    seconds: float
    joules: dict[str, float | None]
    watts: dict[str, float | None]
    reasons: dict[str, str]


def energy_over(
    info: MeterInfo, samples: Sequence[Sample], windows: Sequence[tuple[float, float]]
) -> Energy:
    """Integrate every rail over the windows.

    Power: trapezoids between samples, with the values at the edges of a window interpolated.
    Energy counters: the difference of the counts interpolated at the edges. Both need a sample
    before and one after each window, and no hole longer than five periods inside.

    Args:
        info: of the meter.
        samples: in any order.
        windows: start and end, monotonic seconds.
    """
    seconds = sum(end - start for start, end in windows)
    joules: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    ordered = sorted(samples, key=lambda s: s.time)
    for rail in info.rails:
        used = [s for s in ordered if rail in s.values]
        t = np.array([s.time for s in used])
        v = np.array([s.values[rail] for s in used])
        t, keep = np.unique(t, return_index=True)
        v = v[keep]
        total: float | None = 0.0
        for start, end in windows:
            fault = _fault(t, v, start, end, info.period_s)
            if fault is not None:
                total = None
                reasons[rail] = fault
                break
            total = (total or 0.0) + _one(info.kind, t, v, start, end)
        joules[rail] = total
    parts = [joules.get(name) for name in info.total]
    if not parts:
        joules[TOTAL], reasons[TOTAL] = None, info.includes
    elif any(p is None for p in parts):
        joules[TOTAL] = None
        missing = [n for n in info.total if joules.get(n) is None]
        reasons[TOTAL] = f"{', '.join(missing)}: {reasons.get(missing[0], 'not measured')}"
    else:
        joules[TOTAL] = float(sum(p for p in parts if p is not None))
    watts = {k: v / seconds if v is not None and seconds > 0 else None for k, v in joules.items()}
    return Energy(seconds, joules, watts, reasons)


def _fault(t: Array, v: Array, start: float, end: float, period: float) -> str | None:
    if t.size < 2:
        return f"{t.size} samples, at least 2 are needed"
    if not np.isfinite(v).all():
        return "a reading that is not a number"
    if end <= start:
        return "an empty window"
    if t[0] > start:
        return f"the samples begin {t[0] - start:.2f} s after the measured time"
    if t[-1] < end:
        return f"the samples end {end - t[-1]:.2f} s before the measured time: the meter stopped"
    gap = _gap(t, start, end)
    if gap > _LARGEST_GAP_PERIODS * period:
        return (
            f"no sample for {gap:.2f} s within the measured time, at most "
            f"{_LARGEST_GAP_PERIODS * period:.2f} s can be bridged"
        )
    return None


def _gap(t: Array, start: float, end: float) -> float:
    """The longest time between samples that bear on the window."""
    first = max(int(np.searchsorted(t, start, side="right")) - 1, 0)
    last = min(int(np.searchsorted(t, end, side="left")), t.size - 1)
    return float(np.diff(t[first : last + 1]).max(initial=0.0))


def _one(kind: str, t: Array, v: Array, start: float, end: float) -> float:
    edges = np.interp((start, end), t, v)
    if kind == ENERGY:
        return float(edges[1] - edges[0])
    middle = (t > start) & (t < end)
    times = np.concatenate(([start], t[middle], [end]))
    watts = np.concatenate(([edges[0]], v[middle], [edges[1]]))
    return float(((watts[1:] + watts[:-1]) / 2 * np.diff(times)).sum())


logger = logging.getLogger(__name__)


class PowerRecorder(Recorder):
    """Samples a meter from `start` to `stop`.

    Attributes:
        failure: why the meter stopped working, or None.
    """

    def __init__(self, meter: Meter) -> None:
        """Record `meter`, which stays the caller's to close."""
        super().__init__(meter.info.period_s)
        self._meter = meter
        self._samples: list[Sample] = []
        self.failure: str | None = None

    @property
    def info(self) -> MeterInfo:
        """The meter."""
        return self._meter.info

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What was read until now."""
        return tuple(self._samples)

    def watts(self) -> float | None:
        """Power right now for a display: of the total, else of the first rail; None if unknown."""
        recent = self._samples[-2:]
        names = self.info.total or list(self.info.rails)[:1]
        if len(recent) < 2 or any(n not in s.values for s in recent for n in names):
            return None
        before, now = (sum(s.values[n] for n in names) for s in recent)
        if self.info.kind == POWER:
            return now
        seconds = recent[1].time - recent[0].time
        return (now - before) / seconds if seconds > 0 else None

    def _look(self) -> bool:
        try:
            while (sample := self._meter.read()) is not None:
                for rail, value in sample.values.items():
                    if self.info.kind == POWER and not -1 <= value <= MOST_WATTS:
                        raise MeasurementError(
                            f"{rail} gives {value:g} W, which no machine here takes"
                        )
                self._samples.append(sample)
                if not self.info.buffered:
                    break
        except (EdgehpError, OSError) as e:
            self.failure = str(e)
            logger.warning("power meter %s: %s", self.info.name, e)
            return False
        return True
