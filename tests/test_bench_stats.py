"""Percentiles are values that were measured, bounded by what the sample can say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgehp.benchmark.stats import (
    PERCENTILES,
    Histogram,
    needed_for,
    percentile,
    summarize,
    upper_bound,
)


def test_percentiles_are_nearest_ranks() -> None:
    values = np.arange(1, 1001, dtype=np.float64)
    assert [percentile(values, p) for p in (0, 50, 90, 99, 99.9, 100)] == [
        *(1, 500, 900, 990, 999, 1000),
    ]


def test_the_slowest_is_never_clipped() -> None:
    latency = summarize([0.005] * 9999 + [7.5])
    assert latency is not None
    assert latency.max_ms == 7500
    assert sum(latency.histogram.counts.values()) == 10_000
    low, high = latency.histogram.edges(max(latency.histogram.counts))
    assert low <= 7.5 < high


def test_a_sample_needs_a_size_for_a_percentile() -> None:
    # ln 0.01 / ln 0.9 = 43.7; the values MLPerf's rule rests on.
    assert [needed_for(p) for p in (90, 99, 99.9)] == [44, 459, 4603]
    values = np.arange(43, dtype=np.float64)
    assert upper_bound(values, 90) is None
    assert upper_bound(np.arange(44, dtype=np.float64), 90) == 43
    # MLPerf Inference: 64 samples bound the 90th percentile with one value above.
    assert upper_bound(np.arange(63, dtype=np.float64), 90) == 62
    assert upper_bound(np.arange(64, dtype=np.float64), 90) == 62


@pytest.mark.parametrize(("p", "n"), [(90.0, 200), (99.0, 1000), (50.0, 60)])
def test_the_bound_holds_as_often_as_it_says(rng: np.random.Generator, p: float, n: int) -> None:
    """Of samples of a known distribution: at least 99 % of the bounds are above the truth."""
    truth = -math.log(1 - p / 100)
    samples = np.sort(rng.exponential(size=(3000, n)), axis=1)
    held = [(upper_bound(s, p) or math.inf) >= truth for s in samples]
    assert np.mean(held) >= 0.983  # four standard errors below 0.99
    # And it is no idle bound: it stays near the percentile itself.
    assert np.mean([upper_bound(s, p) or 0 for s in samples]) < 2 * truth


def test_the_bound_of_a_long_run_is_finite_and_quick() -> None:
    values = np.linspace(0, 1, 600_000)
    bound = upper_bound(values, 99.9)
    assert bound is not None
    assert 0.999 < bound < 0.9992


def test_a_histogram_keeps_the_shape(rng: np.random.Generator) -> None:
    seconds = rng.lognormal(math.log(0.006), 0.3, 5000)
    histogram = Histogram.of(seconds)
    for index in histogram.counts:
        low, high = histogram.edges(index)
        assert high / low < 1.011
        inside = int(((seconds >= low) & (seconds < high)).sum())
        # A value on an edge may fall to either side by rounding.
        assert abs(inside - histogram.counts[index]) <= 1


def test_nothing_measured_is_nothing() -> None:
    assert summarize([]) is None
    latency = summarize([0.1])
    assert latency is not None
    assert [q.bound_ms for q in latency.percentiles] == [None] * len(PERCENTILES)
