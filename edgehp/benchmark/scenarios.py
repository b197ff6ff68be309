"""The scenarios, after MLPerf Inference: each runs one lane for one turn.

``single-stream``: the next frame starts when the last one is answered. ``offline``: all frames
are there; cropping runs in threads beside inference. ``multi-camera``: frames arrive on a clock,
whether or not anybody is ready for them.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgehp.benchmark.lanes import Lane, Turn
from edgehp.benchmark.plan import Plan
from edgehp.crop import crop_face
from edgehp.datasets.prefetch import prefetch

__all__ = [
    "END_TO_END",
    "INFERENCE",
    "largest_useful_batch",
    "multi_camera",
    "offline",
    "run_turn",
    "single_stream",
]

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
    prepared, done, total = array("d"), array("d"), array("d")
    infer, spec, batch = lane.engine.infer, lane.spec, lane.batch
    groups = lane.groups(batch)
    start = clock()
    deadline = start + seconds
    end = start
    while end < deadline:
        group = next(groups)
        began = clock()
        if batch == 1:
            crops = crop_face(group[0].photo, group[0].box, spec)[None]
        else:
            crops = lane.crop(group)
        ready = clock()
        infer(crops)
        end = clock()
        prepared.append(ready - began)
        done.append(end - ready)
        total.append(end - began)
    stages = {"preprocessing": _of(prepared), "inference": _of(done), "end_to_end": _of(total)}
    return Turn(lane.role, END_TO_END, start, end, len(total) * batch, len(total), stages, {})


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
        batches = until_deadline(ready)
    else:
        batches = prefetch(
            until_deadline(lane.groups(lane.batch)), lane.crop, workers=workers, ahead=workers + 1
        )
    images = calls = 0
    for prediction in lane.stream(batches):
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
    latencies, prepared, done = array("d"), array("d"), array("d")
    # The next frame of each camera that has not been taken or dropped, and how many arrive.
    taken = [0] * cameras
    start = clock()
    per_camera = max(1, math.floor(seconds * fps))
    offsets = [start + period * c / cameras for c in range(cameras)]
    dropped = late = calls = 0
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
        # Oldest first: nobody waits for ever.
        chosen = sorted(waiting)[: lane.batch]
        group = [items[(taken[c] * cameras + c) % len(items)] for _, c in chosen]
        for _, camera in chosen:
            taken[camera] += 1
        began = clock()
        crops = lane.crop(group)
        ready = clock()
        lane.engine.infer(crops)
        end = clock()
        calls += 1
        prepared.append(ready - began)
        done.append(end - ready)
        for arrival, _ in chosen:
            latencies.append(end - arrival)
            late += end - arrival > period
    stages = {"preprocessing": _of(prepared), "inference": _of(done), "end_to_end": _of(latencies)}
    counts = {"arrived": per_camera * cameras, "late": int(late), "dropped": dropped}
    return Turn(lane.role, END_TO_END, start, clock(), len(latencies), calls, stages, counts)


def largest_useful_batch(
    lane: Lane, largest: int, seconds: float, clock: Clock = perf_counter
) -> tuple[int, list[dict[str, float]]]:
    """The batch size of the highest throughput, and images a second of each that was tried.

    A larger batch must gain at least 2 %: it costs memory and latency. Two sizes in a row that
    do not, or one that takes longer than two seconds a call, end the search.
    """
    tried: list[dict[str, float]] = []
    best, best_rate, worse = 1, 0.0, 0
    batch = 1
    while batch <= largest and worse < 2:
        candidate = Lane(lane.role, lane.engine, lane.spec, lane.frames, lane.crops, batch)
        # The first run compiles and touches memory; the second counts.
        offline(candidate, INFERENCE, 0.0, clock=clock)
        turn = offline(candidate, INFERENCE, seconds, clock=clock)
        rate = turn.images / turn.seconds
        tried.append({"batch": float(batch), "images_per_s": rate})
        better = rate > 1.02 * best_rate
        if better:
            best, best_rate = batch, rate
        worse = 0 if better else worse + 1
        if batch / rate > _SLOWEST_CALL_S:
            break
        batch *= 2
    return best, tried


def _of(values: array[float]) -> npt.NDArray[np.float64]:
    return np.frombuffer(values, np.float64) if len(values) else np.empty(0)
