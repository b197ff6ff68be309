"""Each scenario counts what it says it counts, on an engine and a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgehp.benchmark.lanes import Frame, Frames, Lane, Turn, warm_up
from edgehp.benchmark.run import (
    INFERENCE,
    OFFICIAL_DURATION_S,
    Plan,
    largest_useful_batch,
    measure,
    multi_camera,
    offline,
    single_stream,
    slice_seconds,
)
from edgehp.benchmark.stats import speedup
from edgehp.crop import Preprocessing, crop_face
from edgehp.engines.base import EngineInfo, Face, Prediction, StageTimes
from edgehp.errors import UsageError

SPEC = Preprocessing(16)


class Time:
    """A clock that moves when something takes time, and a sleep that moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class TestedEngine:
    """Takes `first` + `each` seconds an image of the test's clock."""

    __test__ = False
    info = EngineInfo("fake", "0", "none", 1, "fp32")
    input_size = 16

    def __init__(self, time: Time, first: float, each: float = 0.0, drift: float = 1.0) -> None:
        self.time, self.first, self.each, self.drift = time, first, each, drift
        self.batches: list[int] = []

    def infer(self, crops: np.ndarray) -> Prediction:
        assert crops.shape[1:] == (16, 16, 3)
        self.batches.append(len(crops))
        self.time.now += self.first + self.each * len(crops)
        self.first *= self.drift
        zeros = np.zeros((len(crops), 3), np.float32)
        return Prediction(zeros, zeros)

    def close(self) -> None:
        pass

    def __enter__(self) -> TestedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class StreamingTestEngine(TestedEngine):
    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[Prediction]:
        for crops in batches:
            yield self.infer(crops)


def lane(engine: TestedEngine, batch: int = 1, role: str = "artifact") -> Lane:
    photo = np.zeros((32, 32, 3), np.uint8)
    return Lane.of(role, engine, SPEC, Frames("test", (Frame(photo, None),) * 3), batch)


def test_single_stream_takes_every_call() -> None:
    time = Time()
    engine = TestedEngine(time, 0.01)
    turn = single_stream(lane(engine, batch=4), 1.0, time)
    assert turn.images == 4 * turn.calls == sum(engine.batches)
    assert turn.calls in (100, 101)
    np.testing.assert_allclose(turn.stages["inference"], 0.01)
    np.testing.assert_allclose(turn.stages["preprocessing"], 0.0)
    assert turn.seconds == pytest.approx(turn.stages["end_to_end"].sum())
    # An engine that tells no parts: its call is its inference, and nothing is made up.
    assert set(turn.stages) == {"preprocessing", "inference", "call", "end_to_end"}


class TimedTestEngine(TestedEngine):
    stage_clock = "CUDA events"

    def infer_timed(self, crops: np.ndarray) -> tuple[Prediction, StageTimes]:
        prediction = self.infer(crops)
        # The GPU counts by its own clock, and part of the call is nobody's.
        return prediction, StageTimes(0.6 * self.first, 0.2 * self.first, 0.1 * self.first)


class FrameTestEngine(TimedTestEngine):
    """Cuts faces out of frames itself: a tenth of the call's time."""

    crops_frames = True

    def infer_frames(self, faces: Sequence[Face], spec: Preprocessing) -> Prediction:
        return self.infer(self.crop_frames(faces, spec))

    def infer_frames_timed(
        self, faces: Sequence[Face], spec: Preprocessing
    ) -> tuple[Prediction, StageTimes]:
        prediction, times = self.infer_timed(self.crop_frames(faces, spec))
        return prediction, replace(times, cropping=0.1 * self.first)

    def stream_frames(
        self, groups: Iterable[Sequence[Face]], spec: Preprocessing
    ) -> Iterator[Prediction]:
        return (self.infer_frames(group, spec) for group in groups)

    def crop_frames(self, faces: Sequence[Face], spec: Preprocessing) -> np.ndarray:
        return np.stack([crop_face(p.pixels, box, spec) for p, box in faces])


@pytest.mark.parametrize("scenario", ["single-stream", "multi-camera"])
@pytest.mark.parametrize(("kind", "cropping"), [(TimedTestEngine, 0), (FrameTestEngine, 0.001)])
def test_the_parts_of_a_call_are_what_the_engine_says(
    kind: type[TestedEngine], cropping: float, scenario: str
) -> None:
    time = Time()
    it = lane(kind(time, 0.01), batch=2)
    if scenario == "single-stream":
        turn = single_stream(it, 1.0, time)
    else:
        turn = multi_camera(it, 1.0, 2, 30, time, time.sleep)
    means = {k: v.mean() for k, v in turn.stages.items() if k != "end_to_end"}
    parts = {"preprocessing": cropping, "upload": 0.002, "inference": 0.006, "download": 0.001}
    assert means == pytest.approx({**parts, "call": 0.01})


@pytest.mark.parametrize("kind", [TestedEngine, StreamingTestEngine, FrameTestEngine])
@pytest.mark.parametrize("mode", [INFERENCE, "end-to-end"])
def test_offline_counts_images_over_the_whole_turn(kind: type[TestedEngine], mode: str) -> None:
    time = Time()
    engine = kind(time, 0.01)
    turn = offline(lane(engine, batch=5), mode, 1.0, clock=time)
    assert turn.images == 5 * turn.calls == sum(engine.batches)
    assert turn.images / turn.seconds == pytest.approx(500, rel=0.05)


def test_cameras_within_their_means_drop_nothing() -> None:
    time = Time()
    turn = multi_camera(lane(TestedEngine(time, 0.004)), 2.0, 4, 30, time, time.sleep)
    assert turn.counts == {"arrived": 240, "late": 0, "dropped": 0}
    assert turn.images == 240
    np.testing.assert_allclose(turn.stages["end_to_end"], 0.004, atol=1e-4)


def test_latency_counts_from_the_arrival_and_overload_drops_the_oldest() -> None:
    """One camera at 10 fps and 0.25 s a call: two frames in five are answered at best."""
    time = Time()
    turn = multi_camera(lane(TestedEngine(time, 0.25)), 10.0, 1, 10, time, time.sleep)
    assert turn.counts["arrived"] == 100
    assert turn.images + turn.counts["dropped"] == 100
    assert turn.images == pytest.approx(40, abs=2)
    assert turn.counts["late"] == turn.images
    # Frames wait for up to a period before the newest is taken: never longer.
    assert turn.stages["end_to_end"].min() >= 0.25
    assert turn.stages["end_to_end"].max() < 0.25 + 0.1 + 1e-3


def test_a_pause_is_seen_by_every_frame_that_waited() -> None:
    """No coordinated omission: one slow call makes the frames behind it late or dropped."""
    time = Time()
    engine = TestedEngine(time, 0.001)
    turn = multi_camera(lane(engine), 0.5, 2, 20, time, time.sleep)
    assert turn.counts["late"] == turn.counts["dropped"] == 0
    engine.first, engine.drift = 0.2, 0.005  # the first call takes 0.2 s, the next 1 ms
    turn = multi_camera(lane(engine), 0.5, 2, 20, time, time.sleep)
    assert turn.counts["dropped"] == 6
    assert turn.counts["late"] >= 1
    assert turn.stages["end_to_end"].max() == pytest.approx(0.2)


def test_waiting_cameras_share_a_call() -> None:
    time = Time()
    engine = TestedEngine(time, 0.03)
    turn = multi_camera(lane(engine, batch=4), 2.0, 4, 30, time, time.sleep)
    assert max(engine.batches) > 1
    assert sum(engine.batches) == turn.images
    assert turn.images + turn.counts["dropped"] == 240


def test_the_useful_batch_is_where_throughput_stops_growing() -> None:
    time = Time()
    batch, tried = largest_useful_batch(lane(TestedEngine(time, 0.008, 0.001)), 64, 0.5, time)
    assert batch == 64
    assert list(tried) == [1, 2, 4, 8, 16, 32, 64]
    # No gain from batching: the search ends early.
    batch, tried = largest_useful_batch(lane(TestedEngine(time, 0.0, 0.01)), 64, 0.5, time)
    assert batch == 1
    assert len(tried) == 3


def test_warm_up_ends_when_it_is_stable_or_says_that_it_is_not() -> None:
    time = Time()
    found = warm_up(lane(TestedEngine(time, 0.01)), 60, time)
    assert found.settled
    assert found.seconds < 2
    found = warm_up(lane(TestedEngine(time, 0.01, drift=1.01)), 60, time)
    assert not found.settled
    assert found.spread is not None
    assert found.seconds >= 60


def test_warm_up_meets_every_batch_that_cameras_may_fill() -> None:
    engine = TestedEngine(Time(), 0.01)
    warm_up(lane(engine, batch=4), 0, engine.time, smaller=True)
    # As the scenario will call it, and then until it is stable.
    assert engine.batches == [1, 2, 3, 4, 4]


def test_networks_take_turns_in_the_order_abba() -> None:
    engines = {r: TestedEngine(Time(), 0.0) for r in ("artifact", "reference")}
    lanes = [lane(e, role=r) for r, e in engines.items()]
    plan = Plan(duration_s=0.2, slice_s=0.05, warm_up_s=0)
    measured = measure(plan, lanes)
    roles = [t.role[0] for t in measured.turns[:4]]
    assert roles == ["a", "r", "r", "a"]
    for role in engines:
        assert sum(t.seconds for t in measured.of(role)) >= 0.2


def test_an_interruption_keeps_the_turns_that_were_finished() -> None:
    engine = TestedEngine(Time(), 0.0)
    steps = []

    def stop(*progress: object) -> None:
        steps.append(progress)
        if len(steps) == 5:
            raise KeyboardInterrupt

    plan = Plan(duration_s=60, slice_s=0.05, warm_up_s=0)
    measured = measure(plan, [lane(engine)], progress=stop)
    assert measured.interrupted
    assert len(measured.turns) == 4
    assert measured.window[1] == measured.turns[-1].end


def turn(role: str, median: float, count: int = 9) -> Turn:
    times = np.full(count, median)
    return Turn(role, "end-to-end", 0, 1, count, count, {"inference": times}, {})


def test_the_speedup_is_of_paired_turns(rng: np.random.Generator) -> None:
    """The machine slows down by half during the run; the ratio does not notice."""
    slow = np.linspace(1, 2, 12)
    noise = rng.normal(1, 0.01, 12)
    a = [turn("artifact", 0.005 * s) for s in slow]
    b = [turn("reference", 0.015 * s * n) for s, n in zip(slow, noise, strict=True)]
    found = speedup(a, b, "inference")
    assert found is not None
    assert found.ratio == pytest.approx(3, rel=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.ratio < found.high < found.low * 1.05
    few = speedup(a[:2], b[:2], "inference")
    assert few is not None
    assert few.low is None
    assert speedup([], b, "inference") is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"duration_s": 60, "official": True}, "official"),
        ({"scenario": "server"}, "scenario 'server'"),
        ({"fps": 0.0}, "--fps: found 0, expected 0.1 to 1000"),
        ({"cameras": 0}, "--cameras: found 0"),
        ({"duration_s": float("nan")}, "--duration: found nan"),
        ({"idle_s": -1.0}, "--idle: found -1, expected 0 to 3600"),
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Plan(**wrong)
    Plan(duration_s=OFFICIAL_DURATION_S, official=True)


def test_turns_are_long_enough_for_the_meter() -> None:
    assert slice_seconds(60, "single-stream", None) == 3
    assert slice_seconds(4, "single-stream", None) == 0.5
    assert slice_seconds(10, "single-stream", 0.1) == 2
    assert slice_seconds(600, "offline", 1.0) == 5
