"""Energy is the integral over exactly the measured time, or null with the reason."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgehp.benchmark.power.base import (
    ENERGY,
    POWER,
    MeterInfo,
    PowerRecorder,
    Rail,
    Sample,
    energy_over,
)
from edgehp.benchmark.power.jetson import total_of
from edgehp.benchmark.power.rapl import Unwrapper
from edgehp.errors import MeasurementError

PERIOD = 0.1


def meter(*rails: str, kind: str = POWER, total: tuple[str, ...] = ()) -> MeterInfo:
    return MeterInfo("fake", kind, tuple(Rail(r, r) for r in rails), total, "why", PERIOD)


def wave(t: float) -> float:
    """Watts: 10 with a swing of 4 every 3 s; its integral is `wave_joules`."""
    return 10 + 4 * math.sin(2 * math.pi * t / 3)


def wave_joules(start: float, end: float) -> float:
    def integral(t: float) -> float:
        return 10 * t - 4 * 3 / (2 * math.pi) * math.cos(2 * math.pi * t / 3)

    return integral(end) - integral(start)


def uneven_times(rng: np.random.Generator) -> list[float]:
    """Sample times from 0 to 20 s that jitter by a fifth of the period."""
    return [float(t) for t in np.arange(0, 20, PERIOD) + rng.uniform(-0.02, 0.02, 200)]


@pytest.mark.parametrize("window", [(1.234, 17.89), (2.0, 2.33), (5.05, 5.06)])
def test_energy_of_a_known_waveform_is_right_within_one_percent(
    rng: np.random.Generator, window: tuple[float, float]
) -> None:
    samples = [Sample(t, {"a": wave(t)}) for t in uneven_times(rng)]
    found = energy_over(meter("a", total=("a",)), samples, [window])
    assert found.total == pytest.approx(wave_joules(*window), rel=0.01)
    assert found.watts()["a"] == pytest.approx(wave_joules(*window) / found.seconds, rel=0.01)


def test_energy_counters_are_interpolated_at_the_edges(rng: np.random.Generator) -> None:
    samples = [Sample(t, {"a": wave_joules(0, t)}) for t in uneven_times(rng)]
    windows = [(1.234, 4.5), (6.05, 9.87)]
    found = energy_over(meter("a", kind=ENERGY, total=("a",)), samples, windows)
    assert found.total == pytest.approx(sum(wave_joules(*w) for w in windows), rel=0.01)


def test_turns_of_two_networks_do_not_share_energy() -> None:
    """A square wave: 20 W while one network runs, 5 W while the other does."""
    times = np.arange(0, 20, 0.01)
    info = MeterInfo("fake", POWER, (Rail("a", "a"),), ("a",), "", 0.01)
    samples = [Sample(float(t), {"a": 20.0 if int(t) % 2 else 5.0}) for t in times]
    odd = energy_over(info, samples, [(i + 0.02, i + 0.98) for i in range(1, 18, 2)])
    even = energy_over(info, samples, [(i + 0.02, i + 0.98) for i in range(2, 18, 2)])
    assert odd.watts()["total"] == pytest.approx(20, rel=0.01)
    assert even.watts()["total"] == pytest.approx(5, rel=0.01)


def test_a_dropped_sample_is_bridged_and_a_hole_is_not() -> None:
    times = [i * PERIOD for i in range(100)]
    one = [Sample(t, {"a": wave(t)}) for t in times if abs(t - 5) > 0.01]
    found = energy_over(meter("a", total=("a",)), one, [(1, 9)])
    assert found.total == pytest.approx(wave_joules(1, 9), rel=0.01)
    assert found.largest_gap_s == pytest.approx(2 * PERIOD)
    hole = [s for s in one if not 5 <= s.time <= 6]
    found = energy_over(meter("a", total=("a",)), hole, [(1, 9)])
    assert found.total is None
    assert "no sample for 1.20 s" in found.reasons["a"]
    # Outside the measured time a hole does not matter.
    assert energy_over(meter("a", total=("a",)), hole, [(1, 4.8)]).total is not None


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([], "0 samples"),
        ([1.5, 2.5], "begin 0.50 s after"),
        ([0.5, 1.5], "end 0.50 s before the measured time: the meter stopped"),
    ],
)
def test_samples_that_do_not_cover_the_window_give_null_and_say_so(
    times: list[float], words: str
) -> None:
    samples = [Sample(t, {"a": 1.0}) for t in times]
    found = energy_over(meter("a", total=("a",)), samples, [(1.0, 2.0)])
    assert found.joules == {"a": None, "total": None}
    assert words in found.reasons["a"]
    assert words in found.reasons["total"]


def test_a_rail_that_stops_answering_takes_the_total_with_it_and_no_other_rail() -> None:
    samples = [Sample(i * PERIOD, {"a": 1.0} | ({"b": 2.0} if i < 20 else {})) for i in range(100)]
    found = energy_over(meter("a", "b", total=("a", "b")), samples, [(1.0, 9.0)])
    assert found.joules["a"] == pytest.approx(8.0)
    assert found.joules["b"] is None
    assert found.total is None
    assert "b: the samples end" in found.reasons["total"]


def test_not_a_number_is_no_energy() -> None:
    samples = [Sample(i * PERIOD, {"a": math.nan if i == 50 else 1.0}) for i in range(100)]
    assert "not a number" in energy_over(meter("a"), samples, [(1, 9)]).reasons["a"]


def test_a_wrapped_counter_goes_on_counting() -> None:
    unwrap = Unwrapper(1000)
    assert [unwrap.add(v) for v in (900, 950, 30, 500, 20)] == [0, 50, 130, 600, 1120]


def test_the_total_is_a_measured_input_or_the_documented_sum() -> None:
    assert total_of(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"))[0] == ("VDD_IN",)
    agx = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    rails, what = total_of(agx)
    assert rails == agx[:3] and "sum" in what
    rails, why = total_of(agx[1:])
    assert rails == () and all(name in why for name in agx[1:])


class DyingMeter:
    """Answers three times, then its service is gone."""

    def __init__(self) -> None:
        self.info = MeterInfo("fake", POWER, (Rail("a", "a"),), ("a",), "", 0.001)
        self.reads = 0

    def read(self) -> Sample:
        self.reads += 1
        if self.reads > 3:
            raise MeasurementError("the service is gone")
        return Sample(float(self.reads), {"a": 7.0})

    def close(self) -> None:
        pass


def test_watts_that_cannot_be_end_the_sampling() -> None:
    meter = DyingMeter()
    meter.read = lambda: Sample(1.0, {"a": 5_200_000.0})  # type: ignore[method-assign]
    recorder = PowerRecorder(meter)
    recorder.start()
    assert recorder._thread is not None
    recorder._thread.join(10)
    recorder.stop()
    assert recorder.failure == "a gives 5.2e+06 W, which no machine here takes"
    assert recorder.samples == ()


def test_a_meter_that_dies_is_remembered_and_ends_the_sampling() -> None:
    recorder = PowerRecorder(DyingMeter())
    recorder.start()
    assert recorder._thread is not None
    recorder._thread.join(10)
    recorder.stop()
    assert recorder.failure == "the service is gone"
    assert [s.time for s in recorder.samples] == [1.0, 2.0, 3.0]
    assert recorder.watts() == 7.0
