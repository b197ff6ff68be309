"""Energy is the integral over exactly the measured time, or null with the reason."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgehp.benchmark.power.base import (
    ENERGY,
    POWER,
    TOTAL,
    MeterInfo,
    PowerRecorder,
    Sample,
    energy_over,
)
from edgehp.benchmark.power.jetson import rails_of
from edgehp.errors import MeasurementError

PERIOD = 0.1


def meter(*rails: str, kind: str = POWER, total: tuple[str, ...] = ()) -> MeterInfo:
    return MeterInfo("fake", kind, dict.fromkeys(rails, ""), total, "why", PERIOD)


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
    assert found.joules[TOTAL] == pytest.approx(wave_joules(*window), rel=0.01)
    assert found.watts["a"] == pytest.approx(wave_joules(*window) / found.seconds, rel=0.01)


def test_energy_counters_are_interpolated_at_the_edges(rng: np.random.Generator) -> None:
    samples = [Sample(t, {"a": wave_joules(0, t)}) for t in uneven_times(rng)]
    windows = [(1.234, 4.5), (6.05, 9.87)]
    found = energy_over(meter("a", kind=ENERGY, total=("a",)), samples, windows)
    assert found.joules[TOTAL] == pytest.approx(sum(wave_joules(*w) for w in windows), rel=0.01)


def test_a_dropped_sample_is_bridged_and_a_hole_is_not() -> None:
    times = [i * PERIOD for i in range(100)]
    one = [Sample(t, {"a": wave(t)}) for t in times if abs(t - 5) > 0.01]
    found = energy_over(meter("a", total=("a",)), one, [(1, 9)])
    assert found.joules[TOTAL] == pytest.approx(wave_joules(1, 9), rel=0.01)
    hole = [s for s in one if not 5 <= s.time <= 6]
    found = energy_over(meter("a", total=("a",)), hole, [(1, 9)])
    assert found.joules[TOTAL] is None
    assert "no sample for 1.20 s" in found.reasons["a"]
    # Outside the measured time a hole does not matter.
    assert energy_over(meter("a", total=("a",)), hole, [(1, 4.8)]).joules[TOTAL] is not None


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
    assert found.joules[TOTAL] is None
    assert "b: the samples end" in found.reasons["total"]


def test_not_a_number_is_no_energy() -> None:
    samples = [Sample(i * PERIOD, {"a": math.nan if i == 50 else 1.0}) for i in range(100)]
    assert "not a number" in energy_over(meter("a"), samples, [(1, 9)]).reasons["a"]


def test_there_is_no_total_where_no_rail_is_the_whole() -> None:
    rails = ("VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    info = rails_of("ina3221", rails, PERIOD)
    assert info.total == () and all(name in info.includes for name in rails)


class DyingMeter:
    """Answers three times, then does as told."""

    info = MeterInfo("fake", POWER, {"a": "a"}, ("a",), "", 0.001)

    def __init__(self, end: float | MeasurementError) -> None:
        self.end, self.reads = end, 0

    def read(self) -> Sample:
        self.reads += 1
        if self.reads <= 3:
            return Sample(float(self.reads), {"a": 7.0})
        if isinstance(self.end, MeasurementError):
            raise self.end
        return Sample(4.0, {"a": self.end})

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (MeasurementError("the service is gone"), "the service is gone"),
        (5_200_000.0, "a gives 5.2e+06 W, which no machine here takes"),
    ],
)
def test_a_meter_that_dies_or_raves_ends_the_sampling(
    end: float | MeasurementError, words: str
) -> None:
    recorder = PowerRecorder(DyingMeter(end))
    recorder.start()
    recorder._thread.join(10)
    recorder.stop()
    assert recorder.failure == words
    assert [s.time for s in recorder.samples] == [1.0, 2.0, 3.0]
    assert recorder.watts() == 7.0
