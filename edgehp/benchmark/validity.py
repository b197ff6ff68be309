"""Whether a measurement may be believed, with a reason for every doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgehp.benchmark.host import HostState
from edgehp.benchmark.lanes import WarmUp
from edgehp.benchmark.stats import Latency

__all__ = ["BURST_S", "Limits", "Validity", "judge", "load_summary"]

BURST_S = 2.0


@dataclass(frozen=True)
class Limits:
    """What is allowed before a run is called invalid.

    Attributes:
        foreign_load: processor time of others as a part of the whole machine.
        foreign_burst: the same within any `BURST_S` seconds: a mean over minutes hides a short
            disturbance that the slowest calls do not.
        clock_change: the fastest clock may fall below its highest by this part.
        temperature_drift: degrees between the first and the last quarter of the run.
    """

    foreign_load: float = 0.05
    foreign_burst: float = 0.20
    clock_change: float = 0.10
    temperature_drift: float = 10.0


@dataclass(frozen=True)
class Validity:
    """The judgement: valid without `reasons`; `unknown` says what could not be checked."""

    reasons: tuple[str, ...]
    unknown: tuple[str, ...]
    limits: Limits
    figures: Mapping[str, Any]

    @property
    def valid(self) -> bool:
        """Whether nothing speaks against the run."""
        return not self.reasons

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "valid": self.valid,
            "reasons": list(self.reasons),
            "unknown": list(self.unknown),
            "limits": asdict(self.limits),
            "figures": dict(self.figures),
        }


def judge(
    states: Sequence[HostState],
    window: tuple[float, float],
    processors: int,
    warm_ups: Sequence[WarmUp] = (),
    headline: tuple[float, Mapping[str, Latency | None]] | None = None,
    limits: Limits | None = None,
    changes: Sequence[str] = (),
) -> Validity:
    """Judge a run by what was seen during it.

    Args:
        states: of the machine, in order.
        window: start and end of the measured time.
        processors: of the machine.
        warm_ups: of the networks.
        headline: the percentile that the scenario is judged by and the latencies by role.
        limits: the default ones when omitted.
        changes: settings of the machine that are others after the run than before it.
    """
    limits = limits or Limits()
    seen = _around(states, window)
    reasons: list[str] = [f"settings: {change} during the run" for change in changes]
    unknown: list[str] = []
    figures: dict[str, Any] = {}
    for warm in warm_ups:
        if not warm.settled:
            spread = "too few blocks" if warm.spread is None else f"still {warm.spread:.0%} apart"
            reasons.append(
                f"warm-up: {warm.role} did not settle in {warm.seconds:.0f} s ({spread})"
            )
    if headline is not None:
        p, latencies = headline
        for role, latency in latencies.items():
            found = None if latency is None else latency.at(p)
            if found is None or found.bound is None:
                count = 0 if latency is None else latency.count
                reasons.append(
                    f"samples: {count} of {role} are too few for a bound on p{p:g}"
                    + ("" if found is None else f", {found.needed} are needed")
                )
    if len(seen) < 2:
        unknown.append("the machine was not watched")
        return Validity(tuple(reasons), tuple(unknown), limits, figures)
    _throttling(seen, reasons, unknown)
    _heat(seen, limits, reasons, unknown, figures)
    _clocks(seen, limits, reasons, unknown, figures)
    load = load_summary(seen, processors)
    figures.update(load)
    if load["foreign_load"] is None:
        unknown.append("foreign load: /proc/stat cannot be read")
    elif load["foreign_load"] > limits.foreign_load:
        reasons.append(
            f"foreign load: other work took {load['foreign_processors']:.2f} of {processors} "
            f"processors ({load['foreign_load']:.0%}, at most {limits.foreign_load:.0%} allowed)"
        )
    burst = _largest_burst(seen, processors)
    figures["foreign_burst"] = burst
    if burst is not None and burst > limits.foreign_burst:
        reasons.append(
            f"foreign load: other work took {burst * processors:.2f} of {processors} processors "
            f"for {BURST_S:g} s ({burst:.0%}, at most {limits.foreign_burst:.0%} allowed)"
        )
    return Validity(tuple(reasons), tuple(unknown), limits, figures)


def load_summary(seen: Sequence[HostState], processors: int) -> dict[str, float | None]:
    """How much of the machine others used between the first and the last state."""
    first, last = seen[0], seen[-1]
    seconds = last.time - first.time
    if first.busy_s is None or last.busy_s is None or seconds <= 0:
        return {"foreign_load": None, "foreign_processors": None, "own_processors": None}
    own = (last.own_s - first.own_s) / seconds
    # The two clocks tick apart, so that a quiet machine may come out a hair below zero.
    foreign = max(0.0, (last.busy_s - first.busy_s) / seconds - own)
    return {
        "foreign_load": foreign / processors,
        "foreign_processors": foreign,
        "own_processors": own,
    }


def _largest_burst(seen: Sequence[HostState], processors: int) -> float | None:
    """The largest foreign load over `BURST_S` seconds; None where it is not known."""
    largest: float | None = None
    first = 0
    for last, state in enumerate(seen):
        # The latest look that is far enough back.
        while first + 1 < last and state.time - seen[first + 1].time >= BURST_S:
            first += 1
        if state.time - seen[first].time >= BURST_S:
            load = load_summary((seen[first], state), processors)["foreign_load"]
            if load is not None:
                largest = max(largest or 0.0, load)
    return largest


def _around(states: Sequence[HostState], window: tuple[float, float]) -> list[HostState]:
    """The states inside the window, with the last one before it and the first one after it."""
    before = [s for s in states if s.time < window[0]][-1:]
    inside = [s for s in states if window[0] <= s.time <= window[1]]
    after = [s for s in states if s.time > window[1]][:1]
    return [*before, *inside, *after]


def _throttling(seen: Sequence[HostState], reasons: list[str], unknown: list[str]) -> None:
    said = sorted({r for s in seen for r in s.reasons})
    if said:
        times = sum(bool(s.reasons) for s in seen)
        reasons.append(f"throttling: {', '.join(said)} in {times} of {len(seen)} looks")
    for name, count in seen[-1].throttles.items():
        more = count - seen[0].throttles.get(name, count)
        if more > 0:
            reasons.append(f"throttling: {name} counted {more} more")
    hot: dict[str, float] = {}
    for state in seen:
        for zone, trip in state.trips.items():
            if state.temperatures.get(zone, -273.0) >= trip:
                hot[zone] = max(hot.get(zone, trip), state.temperatures[zone])
    for zone, degrees in sorted(hot.items()):
        reasons.append(
            f"throttling: {zone} reached {degrees:.1f} °C, where the kernel slows it down "
            f"({seen[-1].trips.get(zone, 0):.1f} °C)"
        )
    if not seen[-1].throttles and not seen[-1].trips and seen[-1].gpu_mhz is None:
        unknown.append("throttling: this machine tells neither counters nor trip points")


def _heat(
    seen: Sequence[HostState],
    limits: Limits,
    reasons: list[str],
    unknown: list[str],
    figures: dict[str, Any],
) -> None:
    zones = set(seen[0].temperatures) & set(seen[-1].temperatures)
    if not zones:
        unknown.append("temperature: no thermal zone")
        return
    quarter = max(1, len(seen) // 4)
    drifts = {}
    for zone in sorted(zones):
        early = [s.temperatures[zone] for s in seen[:quarter] if zone in s.temperatures]
        late = [s.temperatures[zone] for s in seen[-quarter:] if zone in s.temperatures]
        drifts[zone] = sum(late) / len(late) - sum(early) / len(early)
    figures["temperature_drift"] = drifts
    figures["temperature_max"] = {
        z: max(s.temperatures[z] for s in seen if z in s.temperatures) for z in sorted(zones)
    }
    zone, drift = max(drifts.items(), key=lambda pair: abs(pair[1]))
    if abs(drift) > limits.temperature_drift:
        reasons.append(
            f"temperature: {zone} drifted by {drift:+.1f} °C during the run, at most "
            f"{limits.temperature_drift:g} allowed: warm up longer"
        )


def _clocks(
    seen: Sequence[HostState],
    limits: Limits,
    reasons: list[str],
    unknown: list[str],
    figures: dict[str, Any],
) -> None:
    # The fastest processor of each look: idle ones go down, and may.
    series = {
        "processor": [max(s.mhz) for s in seen if s.mhz],
        "GPU": [s.gpu_mhz for s in seen if s.gpu_mhz is not None],
    }
    if not any(series.values()):
        unknown.append("clocks: this machine does not tell them")
    for name, values in series.items():
        if not values:
            continue
        low, high = min(values), max(values)
        figures[f"{name}_mhz"] = [low, high]
        if high > 0 and low < (1 - limits.clock_change) * high:
            reasons.append(
                f"clocks: the {name} went between {low:.0f} and {high:.0f} MHz; fix its frequency "
                "or its governor"
            )
