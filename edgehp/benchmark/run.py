"""One benchmark from warm-up to the last turn, the networks taking turns in one run."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from edgehp.benchmark.lanes import Lane, Turn, WarmUp, warm_up
from edgehp.benchmark.plan import Plan
from edgehp.benchmark.scenarios import END_TO_END, INFERENCE, run_turn

__all__ = ["Measured", "Progress", "Recorder", "measure"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        phase: ``"idle"``, ``"warm-up"`` or ``"measure"``.
        role: of the lane that runs, or ran last.
        fraction: of the measured time that is done, 0..1.
        p50: seconds, of the last turn; None where it has no latencies.
        p99: the same.
        images_per_s: of the last turn.
    """

    phase: str
    role: str = ""
    fraction: float = 0.0
    p50: float | None = None
    p99: float | None = None
    images_per_s: float | None = None


class Recorder(Protocol):
    """Something that samples in the background during a run (power, temperature, load)."""

    def start(self) -> None:
        """Begin to sample."""

    def stop(self) -> None:
        """End sampling; calling it again does nothing."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a run gave.

    Attributes:
        warm_ups: one a lane.
        turns: in the order they were taken.
        idle: start and end of the idle period before, monotonic seconds; None without one.
        window: start and end of the measured time.
        interrupted: whether the user stopped it.
        slice_s: the length of a turn that was asked for.
        wall: what to add to the monotonic clock for seconds since 1970.
    """

    warm_ups: tuple[WarmUp, ...]
    turns: tuple[Turn, ...]
    idle: tuple[float, float] | None
    window: tuple[float, float]
    interrupted: bool
    slice_s: float
    wall: float

    def of(self, role: str, mode: str = END_TO_END) -> tuple[Turn, ...]:
        """The turns of one lane in one mode."""
        return tuple(t for t in self.turns if t.role == role and t.mode == mode)


def measure(
    plan: Plan,
    lanes: Sequence[Lane],
    recorders: Sequence[Recorder] = (),
    *,
    measure_idle: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Measured:
    """Measure the lanes in turns, A B B A, until each has run for the plan's duration.

    An interruption (Ctrl-C) ends the run cleanly: finished turns are kept and the result says so.

    Args:
        plan: what to do; its `slice_s` is the length of a turn.
        lanes: one or two networks.
        recorders: started before anything runs and stopped after everything has.
        measure_idle: wait for the plan's `idle_s` first, doing nothing.
        progress: told after every step.

    Raises:
        EnvironmentalError: an engine failed.
    """
    tell = progress or (lambda _: None)
    modes = (END_TO_END, INFERENCE) if plan.scenario == "offline" else (END_TO_END,)
    tracks = [(lane, mode) for lane in lanes for mode in modes]
    left = {(lane.role, mode): plan.duration_s / len(modes) for lane, mode in tracks}
    turns: list[Turn] = []
    warm_ups: list[WarmUp] = []
    idle: tuple[float, float] | None = None
    interrupted = False
    wall = time.time() - perf_counter()
    for recorder in recorders:
        recorder.start()
    begun = perf_counter()
    try:
        if measure_idle and plan.idle_s > 0:
            tell(Progress("idle"))
            # A sample before the idle time begins, as its edge.
            _settle(recorders)
            at = perf_counter()
            time.sleep(plan.idle_s)
            idle = (at, perf_counter())
        for lane in lanes:
            tell(Progress("warm-up", lane.role))
            # Cameras that happen to wait together share a call: any number of them.
            cameras = plan.scenario == "multi-camera"
            warm_ups.append(warm_up(lane, plan.warm_up_s, smaller=cameras))
        begun = perf_counter()
        forward = True
        with _no_collections():
            while any(seconds > 0 for seconds in left.values()):
                for lane, mode in tracks if forward else reversed(tracks):
                    turn = run_turn(plan, lane, mode, plan.slice_s)
                    turns.append(turn)
                    logger.info("turn %d: %s, %d images", len(turns), turn.role, turn.images)
                    left[lane.role, mode] -= turn.seconds
                    done = 1 - max(max(left.values()), 0) * len(modes) / plan.duration_s
                    tell(_progress(turn, done))
                forward = not forward
                # Between turns, where it costs nobody's latency.
                gc.collect(0)
    except KeyboardInterrupt:
        interrupted = True
        logger.warning("interrupted; what was measured until now is kept")
    finally:
        # The meters need a sample behind the end of the window.
        _settle(recorders)
        for recorder in recorders:
            recorder.stop()
    end = turns[-1].end if turns else perf_counter()
    start = turns[0].start if turns else begun
    return Measured(
        tuple(warm_ups), tuple(turns), idle, (start, end), interrupted, plan.slice_s, wall
    )


def _settle(recorders: Sequence[Recorder]) -> None:
    period = max((getattr(r, "period_s", 0.0) for r in recorders), default=0.0)
    if period:
        time.sleep(min(2.5 * period, 5.0))


def _progress(turn: Turn, fraction: float) -> Progress:
    latencies = turn.stages.get("end_to_end")
    p50 = p99 = None
    if latencies is not None and latencies.size:
        p50, p99 = (float(v) for v in np.percentile(latencies, (50, 99)))
    return Progress(
        "measure", turn.role, min(max(fraction, 0.0), 1.0), p50, p99, turn.images / turn.seconds
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    """No garbage collection inside: a pause of Python's is not one of the network's."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
