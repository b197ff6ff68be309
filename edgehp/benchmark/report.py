"""The report of a benchmark: its form, how a run becomes one, and its table.

`BenchmarkReport` and its parts are the only description of ``bench-*.json``: writing, reading and
the published JSON Schema (`report_schema`) follow from them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from edgehp import __version__
from edgehp.artifact.manifest import PreprocessingRecord
from edgehp.benchmark.host import HostState, peak_memory_mib
from edgehp.benchmark.lanes import ARTIFACT, REFERENCE, Subject, Turn, WarmUp
from edgehp.benchmark.power.base import Energy, MeterInfo, PowerRecorder, Sample, energy_over
from edgehp.benchmark.roofline import Roofline
from edgehp.benchmark.run import INFERENCE, Measured, Plan
from edgehp.benchmark.stats import PERCENTILES, Latency, Speedup, speedup, summarize
from edgehp.benchmark.validity import Evidence, Validity, assess
from edgehp.crop import Preprocessing
from edgehp.files import Record, finite, now

SCHEMA_VERSION = 4
STAGES = ("preprocessing", "upload", "inference", "download", "decode", "call", "end_to_end")
# Points of a timeline; more are thinned out evenly, since a plot shows no more.
_MOST_POINTS = 2000

_IN_CALL = "the engine does it inside one call; its time is within inference"
_IN_GRAPH = "decoding is part of the deployed graph; its time is within inference"
_OFFLINE = "offline measures throughput; batches overlap, so that a call has no time of its own"
_T = TypeVar("_T")


class Offline(Record, frozen=True):
    """The scenario ``offline``: with crops made beforehand, and what cropping leaves of that.

    Attributes:
        inference_images_per_s: on crops that were ready.
        overlap: images a second end to end over the former.
        overlap_low: lower end of its 95 % interval over pairs of turns.
        overlap_high: the upper end.
    """

    inference_images_per_s: float | None
    overlap: float | None
    overlap_low: float | None
    overlap_high: float | None


class LaneEnergy(Energy, frozen=True):
    """Energy over the turns of a network, gross; `net_joules_per_image` without the idle power."""

    joules_per_image: dict[str, float | None]
    net_joules_per_image: dict[str, float | None]


class Result(Record, frozen=True, kw_only=True):
    """What one network did, end to end.

    Attributes:
        turns: how often it had its turn.
        seconds: of all of them.
        calls: of the engine.
        images: answered.
        images_per_s: over the seconds.
        stages: latency by stage; null where a stage has none.
        absent: why a stage is null.
        arrived: frames, of ``multi-camera``.
        late: frames answered after more than a frame's time.
        dropped: frames that a newer one of their camera replaced.
        offline: of that scenario.
        energy: null without a meter.
    """

    turns: int
    seconds: float
    calls: int
    images: int
    images_per_s: float | None
    stages: dict[str, Latency | None]
    absent: dict[str, str]
    arrived: int | None
    late: int | None
    dropped: int | None
    offline: Offline | None
    energy: LaneEnergy | None


class Power(Record, frozen=True):
    """The meter, why there are no figures of it, and what the idle machine takes."""

    meter: MeterInfo | None
    reason: str | None
    idle: Energy | None


class TurnPoint(Record, frozen=True):
    """A turn of a network; without milliseconds where calls have no time of their own."""

    role: str
    mode: str
    start: float
    end: float
    images: int
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None


class HostPoint(Record, frozen=True):
    """The machine at a time; `mhz` is the clock of its fastest processor, `gpu_load` 0..1."""

    time: float
    temperatures: dict[str, float]
    mhz: float | None
    gpu_mhz: float | None
    gpu_load: float | None
    reasons: tuple[str, ...]


class Timeline(Record, frozen=True):
    """What happened when, in seconds from the start of the measurement."""

    turns: tuple[TurnPoint, ...]
    power: tuple[Sample, ...]
    host: tuple[HostPoint, ...]


class BenchmarkReport(Record, frozen=True, kw_only=True):
    """One benchmark: times in seconds or, where the name ends in ``_ms``, milliseconds.

    Whatever could not be measured is null, with a reason beside it.

    Attributes:
        created: UTC.
        state: ``"partial"``: interrupted, what was finished is here.
        scenario: what was asked for.
        subjects: the networks that took turns, by role.
        reference_reason: why the artifact was measured alone.
        input: the frames, for people.
        preprocessing: of the artifact.
        host: processor, clocks, governor, power mode, versions.
        peak_memory_mib: the most memory that the process held.
        warm_up: of each network.
        results: by role.
        comparison: how many times faster the artifact is than the reference.
        power: the meter.
        validity: whether the run can be believed.
        timeline: turn by turn.
        roofline: by role.
    """

    kind: Literal["benchmark"] = "benchmark"
    schema: Literal[4] = 4
    edgehp_version: str = __version__
    created: str
    state: Literal["complete", "partial"]
    scenario: Plan
    subjects: dict[str, Subject]
    reference_reason: str | None
    input: str
    preprocessing: PreprocessingRecord
    host: dict[str, Any]
    peak_memory_mib: float
    warm_up: tuple[WarmUp, ...]
    results: dict[str, Result]
    comparison: tuple[Speedup, ...]
    power: Power
    validity: Validity
    timeline: Timeline
    roofline: dict[str, Roofline]

    def __post_init__(self) -> None:
        """Refuse a report without its artifact, or with other stages than all."""
        for key, roles in (("subjects", self.subjects), ("results", self.results)):
            if "artifact" not in roles:
                raise ValueError(f"key '{key}' has no 'artifact'")
        for role, result in self.results.items():
            if role not in self.subjects or set(result.stages) != set(STAGES):
                raise ValueError(f"key 'results.{role}' has other stages than {', '.join(STAGES)}")

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds, numbers of numpy as plain ones; one that is not finite becomes null."""
        values: dict[str, Any] = finite(msgspec.to_builtins(self, str_keys=True, enc_hook=float))
        return values


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgehp benchmark report",
        **msgspec.json.schema(BenchmarkReport),
    }


@dataclass(frozen=True)
class Context:
    """What was measured and with what; everything that is not a figure.

    Attributes:
        plan: what was asked for.
        subjects: role -> network.
        reference_reason: why there is no reference, or None.
        source: what was looked at.
        preprocessing: of the artifact.
        host: `edgehp.benchmark.host.describe_host` before the run.
        recorder: of the meter, None without one.
        power_reason: why there is none.
    """

    plan: Plan
    subjects: Mapping[str, Subject]
    reference_reason: str | None
    source: str
    preprocessing: Preprocessing
    host: Mapping[str, Any]
    recorder: PowerRecorder | None = None
    power_reason: str | None = None


def assemble(
    measured: Measured,
    context: Context,
    states: Sequence[HostState] = (),
    changes: Sequence[str] = (),
) -> BenchmarkReport:
    """The report, but for the roofline, which whoever has the networks adds.

    Args:
        measured: the run.
        context: what was run.
        states: of the machine during the run.
        changes: settings that are others after the run than before it.
    """
    plan, power, host = context.plan, context.recorder, context.host
    idle = None
    if power is not None and measured.idle is not None:
        idle = energy_over(power.info, power.samples, [measured.idle])
    results = {role: _result(role, measured, context, idle) for role in context.subjects}
    headline = None
    if plan.headline is not None:
        headline = (plan.headline, {r: v.stages["end_to_end"] for r, v in results.items()})
    validity = assess(
        Evidence(
            states=states,
            window=measured.window,
            processors=os.cpu_count() or 1,
            warm_ups=measured.warm_ups,
            headline=headline,
            changes=changes,
            idle=measured.idle,
            jetson=host.get("jetson") is not None,
            quota=host.get("cpu_quota"),
        )
    )
    stages = ("images_per_s",) if plan.scenario == "offline" else ("inference", "end_to_end")
    compared = [
        speedup(measured.of(ARTIFACT, mode), measured.of(REFERENCE, mode), stage)
        for mode in plan.modes
        for stage in stages
    ]
    return BenchmarkReport(
        created=now(),
        state="partial" if measured.interrupted else "complete",
        scenario=plan,
        subjects=dict(context.subjects),
        reference_reason=context.reference_reason,
        input=context.source,
        preprocessing=PreprocessingRecord(context.preprocessing, context.preprocessing.digest),
        host=dict(host),
        peak_memory_mib=peak_memory_mib(),
        warm_up=measured.warm_ups,
        results=results,
        comparison=tuple(c for c in compared if c is not None),
        power=Power(
            None if power is None else power.info,
            context.power_reason if power is None else power.failure,
            idle,
        ),
        validity=validity,
        timeline=_timeline(measured, power, states),
        roofline={},
    )


def _result(role: str, measured: Measured, context: Context, idle: Energy | None) -> Result:
    turns = measured.of(role)
    seconds, images, rate = _rate(turns)
    stages = {}
    for stage in STAGES:
        found = [t.stages[stage] for t in turns if stage in t.stages]
        stages[stage] = summarize(np.concatenate(found)) if found else None
    offline = None
    if context.plan.scenario == "offline":
        absent = dict.fromkeys(STAGES, _OFFLINE)
        ready = measured.of(role, INFERENCE)
        pure = _rate(ready)[2]
        # Turn by turn, so that what the machine does to both cancels.
        paired = speedup(turns, ready, "images_per_s")
        offline = Offline(
            pure,
            rate / pure if rate and pure else None,
            None if paired is None else paired.low,
            None if paired is None else paired.high,
        )
    else:
        absent = dict.fromkeys(STAGES, "no turn was finished")
        absent |= {"upload": _IN_CALL, "download": _IN_CALL, "decode": _IN_GRAPH}
    counts: Counter[str] = Counter()
    for turn in turns:
        counts.update(turn.counts)
    return Result(
        turns=len(turns),
        seconds=seconds,
        calls=sum(t.calls for t in turns),
        images=images,
        images_per_s=rate,
        stages=stages,
        absent={s: why for s, why in absent.items() if stages[s] is None},
        **{n: counts.get(n) for n in ("arrived", "late", "dropped")},
        offline=offline,
        energy=_energy(turns, images, context.recorder, idle),
    )


def _rate(turns: Sequence[Turn]) -> tuple[float, int, float | None]:
    """Seconds, images, and images a second."""
    seconds, images = sum(t.seconds for t in turns), sum(t.images for t in turns)
    return seconds, images, images / seconds if seconds > 0 else None


def _energy(
    turns: Sequence[Turn], images: int, power: PowerRecorder | None, idle: Energy | None
) -> LaneEnergy | None:
    """Gross energy of the lane's turns, and net of what the idle machine takes."""
    if power is None or not turns:
        return None
    found = energy_over(power.info, power.samples, [(t.start, t.end) for t in turns])
    gross: dict[str, float | None] = dict.fromkeys(found.joules)
    net = dict(gross)
    for rail, joules in found.joules.items():
        resting = None if idle is None else idle.watts.get(rail)
        if joules is not None and images:
            gross[rail] = joules / images
            if resting is not None:
                net[rail] = (joules - resting * found.seconds) / images
    return LaneEnergy(found.seconds, found.joules, found.watts, found.reasons, gross, net)


def _timeline(
    measured: Measured, power: PowerRecorder | None, states: Sequence[HostState]
) -> Timeline:
    zero = measured.window[0]
    turns = []
    for turn in measured.turns:
        values = turn.stages.get("end_to_end")
        shown: tuple[float, ...] = ()
        if values is not None and values.size:
            shown = tuple(float(v) * 1e3 for v in (*np.percentile(values, (50, 99)), values.max()))
        start, end = turn.start - zero, turn.end - zero
        turns.append(TurnPoint(turn.role, turn.mode, start, end, turn.images, *shown))
    host = tuple(
        HostPoint(
            s.time - zero,
            s.temperatures,
            max(s.mhz, default=None),
            s.gpu_mhz,
            s.gpu_load,
            s.reasons,
        )
        for s in _thin(states)
    )
    samples = () if power is None else power.samples
    return Timeline(
        tuple(turns), tuple(Sample(s.time - zero, s.values) for s in _thin(samples)), host
    )


def _thin(items: Sequence[_T]) -> Sequence[_T]:
    if len(items) <= _MOST_POINTS:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, _MOST_POINTS)]


@dataclass(frozen=True)
class Table:
    """Rows under headers, with a title before and sentences after them."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def number(value: float | None, digits: int = 3) -> str:
    """A figure with `digits` significant digits, thousands not in exponents; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percentile_cells(latency: Latency, percentiles: Sequence[float] = PERCENTILES) -> list[str]:
    """Milliseconds at each percentile, marked where the sample is too small, and the slowest."""
    at = [latency.at(p) for p in percentiles]
    return [*(number(q.ms) + "?" * (q.bound_ms is None) for q in at), number(latency.max_ms)]


def summary_rows(report: BenchmarkReport) -> Table:
    """One row a network and stage: count, percentiles, the slowest, and images a second."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for role, result in report.results.items():
        if (offline := result.offline) is not None:
            nothing = ("-",) * (len(PERCENTILES) + 2)
            rows += [
                (f"{role} end to end", *nothing, number(result.images_per_s, 4)),
                (f"{role} inference only", *nothing, number(offline.inference_images_per_s, 4)),
            ]
            if offline.overlap is not None:
                span = ""
                if offline.overlap_low is not None:
                    low, high = offline.overlap_low, offline.overlap_high
                    span = f" (95 % interval {low:.1%} to {high:.1%})"
                notes.append(
                    f"{role}: batch {report.subjects[role].batch}; cropping beside inference "
                    f"keeps {offline.overlap:.1%} of the pure inference rate{span}"
                )
            continue
        for stage, title in (
            ("end_to_end", "end to end"),
            ("preprocessing", "crop + resize"),
            ("upload", "upload"),
            ("inference", "inference"),
            ("download", "download"),
        ):
            latency = result.stages[stage]
            # On the processor handing over is no transfer: microseconds, in the JSON.
            moved = stage in ("upload", "download")
            if latency is None or (moved and report.subjects[role].clock == "host"):
                continue
            rate = number(result.images_per_s, 4) if stage == "end_to_end" else ""
            rows.append((f"{role} {title}", str(latency.count), *percentile_cells(latency), rate))
        if result.arrived is not None:
            notes.append(
                f"{role}: of {result.arrived} frames {result.late} late, {result.dropped} dropped"
            )
    if any("?" in cell for row in rows for cell in row):
        notes.append("?: the sample is too small for a 99 % bound on this percentile")
    for found in report.comparison:
        interval = ""
        if found.low is not None:
            interval = f" (95 % interval {found.low:.2f} to {found.high:.2f})"
        ready = " of crops that were ready" if found.mode == INFERENCE else ""
        metric = "images per second" if found.stage == "images_per_s" else f"median {found.stage}"
        notes.append(
            f"artifact is {found.ratio:.2f} times as fast as the reference by "
            f"{metric.replace('_', ' ')}{ready}{interval}"
        )
    if report.reference_reason:
        notes.append(f"no reference: {report.reference_reason}")
    engine = report.subjects[ARTIFACT].engine
    if "cuda_package" in engine.details:
        notes.append(
            f"faces are cropped {engine.details['cropping']}; the processor waits for the GPU: "
            f"{engine.details['spin_wait']}"
        )
    notes += _power_notes(report)
    if report.state == "partial":
        notes.append("PARTIAL: the run was interrupted")
    notes += [f"condition: {text}" for text in report.validity.conditions]
    title = (
        f"{' against '.join(s.name for s in report.subjects.values())}, "
        f"{report.scenario.duration_s:g} s a network, "
        f"{engine.threads or 'unknown number of'} thread{'' if engine.threads == 1 else 's'}"
    )
    headers = ("milliseconds", "count", *(f"p{p:g}" for p in PERCENTILES), "max", "images/s")
    return Table(title, headers, tuple(rows), tuple(notes))


def _power_notes(report: BenchmarkReport) -> list[str]:
    if report.power.reason is not None:
        return [f"power: not measured: {report.power.reason}"]
    notes = []
    for role, result in report.results.items():
        if (energy := result.energy) is None:
            continue
        for rail, joules in energy.joules_per_image.items():
            if joules is None:
                notes.append(f"power of {role}, {rail}: not measured: {energy.reasons.get(rail)}")
                continue
            net = energy.net_joules_per_image[rail]
            notes.append(
                f"power of {role}, {rail}: {number(energy.watts[rail])} W, "
                f"{number(joules * 1e3)} mJ an image"
                + ("" if net is None else f" ({number(net * 1e3)} mJ net of idle)")
            )
    return notes
