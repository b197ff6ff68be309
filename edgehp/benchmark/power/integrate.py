"""Energy from samples, over exactly the time in which something was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgehp.benchmark.power.base import ENERGY, TOTAL, MeterInfo, Sample

__all__ = ["Energy", "energy_over"]

Array = npt.NDArray[np.float64]
# One dropped sample is bridged by a straight line, more in a row are a hole.
_LARGEST_GAP_PERIODS = 5.0


@dataclass(frozen=True)
class Energy:
    """Energy over some windows of time.

    Attributes:
        seconds: length of the windows together.
        joules: by rail, and ``total`` where the meter has one; None where it cannot be said.
        reasons: why, by rail, for every None.
        samples: samples inside the windows.
        largest_gap_s: the longest time between two samples that were used.
    """

    seconds: float
    joules: Mapping[str, float | None]
    reasons: Mapping[str, str]
    samples: int
    largest_gap_s: float | None

    @property
    def total(self) -> float | None:
        """Joules in total, None where the meter has no total or it cannot be said."""
        return self.joules.get(TOTAL)

    def watts(self) -> dict[str, float | None]:
        """Mean power by rail."""
        return {
            k: None if v is None or self.seconds <= 0 else v / self.seconds
            for k, v in self.joules.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "seconds": self.seconds,
            "joules": dict(self.joules),
            "watts": self.watts(),
            "reasons": dict(self.reasons),
            "samples": self.samples,
            "largest_gap_s": self.largest_gap_s,
        }


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
    gap: float | None = None
    inside = 0
    ordered = sorted(samples, key=lambda s: s.time)
    for rail in info.rails:
        used = [s for s in ordered if rail.name in s.values]
        t = np.array([s.time for s in used])
        v = np.array([s.values[rail.name] for s in used])
        t, keep = np.unique(t, return_index=True)
        v = v[keep]
        total: float | None = 0.0
        for start, end in windows:
            fault = _fault(t, v, start, end, info.period_s)
            if fault is not None:
                total = None
                reasons[rail.name] = fault
                break
            total = (total or 0.0) + _one(info.kind, t, v, start, end)
            gap = max(gap or 0.0, _gap(t, start, end))
        joules[rail.name] = total
        inside = max(inside, sum(int(((t >= a) & (t <= b)).sum()) for a, b in windows))
    parts = [joules.get(name) for name in info.total]
    if not parts:
        joules[TOTAL], reasons[TOTAL] = None, info.includes
    elif any(p is None for p in parts):
        joules[TOTAL] = None
        missing = [n for n in info.total if joules.get(n) is None]
        reasons[TOTAL] = f"{', '.join(missing)}: {reasons.get(missing[0], 'not measured')}"
    else:
        joules[TOTAL] = float(sum(p for p in parts if p is not None))
    return Energy(seconds, joules, reasons, inside, gap)


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
