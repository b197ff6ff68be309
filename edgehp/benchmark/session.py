"""Open what is to be measured, measure it, and close it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgehp.artifact import verify_golden
from edgehp.artifact.open import OpenedNetwork, open_artifact, open_reference
from edgehp.benchmark.host import HostWatch, Recorder, changed_settings, describe_host
from edgehp.benchmark.lanes import (
    ARTIFACT,
    REFERENCE,
    Frames,
    Lane,
    camera_frames,
    describe,
    photo_frames,
)
from edgehp.benchmark.power import open_meter
from edgehp.benchmark.power.base import PowerRecorder
from edgehp.benchmark.power.nvml import open_gpu_state
from edgehp.benchmark.report import BenchmarkReport, Context, assemble
from edgehp.benchmark.roofline import Roofline, measure_peaks, roofline_of
from edgehp.benchmark.run import (
    Plan,
    Progress,
    largest_useful_batch,
    measure,
    slice_seconds,
)
from edgehp.engines import PROCESSOR_ENGINES
from edgehp.errors import EdgehpError, MeasurementError, UsageError

logger = logging.getLogger(__name__)

AGAINST_FP32, AGAINST_NONE = "fp32", "none"
# Batches of processors gain nothing beyond; GPUs are limited by the engine itself.
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        plan: how.
        artifact: directory, None for the newest under ``dist``.
        against: another artifact, `AGAINST_FP32` for the artifact's own FP32 network,
            `AGAINST_NONE`, or None: FP32 where it can be had.
        frames: folder or zip of faces, None for frames around the artifact's golden crops.
        meter: ``"auto"``, ``"none"``, a meter's name, ``"csv:FILE"`` or ``"command:COMMAND"``.
        require_power: fail where no energy can be stated.
        photo_depth: significant bits of `frames` with 16 bits a sample.
    """

    plan: Plan
    artifact: Path | None = None
    against: str | None = None
    frames: Path | None = None
    meter: str = "auto"
    require_power: bool = False
    photo_depth: int | None = None


class _Opened(NamedTuple):
    """What a benchmark runs on; the caller's `ExitStack` closes it."""

    context: Context
    lanes: Sequence[Lane]
    networks: Mapping[str, OpenedNetwork]


def benchmark(
    request: Request,
    progress: Callable[[PowerRecorder | None, HostWatch], Progress] | None = None,
) -> BenchmarkReport:
    """Run one benchmark.

    Args:
        request: what to measure.
        progress: makes of the recorders what is told after every turn.

    Raises:
        DataError, CompatibilityError, EnvironmentalError: the artifact cannot be opened here.
        MeasurementError: power was required and is not available.
        UsageError: the request makes no sense.
    """
    with ExitStack() as stack:
        context, lanes, networks = _open(request, stack)
        processor = networks[ARTIFACT].engine.info.kind in PROCESSOR_ENGINES
        gpu = None if processor else open_gpu_state()
        watch = HostWatch(None if gpu is None else gpu.fill)
        recorder = context.recorder
        recorders: list[Recorder] = [watch] if recorder is None else [watch, recorder]
        measured = measure(
            context.plan,
            lanes,
            recorders,
            measure_idle=recorder is not None,
            progress=None if progress is None else progress(recorder, watch),
        )
        changes = changed_settings(context.host, describe_host())
        report = assemble(measured, context, watch.states, changes)
        roofline = _rooflines(networks, report)
    if request.require_power:
        _require_energy(report)
    return msgspec.structs.replace(report, roofline=roofline)


def _open(request: Request, stack: ExitStack) -> _Opened:
    plan = request.plan
    # First, since it costs little and a mistyped folder should not cost the opening of networks.
    photos = photo_frames(request.frames, request.photo_depth) if request.frames else None
    batch = plan.batch or 1
    opened = stack.enter_context(
        open_artifact(request.artifact, threads=plan.threads, batch=batch, wait=plan.wait)
    )
    found = opened.artifact
    if found is None:
        raise UsageError("only an artifact can be measured")
    verify_golden(found, opened.engine)
    meter, reason = open_meter(request.meter, found.engine.kind)
    period, recorder = None, None
    if meter is not None:
        stack.callback(meter.close)
        period, recorder = meter.info.period_s, PowerRecorder(meter)
    elif request.require_power:
        raise MeasurementError(
            f"power was required and cannot be measured: {reason}\n"
            "hint: leave out --require-power, or name a meter with --power"
        )
    other, other_reason = _other(request, opened, stack, batch)
    frames = camera_frames(found) if photos is None else photos
    networks = {ARTIFACT: opened} | ({REFERENCE: other} if other else {})
    lanes = _lanes(plan, networks, frames)
    context = Context(
        plan=replace(plan, slice_s=slice_seconds(plan.duration_s, plan.scenario, period)),
        subjects={x.role: describe(networks[x.role], x.batch, x.tried) for x in lanes},
        reference_reason=other_reason,
        source=frames.source,
        preprocessing=opened.preprocessing,
        host=describe_host(),
        recorder=recorder,
        power_reason=reason,
    )
    return _Opened(context, lanes, networks)


def _rooflines(
    networks: Mapping[str, OpenedNetwork], report: BenchmarkReport
) -> dict[str, Roofline]:
    """The roofline of each network, with the peaks of this processor where they count."""
    engine = networks[ARTIFACT].engine
    # An engine that runs elsewhere has its peaks from the target's data alone, and who interrupted
    # a run does not wait for more.
    peaks = None
    if engine.info.kind in PROCESSOR_ENGINES and report.state == "complete":
        # As careful as the run itself: one of a second is no figure for a review anyway.
        seconds = min(0.5, report.scenario.duration_s / 60)
        peaks = partial(measure_peaks, threads=engine.info.threads, seconds=seconds)
    return {
        role: roofline_of(network, report.results[role], report.host["power_mode"], peaks)
        for role, network in networks.items()
    }


def _other(
    request: Request, opened: OpenedNetwork, stack: ExitStack, batch: int
) -> tuple[OpenedNetwork | None, str | None]:
    """What the artifact is measured against, or why it is measured alone."""
    threads = request.plan.threads
    if request.against == AGAINST_NONE:
        return None, "measured alone, as asked for"
    if request.against not in (None, AGAINST_FP32):
        other = open_artifact(
            Path(str(request.against)), threads=threads, batch=batch, wait=request.plan.wait
        )
        stack.enter_context(other)
        if other.engine.input_size != opened.engine.input_size:
            logger.warning(
                "the networks have inputs of %d and %d pixels: the ratio is between networks, "
                "not between precisions",
                opened.engine.input_size,
                other.engine.input_size,
            )
        return other, None
    kind = opened.engine.info.kind
    if kind not in PROCESSOR_ENGINES:
        reason = (
            f"FP32 on {kind} needs an engine of its own: build it with --precision fp32 and give "
            "it with --against"
        )
        if request.against == AGAINST_FP32:
            raise UsageError(reason)
        return None, reason
    try:
        reference = open_reference(opened, threads=threads, batch=batch)
    except (EdgehpError, ModuleNotFoundError) as e:
        if request.against == AGAINST_FP32:
            raise
        # Not asked for, so not an error; but never left unsaid.
        logger.warning("measured without an FP32 reference: %s", e)
        return None, str(e)
    return stack.enter_context(reference), None


def _lanes(plan: Plan, networks: dict[str, OpenedNetwork], frames: Frames) -> list[Lane]:
    lanes: list[Lane] = []
    for role, network in networks.items():
        lane = Lane.of(role, network.engine, network.preprocessing, frames, plan.batch or 1)
        most = _LARGEST_BATCH
        if network.artifact is not None and network.engine.info.kind not in PROCESSOR_ENGINES:
            most = network.artifact.engine.max_batch
        if lane.batch > most:
            raise UsageError(f"batch {lane.batch}: the engine takes at most {most}")
        if plan.scenario == "offline" and plan.batch is None:
            seconds = min(1.0, max(0.2, plan.duration_s / 20))
            batch, tried = largest_useful_batch(lane, most, seconds)
            lane = replace(lane, batch=batch, tried=tried)
        elif plan.scenario == "multi-camera" and plan.batch is None:
            lane = replace(lane, batch=min(plan.cameras, most))
        lanes.append(lane)
    return lanes


def _require_energy(report: BenchmarkReport) -> None:
    for role, result in report.results.items():
        energy = result.energy
        if energy is None or not any(v is not None for v in energy.joules.values()):
            reasons = {} if energy is None else energy.reasons
            why = report.power.reason or "; ".join(f"{k}: {v}" for k, v in reasons.items())
            raise MeasurementError(
                f"power was required, but the energy of the {role} is not known: {why}"
            )
