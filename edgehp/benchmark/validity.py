"""Whether a measurement is valid, with a reason for everything that speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from edgehp.benchmark.host import HostState
from edgehp.benchmark.lanes import WarmUp
from edgehp.benchmark.stats import Latency
from edgehp.files import Record

# Processor time of others as a part of the whole machine; and within any `BURST_S` seconds: a mean
# over minutes hides a short disturbance that the slowest calls do not.
FOREIGN_LOAD, FOREIGN_BURST, BURST_S = 0.05, 0.20, 2.0
# Load of the GPU while nothing of this process runs on it, 0..1.
FOREIGN_GPU_LOAD = 0.05
# The fastest clock may fall below its highest by this part.
CLOCK_CHANGE = 0.10
# Degrees between the first and the last quarter of the run.
TEMPERATURE_DRIFT = 10.0


@dataclass(frozen=True)
class Evidence:
    """What was seen of a run.

    Attributes:
        states: of the machine, in order.
        window: start and end of the measured time.
        processors: of the machine.
        warm_ups: of the networks.
        headline: the scenario's headline percentile and the latencies by role.
        changes: settings of the machine that are others after the run than before it.
        idle: start and end of the time before in which nothing ran, None without one.
        jetson: whether the machine is a Jetson.
        quota: processors that the control group of this process may use, None without a limit.
    """

    states: Sequence[HostState]
    window: tuple[float, float]
    processors: int
    warm_ups: Sequence[WarmUp] = ()
    headline: tuple[float, Mapping[str, Latency | None]] | None = None
    changes: Sequence[str] = ()
    idle: tuple[float, float] | None = None
    jetson: bool = False
    quota: float | None = None


class Validity(Record, frozen=True):
    """The result: valid without `reasons`.

    Attributes:
        valid: whether nothing speaks against the run.
        reasons: what speaks against the run.
        conditions: what the figures hold under, such as a board that works at its power cap.
        unknown: what could not be checked.
        figures: what was seen.
    """

    valid: bool
    reasons: list[str]
    conditions: list[str]
    unknown: list[str]
    figures: dict[str, Any]


def assess(evidence: Evidence) -> Validity:
    """Assess a run by what was seen during it."""
    found = Validity(True, [], [], [], {})
    found.reasons.extend(f"settings: {change} during the run" for change in evidence.changes)
    _samples(evidence, found)
    seen = _around(evidence.states, evidence.window)
    if len(seen) < 2:
        found.unknown.append("the machine was not watched")
    else:
        _throttling(seen, found)
        _quota(seen, evidence, found)
        _heat(seen, found)
        _clocks(seen, evidence.jetson, found)
        _foreign(seen, evidence.processors, found)
        _foreign_gpu(evidence, seen, found)
    return structs.replace(found, valid=not found.reasons)


def _samples(evidence: Evidence, found: Validity) -> None:
    """Warm-ups that did not settle, and samples too small for the scenario's percentile."""
    for warm in evidence.warm_ups:
        if not warm.settled:
            spread = "too few blocks" if warm.spread is None else f"still {warm.spread:.0%} apart"
            found.reasons.append(
                f"warm-up: {warm.role} did not settle in {warm.seconds:.0f} s ({spread})"
            )
    if evidence.headline is None:
        return
    p, latencies = evidence.headline
    for role, latency in latencies.items():
        at = None if latency is None else latency.at(p)
        if at is None or at.bound_ms is None:
            count = 0 if latency is None else latency.count
            found.reasons.append(
                f"samples: {count} of {role} are too few for a bound on p{p:g}"
                + ("" if at is None else f", {at.needed} are needed")
            )


def _quota(seen: Sequence[HostState], evidence: Evidence, found: Validity) -> None:
    """A control group that the kernel stops, as containers with ``--cpus`` are."""
    if evidence.quota is None:
        return
    words = f"the control group's limit of {evidence.quota:.2f} processors"
    first, last = seen[0].quota_stops, seen[-1].quota_stops
    if first is None or last is None:
        if evidence.quota < evidence.processors:
            found.reasons.append(f"quota: {words}; nothing tells whether it was reached")
    elif last > first:
        found.reasons.append(
            f"quota: {words} stopped this process in {last - first} periods: run the container "
            "without --cpus"
        )
    else:
        found.conditions.append(f"{words}, which was not reached")


def _foreign(seen: Sequence[HostState], processors: int, found: Validity) -> None:
    load = found.figures["foreign_load"] = _foreign_load(seen[0], seen[-1], processors)
    if load is None:
        found.unknown.append("foreign load: /proc/stat cannot be read")
    elif load > FOREIGN_LOAD:
        found.reasons.append(
            f"foreign load: other work took {load * processors:.2f} of {processors} "
            f"processors ({load:.0%}, at most {FOREIGN_LOAD:.0%} allowed)"
        )
    burst = _largest_burst(seen, processors)
    found.figures["foreign_burst"] = burst
    if burst is not None and burst > FOREIGN_BURST:
        found.reasons.append(
            f"foreign load: other work took {burst * processors:.2f} of {processors} processors "
            f"for {BURST_S:g} s ({burst:.0%}, at most {FOREIGN_BURST:.0%} allowed)"
        )


def _foreign_gpu(evidence: Evidence, seen: Sequence[HostState], found: Validity) -> None:
    """The GPU's load while nothing of this process ran on it, and who else holds it."""
    if (others := max((s.gpu_others or 0 for s in seen), default=0)) > 0:
        found.conditions.append(f"{others} other processes hold this GPU")
    if all(s.gpu_load is None for s in evidence.states):
        return
    loads: list[float] = []
    if evidence.idle is not None:
        start, end = evidence.idle
        # Its first half: the driver's mean still holds what ran before.
        start = (start + end) / 2
        loads = [
            s.gpu_load for s in evidence.states if start <= s.time <= end and s.gpu_load is not None
        ]
    if not loads:
        found.unknown.append("foreign GPU load: no idle time was measured before the run")
        return
    load = sum(loads) / len(loads)
    found.figures["foreign_gpu_load"] = load
    if load > FOREIGN_GPU_LOAD:
        found.reasons.append(
            f"foreign load: the GPU was {load:.0%} busy before the run began (at most "
            f"{FOREIGN_GPU_LOAD:.0%} allowed)"
        )


def _foreign_load(first: HostState, last: HostState, processors: int) -> float | None:
    """The part of the machine that others used between two looks; None where it is not known."""
    seconds = last.time - first.time
    if first.busy_s is None or last.busy_s is None or seconds <= 0:
        return None
    own = last.own_s - first.own_s
    # The two clocks tick apart, so that a quiet machine may come out slightly below zero.
    return max(0.0, last.busy_s - first.busy_s - own) / seconds / processors


def _largest_burst(seen: Sequence[HostState], processors: int) -> float | None:
    """The largest foreign load over `BURST_S` seconds; None where it is not known."""
    loads = []
    first = 0
    for last, state in enumerate(seen):
        # The latest look that is far enough back.
        while first + 1 < last and state.time - seen[first + 1].time >= BURST_S:
            first += 1
        if state.time - seen[first].time >= BURST_S:
            loads.append(_foreign_load(seen[first], state, processors))
    return max((load for load in loads if load is not None), default=None)


def _around(states: Sequence[HostState], window: tuple[float, float]) -> list[HostState]:
    """The states inside the window, with the last one before it and the first one after it."""
    before = [s for s in states if s.time < window[0]][-1:]
    inside = [s for s in states if window[0] <= s.time <= window[1]]
    after = [s for s in states if s.time > window[1]][:1]
    return [*before, *inside, *after]


def _throttling(seen: Sequence[HostState], found: Validity) -> None:
    said = sorted({r for s in seen for r in s.reasons})
    if said:
        times = sum(bool(s.reasons) for s in seen)
        found.reasons.append(f"throttling: {', '.join(said)} in {times} of {len(seen)} looks")
    found.conditions.extend(sorted({c for s in seen for c in s.conditions}))
    for name, count in seen[-1].throttles.items():
        more = count - seen[0].throttles.get(name, count)
        if more > 0:
            found.reasons.append(f"throttling: {name} counted {more} more")
    hot: dict[str, float] = {}
    for state in seen:
        for zone, trip in state.trips.items():
            if state.temperatures.get(zone, -273.0) >= trip:
                hot[zone] = max(hot.get(zone, trip), state.temperatures[zone])
    for zone, degrees in sorted(hot.items()):
        found.reasons.append(
            f"throttling: {zone} reached {degrees:.1f} °C, where the kernel slows it down "
            f"({seen[-1].trips.get(zone, 0):.1f} °C)"
        )
    if not seen[-1].throttles and not seen[-1].trips and seen[-1].gpu_mhz is None:
        found.unknown.append("throttling: this machine tells neither counters nor trip points")


def _heat(seen: Sequence[HostState], found: Validity) -> None:
    zones = set(seen[0].temperatures) & set(seen[-1].temperatures)
    if not zones:
        found.unknown.append("temperature: no thermal zone")
        return
    quarter = max(1, len(seen) // 4)
    drifts = {}
    for zone in sorted(zones):
        early = [s.temperatures[zone] for s in seen[:quarter] if zone in s.temperatures]
        late = [s.temperatures[zone] for s in seen[-quarter:] if zone in s.temperatures]
        drifts[zone] = sum(late) / len(late) - sum(early) / len(early)
    found.figures["temperature_drift"] = drifts
    zone, drift = max(drifts.items(), key=lambda pair: abs(pair[1]))
    if abs(drift) > TEMPERATURE_DRIFT:
        found.reasons.append(
            f"temperature: {zone} drifted by {drift:+.1f} °C during the run, at most "
            f"{TEMPERATURE_DRIFT:g} allowed: warm up longer"
        )


def _clocks(seen: Sequence[HostState], jetson: bool, found: Validity) -> None:
    # The fastest processor of each look: idle ones go down, and may.
    series = {
        "processor": [max(s.mhz) for s in seen if s.mhz],
        "GPU": [s.gpu_mhz for s in seen if s.gpu_mhz is not None],
    }
    if not any(series.values()):
        found.unknown.append("clocks: this machine does not tell them")
    for name, values in series.items():
        if not values:
            continue
        low, high = min(values), max(values)
        found.figures[f"{name}_mhz"] = [low, high]
        if low >= (1 - CLOCK_CHANGE) * high:
            continue
        words = f"clocks: the {name} went between {low:.0f} and {high:.0f} MHz"
        if name == "GPU" and any(s.conditions for s in seen):
            # That is how a board keeps its cap.
            found.conditions.append(words)
            continue
        fix = "fix its frequency or its governor"
        found.reasons.append(f"{words}; {'run: sudo jetson_clocks' if jetson else fix}")
