"""The report of a benchmark: from a finished run to JSON, and from JSON to a table."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgehp import __version__
from edgehp.benchmark.host import HostState, peak_memory_mib
from edgehp.benchmark.lanes import ARTIFACT, REFERENCE, Frames, Turn
from edgehp.benchmark.power.base import Energy, PowerRecorder, energy_over
from edgehp.benchmark.run import END_TO_END, INFERENCE, Measured, Plan
from edgehp.benchmark.stats import PERCENTILES, Latency, speedup, summarize
from edgehp.benchmark.validity import Evidence, assess
from edgehp.crop import Preprocessing
from edgehp.files import finite

SCHEMA_VERSION = 3
# Stages timed on the processor, and those that an engine times by a clock of its own.
_HOST_STAGES = ("preprocessing", "call", "end_to_end")
_ENGINE_STAGES = ("upload", "inference", "download")
STAGES = ("preprocessing", *_ENGINE_STAGES, "decode", "call", "end_to_end")
# Points of a timeline; more are thinned out evenly, since a plot shows no more.
_MOST_POINTS = 2000

_IN_CALL = "the engine does it inside one call; its time is within inference"
_IN_GRAPH = "decoding is part of the deployed graph; its time is within inference"


@dataclass(frozen=True)
class Subject:
    """One network that was measured.

    Attributes:
        described: what is running, for JSON.
        clock: what the engine times the parts of a call with.
        cropping_clock: what cropping was timed with: the engine's clock where it does it.
        tried: throughput by batch size, where the best one was looked for.
    """

    described: Mapping[str, Any]
    clock: str = "host"
    cropping_clock: str = "host"
    tried: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Context:
    """What was measured and with what; everything that is not a figure.

    Attributes:
        plan: what was asked for.
        subjects: role -> network.
        reference_reason: why there is no reference, or None.
        frames: what was looked at.
        preprocessing: of the artifact.
        host: `edgehp.benchmark.host.describe_host` before the run.
        states: of the machine during the run.
        changes: settings that are others after the run than before it.
        recorder: of the meter, None without one.
        power_reason: why there is none.
    """

    plan: Plan
    subjects: Mapping[str, Subject]
    reference_reason: str | None
    frames: Frames
    preprocessing: Preprocessing
    host: Mapping[str, Any]
    states: Sequence[HostState] = ()
    changes: Sequence[str] = ()
    recorder: PowerRecorder | None = None
    power_reason: str | None = None


def assemble(measured: Measured, context: Context) -> dict[str, Any]:
    """The report as a dictionary; its form is ``benchmark-report.schema.json``.

    Its ``roofline`` is empty: whoever has the networks fills it in.
    """
    plan = context.plan
    roles = [r for r in (ARTIFACT, REFERENCE) if r in context.subjects]
    latencies = {role: {s: _latency(measured.of(role), s) for s in STAGES} for role in roles}
    idle = _idle(measured, context.recorder)
    results = {role: _result(role, measured, latencies[role], context, idle) for role in roles}
    headline = None
    if plan.headline is not None:
        headline = (plan.headline, {r: latencies[r]["end_to_end"] for r in roles})
    evidence = Evidence(
        states=context.states,
        window=measured.window,
        processors=os.cpu_count() or 1,
        warm_ups=measured.warm_ups,
        headline=headline,
        changes=context.changes,
        idle=measured.idle,
        jetson=context.host.get("jetson") is not None,
        quota=context.host.get("cpu_quota"),
    )
    validity = assess(evidence)
    report = {
        "kind": "benchmark",
        "schema": SCHEMA_VERSION,
        "edgehp_version": __version__,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "state": "partial" if measured.interrupted else "complete",
        "scenario": {**plan.to_dict(), "slice_s": measured.slice_s, "order": "A B B A"},
        "subjects": {r: dict(context.subjects[r].described) for r in roles},
        "reference_reason": context.reference_reason,
        "input": context.frames.source,
        "preprocessing": {
            "spec": context.preprocessing.to_dict(),
            "digest": context.preprocessing.digest,
        },
        "host": dict(context.host),
        "peak_memory_mib": peak_memory_mib(),
        "warm_up": [asdict(w) for w in measured.warm_ups],
        "results": results,
        "comparison": _comparison(measured, plan),
        "power": _power(context, idle),
        "validity": validity.to_dict(),
        "roofline": {},
        "timeline": _timeline(measured, context),
    }
    found: dict[str, Any] = finite(report)
    return found


def _latency(turns: Sequence[Turn], stage: str) -> Latency | None:
    found = [t.stages[stage] for t in turns if stage in t.stages]
    return summarize(np.concatenate(found)) if found else None


def _result(
    role: str,
    measured: Measured,
    latencies: Mapping[str, Latency | None],
    context: Context,
    idle: Energy | None,
) -> dict[str, Any]:
    turns = measured.of(role)
    seconds = sum(t.seconds for t in turns)
    images = sum(t.images for t in turns)
    absent = {
        stage: _why_absent(stage, context.plan.scenario)
        for stage in STAGES
        if latencies[stage] is None
    }
    clocks = dict.fromkeys(_HOST_STAGES, "host")
    clocks |= dict.fromkeys(_ENGINE_STAGES, context.subjects[role].clock)
    clocks["preprocessing"] = context.subjects[role].cropping_clock
    counts: dict[str, int] = {}
    for turn in turns:
        for name, count in turn.counts.items():
            counts[name] = counts.get(name, 0) + count
    return {
        "turns": len(turns),
        "seconds": seconds,
        "calls": sum(t.calls for t in turns),
        "images": images,
        "images_per_s": images / seconds if seconds > 0 else None,
        "stages": {s: None if v is None else asdict(v) for s, v in latencies.items()},
        "clocks": {s: c for s, c in clocks.items() if latencies[s] is not None},
        "absent": absent,
        "arrived": counts.get("arrived"),
        "late": counts.get("late"),
        "dropped": counts.get("dropped"),
        "offline": _offline(role, measured, context),
        "energy": _energy(turns, images, context, idle),
    }


def _why_absent(stage: str, scenario: str) -> str:
    if scenario == "offline":
        return "offline measures throughput; batches overlap, so that a call has no time of its own"
    if stage == "decode":
        return _IN_GRAPH
    if stage in ("upload", "download"):
        return _IN_CALL
    return "no turn was finished"


def _offline(role: str, measured: Measured, context: Context) -> dict[str, Any] | None:
    if context.plan.scenario != "offline":
        return None

    def rate(mode: str) -> float | None:
        turns = measured.of(role, mode)
        seconds = sum(t.seconds for t in turns)
        return sum(t.images for t in turns) / seconds if seconds > 0 else None

    whole, pure = rate(END_TO_END), rate(INFERENCE)
    # Turn by turn, so that what the machine does to both cancels.
    turns = (measured.of(role, END_TO_END), measured.of(role, INFERENCE))
    paired = speedup(*turns, "images_per_s")
    return {
        "batch": context.subjects[role].described["batch"],
        "tried": [dict(t) for t in context.subjects[role].tried],
        "end_to_end_images_per_s": whole,
        "inference_images_per_s": pure,
        "overlap": whole / pure if whole and pure else None,
        "overlap_low": None if paired is None else paired.low,
        "overlap_high": None if paired is None else paired.high,
    }


def _comparison(measured: Measured, plan: Plan) -> list[dict[str, Any]]:
    pairs: list[tuple[str, str]]
    if plan.scenario == "offline":
        pairs = [(END_TO_END, "images_per_s"), (INFERENCE, "images_per_s")]
    else:
        pairs = [(END_TO_END, "inference"), (END_TO_END, "end_to_end")]
    found = []
    for mode, stage in pairs:
        result = speedup(measured.of(ARTIFACT, mode), measured.of(REFERENCE, mode), stage)
        if result is not None:
            found.append({"mode": mode, "stage": stage, **asdict(result)})
    return found


def _idle(measured: Measured, power: PowerRecorder | None) -> Energy | None:
    if power is None or measured.idle is None:
        return None
    return energy_over(power.info, power.samples, [measured.idle])


def _energy(
    turns: Sequence[Turn], images: int, context: Context, idle: Energy | None
) -> dict[str, Any] | None:
    """Gross energy of the lane's turns, and net of what the idle machine takes."""
    power = context.recorder
    if power is None or not turns:
        return None
    gross = energy_over(power.info, power.samples, [(t.start, t.end) for t in turns])
    net: dict[str, float | None] = {}
    idle_watts = idle.watts() if idle is not None else {}
    for rail, joules in gross.joules.items():
        resting = idle_watts.get(rail)
        net[rail] = None if joules is None or resting is None else joules - resting * gross.seconds
    return {
        **gross.to_dict(),
        "net_joules": net,
        "joules_per_image": {k: _per(v, images) for k, v in gross.joules.items()},
        "net_joules_per_image": {k: _per(v, images) for k, v in net.items()},
    }


def _per(joules: float | None, images: int) -> float | None:
    return joules / images if joules is not None and images else None


def _power(context: Context, idle: Energy | None) -> dict[str, Any]:
    power, reason = context.recorder, context.power_reason
    if power is not None and power.failure is not None:
        reason = power.failure
    return {
        "meter": None if power is None else power.info.to_dict(),
        "reason": reason,
        "idle": None if idle is None else idle.to_dict(),
    }


def _timeline(measured: Measured, context: Context) -> dict[str, Any]:
    """Times in seconds from the start of the measured window."""
    zero = measured.window[0]
    turns = []
    for turn in measured.turns:
        row: dict[str, Any] = {
            "role": turn.role,
            "mode": turn.mode,
            "start": turn.start - zero,
            "end": turn.end - zero,
            "images": turn.images,
        }
        values = turn.stages.get("end_to_end")
        if values is not None and values.size:
            p50, p99 = np.percentile(values, (50, 99))
            row.update(
                p50_ms=float(p50) * 1e3, p99_ms=float(p99) * 1e3, max_ms=float(values.max()) * 1e3
            )
        turns.append(row)
    samples = [] if context.recorder is None else context.recorder.samples
    return {
        "started": measured.wall + zero,
        "idle": None if measured.idle is None else [t - zero for t in measured.idle],
        "turns": turns,
        "power": [{"time": s.time - zero, "values": dict(s.values)} for s in _thin(samples)],
        "host": [{**s.to_dict(), "time": s.time - zero} for s in _thin(context.states)],
    }


def _thin(items: Sequence[Any]) -> Sequence[Any]:
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


def summary_rows(report: Mapping[str, Any]) -> Table:
    """One row a network and stage: count, percentiles, the slowest, and images a second."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    scenario = report["scenario"]
    for role, result in report["results"].items():
        offline = result["offline"]
        if offline is not None:
            nothing = ("-",) * (len(PERCENTILES) + 2)
            for title, key in (
                ("end to end", "end_to_end_images_per_s"),
                ("inference only", "inference_images_per_s"),
            ):
                rows.append((f"{role} {title}", *nothing, number(offline[key], 4)))
            if offline["overlap"] is not None:
                span = ""
                if offline.get("overlap_low") is not None:
                    low, high = offline["overlap_low"], offline["overlap_high"]
                    span = f" (95 % interval {low:.1%} to {high:.1%})"
                notes.append(
                    f"{role}: batch {offline['batch']}; cropping beside inference keeps "
                    f"{offline['overlap']:.1%} of the pure inference rate{span}"
                )
            continue
        for stage, title in (
            ("end_to_end", "end to end"),
            ("preprocessing", "crop + resize"),
            ("upload", "upload"),
            ("inference", "inference"),
            ("download", "download"),
        ):
            latency = result["stages"][stage]
            # On the processor handing over is no transfer: microseconds, in the JSON.
            moved = stage in ("upload", "download")
            if latency is None or (moved and result.get("clocks", {}).get(stage) == "host"):
                continue
            at = {q["p"]: q for q in latency["percentiles"]}
            rate = number(result["images_per_s"], 4) if stage == "end_to_end" else ""
            rows.append(
                (f"{role} {title}", str(latency["count"]),
                 *(number(at[p]["ms"]) + ("" if at[p]["enough"] else "?") for p in PERCENTILES),
                 number(latency["max_ms"]), rate)
            )  # fmt: skip
        if result["arrived"] is not None:
            notes.append(
                f"{role}: of {result['arrived']} frames {result['late']} late, "
                f"{result['dropped']} dropped"
            )
    if any("?" in cell for row in rows for cell in row):
        notes.append("?: the sample is too small for a 99 % bound on this percentile")
    for found in report["comparison"]:
        interval = ""
        if found["low"] is not None:
            interval = f" (95 % interval {found['low']:.2f} to {found['high']:.2f})"
        ready = " of crops that were ready" if found["mode"] == INFERENCE else ""
        notes.append(
            f"artifact is {found['ratio']:.2f} times as fast as the reference by "
            f"{found['metric'].replace('_', ' ')}{ready}{interval}"
        )
    if report["reference_reason"]:
        notes.append(f"no reference: {report['reference_reason']}")
    details = report["subjects"]["artifact"]["engine"].get("details", {})
    if "cuda_package" in details:
        notes.append(
            f"faces are cropped {details['cropping']}; the processor waits for the GPU: "
            f"{details['spin_wait']}"
        )
    notes += _power_notes(report)
    if report["state"] == "partial":
        notes.append("PARTIAL: the run was interrupted")
    notes += [f"condition: {text}" for text in report["validity"]["conditions"]]
    threads = report["subjects"]["artifact"]["engine"]["threads"]
    names = [subject["name"] for subject in report["subjects"].values()]
    title = (
        f"{' against '.join(names)}, {scenario['duration_s']:g} s a network, "
        f"{threads or 'unknown number of'} thread{'' if threads == 1 else 's'}"
    )
    percentiles = (f"p{p:g}" for p in PERCENTILES)
    headers = ("milliseconds", "count", *percentiles, "max", "images/s")
    return Table(title, headers, tuple(rows), tuple(notes))


def _power_notes(report: Mapping[str, Any]) -> list[str]:
    power = report["power"]
    if power["reason"] is not None:
        return [f"power: not measured: {power['reason']}"]
    notes = []
    for role, result in report["results"].items():
        energy = result["energy"]
        if energy is None:
            continue
        for rail, joules in energy["joules_per_image"].items():
            if joules is None:
                notes.append(
                    f"power of {role}, {rail}: not measured: {energy['reasons'].get(rail)}"
                )
                continue
            net = energy["net_joules_per_image"].get(rail)
            notes.append(
                f"power of {role}, {rail}: {number(energy['watts'][rail])} W, "
                f"{number(joules * 1e3)} mJ an image"
                + ("" if net is None else f" ({number(net * 1e3)} mJ net of idle)")
            )
    return notes
