"""Metrics, intervals, gate and conditions on numbers whose answer is known."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from edgehp.engines.base import Prediction
from edgehp.errors import AccuracyError, DataError, UsageError
from edgehp.pipeline.accuracy import Answers, measure
from edgehp.pipeline.crops import CropSet
from edgehp.pose import matrix_from_euler
from edgehp.validation.appearance import CONDITIONS
from edgehp.validation.metrics import measure_accuracy
from edgehp.validation.statistics import (
    Interval,
    check_drop,
    mean_interval,
    require_drop,
    t_quantile,
)


def poses(rng: np.random.Generator, n: int, yaw: float = 80.0) -> np.ndarray:
    return rng.uniform((-40, -yaw, -40), (40, yaw, 40), (n, 3))


def accuracy(predicted: np.ndarray, truth: np.ndarray, spread: np.ndarray | None = None, **kw):
    names = [f"f{i:04d}" for i in range(len(truth))]
    spread = np.ones_like(predicted) if spread is None else spread
    return measure_accuracy(predicted, spread, truth, matrix_from_euler(truth), names, **kw)


# --- metrics --------------------------------------------------------------------------------------


def test_a_known_error_per_angle_is_found_exactly(rng):
    truth = poses(rng, 50)
    found = accuracy(truth + np.array([1.0, -2.0, 4.5]), truth).overall
    assert found.mae == pytest.approx((1.0, 2.0, 4.5))
    assert found.mae_mean == pytest.approx(2.5)
    # 2 across the seam; 180, which a metric that also wraps at 180 would call 0.
    truth = np.array([[0.0, 0.0, 179.0], [0.0, 0.0, 90.0]])
    found = accuracy(np.array([[0.0, 0.0, -179.0], [0.0, 0.0, -90.0]]), truth).overall
    assert found.mae[2] == pytest.approx((2 + 180) / 2)


@pytest.mark.parametrize("axis", range(3))
def test_a_pure_turn_has_its_angle_as_geodesic_and_two_thirds_of_it_or_less_as_maev(axis):
    predicted = np.zeros((1, 3))
    predicted[0, axis] = 30.0
    found = accuracy(predicted, np.zeros((1, 3))).overall
    assert found.geodesic == pytest.approx(30.0)
    assert found.maev == pytest.approx(20.0)  # one axis stays, two turn by 30


@pytest.mark.parametrize(
    "mistake",
    [lambda a: a * [1, -1, 1], lambda a: a * [-1, 1, 1], lambda a: a[:, [1, 0, 2]]],
    ids=["yaw sign", "pitch sign", "pitch and yaw swapped"],
)
def test_a_sign_or_order_mistake_shows_in_every_metric(rng, mistake):
    truth = poses(rng, 200)
    right, wrong = accuracy(truth, truth).overall, accuracy(mistake(truth), truth).overall
    assert right.mae_mean == pytest.approx(0, abs=1e-9)
    assert right.geodesic == pytest.approx(0, abs=1e-6)
    assert min(wrong.mae_mean, wrong.geodesic, wrong.maev) > 8


def test_bands_are_by_the_yaw_of_the_truth_and_hold_every_frame_once(rng):
    truth = np.zeros((7, 3))
    truth[:, 1] = [0, -30, 30.1, 60, -60.1, 99, 120]
    predicted = truth + np.array([0, 1, 0]) * np.arange(1, 8)[:, None]
    bands = accuracy(predicted, truth).bands
    assert [b.summary.frames for b in bands] == [2, 2, 2, 1]
    assert [(b.low, b.high) for b in bands] == [(0, 30), (30, 60), (60, 99), (99, 180)]
    assert [b.summary.mae[1] for b in bands] == pytest.approx([1.5, 3.5, 5.5, 7])
    # An empty one is null and not zero.
    bands = accuracy(*[poses(rng, 9, yaw=20)] * 2).bands
    assert [b.summary is None for b in bands] == [False, True, True]


def test_the_worst_frames_come_first_with_name_truth_and_prediction(rng):
    truth = poses(rng, 30)
    predicted = truth.copy()
    predicted[17] += 9
    predicted[4] += 6
    worst = accuracy(predicted, truth, worst=2).worst
    assert [w.name for w in worst] == ["f0017", "f0004"]
    assert worst[0].error == pytest.approx(9)
    assert worst[0].predicted == pytest.approx(predicted[17])


def test_an_answer_that_is_not_finite_is_an_error(rng):
    truth = poses(rng, 5)
    predicted = truth.copy()
    predicted[3, 1] = np.nan
    with pytest.raises(DataError, match="f0003"):
        accuracy(predicted, truth)


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("what", ["differences", "ratios", "sequences"])
def test_95_percent_intervals_cover_the_truth_95_percent_of_the_time(rng, n, what):
    """Of drops (normal), of ratios (lognormal, on logs) and of means of unequal sequences."""
    trials, hits = 2000, 0
    for trial in range(trials):
        groups, truth = None, 0.0
        if what == "differences":
            values = rng.normal(0, 0.3, n)
        elif what == "ratios":
            truth = math.log(3.0)
            values = np.log(rng.lognormal(truth, 0.2, n))
        else:
            sizes = rng.integers(3, 6, n)
            values = np.repeat(rng.normal(0, 1, n), sizes) + rng.normal(0, 0.5, sizes.sum())
            groups = [str(g) for g in np.repeat(np.arange(n), sizes)]
        found = mean_interval(values, groups=groups, resamples=600, seed=trial)
        hits += found.low <= truth <= found.high
    # The noise of 2,000 trials is 0.5 %.
    assert 0.93 <= hits / trials <= 0.97, (found.method, hits / trials)


def test_t_quantiles_are_those_of_the_tables():
    # Abramowitz & Stegun, table 26.10.
    for freedom, expected in ((1, 12.706), (2, 4.303), (7, 2.365), (14, 2.145), (120, 1.980)):
        assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another(rng):
    values = rng.normal(0, 1, 300)
    a, b, c = mean_interval(values), mean_interval(values), mean_interval(values, seed=7)
    assert a == b and (a.low, a.high) != (c.low, c.high)
    assert a.seed != c.seed == 7


def test_frames_of_one_video_are_resampled_together(rng):
    means = rng.normal(0, 1, 24)
    values = np.repeat(means, 100) + rng.normal(0, 0.01, 2400)
    groups = [f"{i:02d}" for i in range(24) for _ in range(100)]
    single = mean_interval(values)
    grouped = mean_interval(values, groups=groups, unit="sequence")
    assert (grouped.units, grouped.unit) == (24, "sequence")
    assert (grouped.high - grouped.low) > 5 * (single.high - single.low)


def test_groups_of_unequal_size_keep_the_mean_over_frames():
    values, groups = [0.0] * 9 + [10.0], ["a"] * 9 + ["b"]
    assert mean_interval(values, groups=groups).value == pytest.approx(1.0)
    values, groups = values * 20, [f"{g}{i}" for i in range(20) for g in groups]
    found = mean_interval(values, groups=groups)
    assert found.units == 40 and found.value == pytest.approx(1.0)
    assert 0 < found.low < 1 < found.high < 10


def test_one_unit_says_nothing_and_the_interval_says_so():
    found = mean_interval([0.3, 0.4], groups=["01", "01"])
    assert (found.low, found.high) == (-np.inf, np.inf)
    gate = check_drop(mean_interval([0.0]), 0.1)
    assert not gate.passed and "1 frame are" not in gate.sentence and "many more" in gate.hint


def test_what_cannot_be_resampled_or_judged_is_an_error():
    for values in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(DataError):
            mean_interval(values)
    for limit in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="max-drop"):
            check_drop(interval(0, 0), limit)


def test_ten_thousand_resamples_of_a_data_set_do_not_need_its_square_in_memory(rng):
    import tracemalloc

    values = rng.normal(0, 1, 20_000)
    tracemalloc.start()
    mean_interval(values, resamples=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


# --- gate -----------------------------------------------------------------------------------------


def interval(value: float, half: float, units: int = 593):
    return Interval(value, value - half, value + half, 0.95, "percentile", units, "frame", 100, 1)


@pytest.mark.parametrize(
    ("value", "half", "passed"),
    [
        (0.05, 0.01, True),
        (0.09, 0.05, False),
        (0.1, 0.0, True),
        (0.2, 0.01, False),
        (-0.3, 0.1, True),
    ],
)
def test_the_upper_end_of_the_interval_must_keep_the_limit(value, half, passed):
    found = check_drop(interval(value, half), 0.1)
    assert found.passed == passed
    assert "593 frames" in found.sentence and bool(found.hint) is not passed
    assert (found.needed is not None) == (not passed and value < 0.1)


@pytest.mark.parametrize("units", [3, 12, 200])
def test_a_set_too_small_to_tell_says_how_many_would_do(rng, units):
    """A network that is 0.05 worse, and frames that differ by 0.3: 1 in 20 needs about 140."""
    deviation = 0.3
    half = t_quantile(units - 1) * deviation / np.sqrt(units)
    found = check_drop(interval(0.05, half, units), 0.1 if units < 200 else 0.07)
    assert not found.passed
    assert f"{units} frames are too few to tell" in found.sentence
    expected = (1.97 * deviation / (0.05 if units < 200 else 0.02)) ** 2
    assert found.needed == pytest.approx(expected, rel=0.05)
    assert f"about {found.needed} would do" in found.hint
    # And so many really do.
    half = t_quantile(found.needed - 1) * deviation / np.sqrt(found.needed)
    assert check_drop(interval(0.05, half, found.needed), 0.1 if units < 200 else 0.07).passed


def test_over_the_limit_raises_the_error_with_exit_code_3():
    with pytest.raises(AccuracyError, match=r"\+0\.2000.*fails the limit of 0\.1") as caught:
        require_drop(interval(0.2, 0.01), 0.1)
    assert caught.value.exit_code == 3 and "\nhint: keep more layers" in str(caught.value)
    with pytest.raises(AccuracyError, match="too few to tell"):
        require_drop(interval(0.09, 0.05), 0.1)


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONDITIONS))
def test_conditions_are_deterministic_uint8_and_leave_their_input_alone(rng, name):
    crops = rng.integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    before = crops.copy()
    a, b = CONDITIONS[name](crops), CONDITIONS[name](crops)
    assert a.dtype == np.uint8 and a.shape == crops.shape and np.array_equal(a, b)
    assert np.array_equal(crops, before) and not np.array_equal(a, crops)
    # A crop's version must not depend on its neighbours in the batch.
    assert np.array_equal(CONDITIONS[name](crops[1:2])[0], a[1])


def test_dark_is_dark_blurred_is_smooth_and_infrared_is_grey(rng):
    crops = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    dark, blurred, nir = (CONDITIONS[n](crops) for n in ("dark", "blurred", "near-infrared"))
    assert dark.mean() == pytest.approx(0.351 * crops.mean(), rel=0.05)
    assert blurred.std() < 0.6 * crops.std()
    assert (nir == nir[..., :1]).all()
    white = CONDITIONS["near-infrared"](np.full((1, 65, 65, 3), 200, np.uint8))[0, ..., 0]
    assert white[32, 32] == pytest.approx(200, abs=1) and white[0, 0] < 0.5 * 200


def test_a_network_that_sees_nothing_of_the_pose_is_said_to_however_small_its_drop(rng):
    truth = poses(rng, 80)
    names = tuple(map(str, range(80)))
    held_out = CropSet("val.zip", names, names, np.zeros((80, 8, 8, 3), np.uint8), truth, {})

    def said(angles: np.ndarray) -> tuple[str, ...]:
        same = Answers(Prediction(angles, np.ones_like(angles)))
        return measure(same, same, held_out, 0.1, "a test")[1]

    assert said(truth + rng.normal(0, 5, truth.shape)) == ()
    (warning,) = said(truth.mean(axis=0) + rng.normal(0, 5, truth.shape))
    assert re.match(r"FP32 itself errs by \d+\.\d degrees on val\.zip, one answer for all", warning)
