"""One benchmark from what is asked for to the last turn, the networks taking turns in one run.

The scenarios follow MLPerf Inference. ``single-stream``: the next frame starts when the last one is
answered. ``offline``: all frames are there; cropping runs in threads beside inference.
``multi-camera``: frames arrive on a clock, whether or not the engine is ready for them.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeVar

import numpy as np

from edgehp.benchmark.host import Recorder
from edgehp.benchmark.lanes import Answer, Array, Lane, Turn, WarmUp, warm_up
from edgehp.datasets.base import prefetch
from edgehp.errors import UsageError

# The headline percentile of a scenario, after MLPerf Inference; None: throughput alone.
HEADLINE = {"single-stream": 90.0, "offline": None, "multi-camera": 99.0}
SCENARIOS = tuple(HEADLINE)
DEFAULT_DURATION_S = 60.0
OFFICIAL_DURATION_S = 600.0


@dataclass(frozen=True)
class Plan:
    """One benchmark.

    Attributes:
        scenario: one of `SCENARIOS`.
        duration_s: measured seconds of each network.
        official: the long run, and no setting that shortens it.
        batch: crops a call; None lets ``offline`` look for the best and means 1 elsewhere.
        threads: processor threads of the engine; None leaves it to the runtime.
        wait: how the processor waits for a GPU, see `edgehp.engines.open_engine`.
        cameras: of ``multi-camera``.
        fps: frames a second of each camera.
        workers: threads that crop and resize in ``offline``.
        warm_up_s: the longest a network may take to become stable.
        idle_s: seconds over which idle power is measured.
        slice_s: networks take turns after this many seconds.
    """

    scenario: str = "single-stream"
    duration_s: float = DEFAULT_DURATION_S
    official: bool = False
    batch: int | None = None
    threads: int | None = None
    wait: str = "auto"
    cameras: int = 4
    fps: float = 30.0
    workers: int = 1
    warm_up_s: float = 30.0
    idle_s: float = 10.0
    slice_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.scenario not in SCENARIOS:
            raise UsageError(
                f"found the scenario {self.scenario!r}, expected one of {', '.join(SCENARIOS)}"
            )
        for words, value, low, high in (
            ("--duration", self.duration_s, 0.1, 86_400.0),
            ("--fps", self.fps, 0.1, 1000.0),
            ("--warm-up", self.warm_up_s, 0.0, 3600.0),
            ("--idle", self.idle_s, 0.0, 3600.0),
            ("a turn", self.slice_s, 0.05, 600.0),
            ("--batch", self.batch, 1, 4096),
            ("--cameras", self.cameras, 1, 256),
            ("--workers", self.workers, 1, 64),
        ):
            # NaN is in no range.
            if value is not None and not low <= value <= high:
                raise UsageError(f"{words}: found {value:g}, expected {low:g} to {high:g}")
        if self.official and self.duration_s < OFFICIAL_DURATION_S:
            raise UsageError(
                f"an official run takes at least {OFFICIAL_DURATION_S:g} s, "
                f"{self.duration_s:g} s asked for: leave out --duration or --official"
            )

    @property
    def headline(self) -> float | None:
        """The headline percentile of the scenario."""
        return HEADLINE[self.scenario]

    @property
    def modes(self) -> tuple[str, ...]:
        """What a network does in its turns: with frames, and in ``offline`` with ready crops."""
        return (END_TO_END, INFERENCE) if self.scenario == "offline" else (END_TO_END,)


def slice_seconds(duration_s: float, scenario: str, meter_period_s: float | None) -> float:
    """How long a network runs before the other takes its turn.

    Short enough that both see the same heat and the same neighbours, long enough for many
    inferences, and for twenty samples of the power meter, so that what it smears over the edge of
    a slice is small.
    """
    shortest = 1.0 if scenario == "offline" else 0.5
    if meter_period_s is not None:
        shortest = max(shortest, 20 * meter_period_s)
    return min(max(duration_s / 20, shortest), 5.0, duration_s)


# --- one turn -------------------------------------------------------------------------------------

END_TO_END, INFERENCE = "end-to-end", "inference"
_SLOWEST_CALL_S = 2.0
Clock = Callable[[], float]
_T = TypeVar("_T")


def run_turn(plan: Plan, lane: Lane, mode: str, seconds: float) -> Turn:
    """One turn of the plan's scenario."""
    if plan.scenario == "offline":
        return offline(lane, mode, seconds, plan.workers)
    if plan.scenario == "multi-camera":
        return multi_camera(lane, seconds, plan.cameras, plan.fps)
    return single_stream(lane, seconds)


def single_stream(lane: Lane, seconds: float, clock: Clock = perf_counter) -> Turn:
    """One call after the other: crop and resize, then infer.

    The loop does nothing else but take the time: it must not be seen in the result.
    """
    answers: list[Answer] = []
    groups, batch = lane.groups(lane.batch), lane.batch
    start = clock()
    deadline = start + seconds
    end = start
    while end < deadline:
        answer = lane.answer(next(groups), clock)
        end = answer.end
        answers.append(answer)
    calls, stages = len(answers), _stages(answers, [a.end - a.began for a in answers])
    return Turn(lane.role, END_TO_END, start, end, calls * batch, calls, stages, {})


def offline(
    lane: Lane, mode: str, seconds: float, workers: int = 1, clock: Clock = perf_counter
) -> Turn:
    """As many crops as possible; in the mode `INFERENCE` they are cropped beforehand.

    Threads start and end inside the turn, so that no crop is made on time that is not counted.
    """
    start = clock()
    deadline = start + seconds

    def until_deadline(items: Iterator[_T]) -> Iterator[_T]:
        # At least one, so that a turn always has a result.
        yield next(items)
        while clock() < deadline:
            yield next(items)

    if mode == INFERENCE:
        ready = lane.batches(lane.batch)
        start = clock()
        deadline = start + seconds
        answers = lane.stream(until_deadline(ready))
    else:
        groups = until_deadline(lane.groups(lane.batch))
        if lane.crops_on_engine is not None:
            answers = lane.stream_frames(groups)
        else:
            crops = prefetch(groups, lane.crop, workers=workers, ahead=workers + 1)
            answers = lane.stream(crops)
    images = calls = 0
    for prediction in answers:
        images += len(prediction.angles)
        calls += 1
    return Turn(lane.role, mode, start, clock(), images, calls, {}, {})


def multi_camera(
    lane: Lane,
    seconds: float,
    cameras: int,
    fps: float,
    clock: Clock = perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Turn:
    """Frames of `cameras` cameras arrive `fps` times a second each, evenly staggered.

    A camera keeps its newest frame only, as a driver's state is about now: a frame that a newer
    one of the same camera replaces before it was begun is *dropped*. A frame whose answer comes
    more than a frame's time after its arrival is *late*. Latency counts from the arrival, so that
    waiting is part of it and a slow answer cannot slow the arrivals down.

    Frames that wait together go into one call, up to the lane's batch.
    """
    items = lane.frames.items
    period = 1 / fps
    answers: list[Answer] = []
    latencies: list[float] = []
    # The next frame of each camera that has not been taken or dropped, and how many arrive.
    taken = [0] * cameras
    start = clock()
    per_camera = max(1, math.floor(seconds * fps))
    offsets = [start + period * c / cameras for c in range(cameras)]
    dropped = 0
    while True:
        now = clock()
        waiting = []
        for camera in range(cameras):
            arrived = min(per_camera, math.floor((now - offsets[camera]) * fps + 1e-6) + 1)
            if arrived > taken[camera]:
                dropped += arrived - 1 - taken[camera]
                taken[camera] = arrived - 1
                waiting.append((offsets[camera] + (arrived - 1) * period, camera))
        if not waiting:
            coming = [
                offsets[c] + taken[c] * period for c in range(cameras) if taken[c] < per_camera
            ]
            if not coming:
                break
            sleep(max(0.0, min(coming) - clock()))
            continue
        # Oldest first, so that no camera starves.
        chosen = sorted(waiting)[: lane.batch]
        group = [items[(taken[c] * cameras + c) % len(items)] for _, c in chosen]
        for _, camera in chosen:
            taken[camera] += 1
        answer = lane.answer(group, clock)
        end = answer.end
        answers.append(answer)
        latencies += [end - arrival for arrival, _ in chosen]
    late = sum(latency > period for latency in latencies)
    counts = {"arrived": per_camera * cameras, "late": late, "dropped": dropped}
    calls, stages = len(answers), _stages(answers, latencies)
    return Turn(lane.role, END_TO_END, start, clock(), len(latencies), calls, stages, counts)


def largest_useful_batch(
    lane: Lane, largest: int, seconds: float, clock: Clock = perf_counter
) -> tuple[int, dict[int, float]]:
    """The batch size of the highest throughput, and images a second by each that was tried.

    A larger batch must gain at least 2 %: it costs memory and latency. Two sizes in a row that
    do not, or one that takes longer than two seconds a call, end the search.
    """
    tried: dict[int, float] = {}
    best, best_rate, worse = 1, 0.0, 0
    batch = 1
    while batch <= largest and worse < 2:
        candidate = replace(lane, batch=batch)
        # The first run compiles and touches memory; the second counts.
        offline(candidate, INFERENCE, 0.0, clock=clock)
        turn = offline(candidate, INFERENCE, seconds, clock=clock)
        rate = turn.images / turn.seconds
        tried[batch] = rate
        better = rate > 1.02 * best_rate
        if better:
            best, best_rate = batch, rate
        worse = 0 if better else worse + 1
        if batch / rate > _SLOWEST_CALL_S:
            break
        batch *= 2
    return best, tried


def _stages(answers: Sequence[Answer], end_to_end: Sequence[float]) -> dict[str, Array]:
    """Durations by stage, without the parts of a call that the engine does not tell."""
    found: dict[str, Sequence[float]] = {
        "preprocessing": [a.cropping for a in answers],
        "call": [a.end - a.called for a in answers],
        "end_to_end": end_to_end,
    }
    for part in ("upload", "inference", "download"):
        if told := [s for a in answers if (s := getattr(a.times, part)) is not None]:
            found[part] = told
    return {stage: np.array(seconds, np.float64) for stage, seconds in found.items()}


logger = logging.getLogger(__name__)


# Told of the phase (``"idle"``, ``"warm-up"`` or ``"measure"``), the role of the lane that runs or
# ran last, the part of the measured time that is done, 0..1, and the last turn.
Progress = Callable[[str, str, float, "Turn | None"], None]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a run gave.

    Attributes:
        warm_ups: one a lane.
        turns: in the order they were taken.
        idle: start and end of the idle period before, monotonic seconds; None without one.
        window: start and end of the measured time.
        interrupted: whether the user stopped it.
    """

    warm_ups: tuple[WarmUp, ...]
    turns: tuple[Turn, ...]
    idle: tuple[float, float] | None
    window: tuple[float, float]
    interrupted: bool

    def of(self, role: str, mode: str = END_TO_END) -> tuple[Turn, ...]:
        """The turns of one lane in one mode."""
        return tuple(t for t in self.turns if t.role == role and t.mode == mode)


def measure(
    plan: Plan,
    lanes: Sequence[Lane],
    recorders: Sequence[Recorder] = (),
    *,
    measure_idle: bool = False,
    progress: Progress | None = None,
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
    tell = progress or (lambda *_: None)
    modes = plan.modes
    tracks = [(lane, mode) for lane in lanes for mode in modes]
    left = {(lane.role, mode): plan.duration_s / len(modes) for lane, mode in tracks}
    turns: list[Turn] = []
    warm_ups: list[WarmUp] = []
    idle: tuple[float, float] | None = None
    interrupted = False
    for recorder in recorders:
        recorder.start()
    begun = perf_counter()
    try:
        if measure_idle and plan.idle_s > 0:
            tell("idle", "", 0.0, None)
            # A sample before the idle time begins, as its edge.
            _settle(recorders)
            at = perf_counter()
            time.sleep(plan.idle_s)
            idle = (at, perf_counter())
        for lane in lanes:
            tell("warm-up", lane.role, 0.0, None)
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
                    tell("measure", turn.role, min(max(done, 0.0), 1.0), turn)
                forward = not forward
                # Between turns, where it is in no latency.
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
    return Measured(tuple(warm_ups), tuple(turns), idle, (start, end), interrupted)


def _settle(recorders: Sequence[Recorder]) -> None:
    period = max((r.period_s for r in recorders), default=0.0)
    if period:
        time.sleep(min(2.5 * period, 5.0))


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
