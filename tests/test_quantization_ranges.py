"""Observers and thresholds: exact, independent of batches and order, and better than min-max."""

from __future__ import annotations

import numpy as np
import pytest

from edgehp.errors import DataError, UsageError
from edgehp.quantization.qdq import quantize_activation, scale_of
from edgehp.quantization.ranges import (
    BINS,
    GRIDS,
    METHODS,
    Statistics,
    TensorObserver,
    find_range,
)


def observe(*batches: np.ndarray) -> Statistics:
    observer = TensorObserver("x")
    for batch in batches:
        observer.update(batch.astype(np.float32))
    return observer.statistics()


def rounding_error(x: np.ndarray, method: str, grid: str, seen: Statistics) -> float:
    ends = find_range(seen, method, grid)
    return float(np.mean((x - quantize_activation(x, *scale_of(ends, grid), grid)) ** 2))


def test_the_histogram_does_not_depend_on_batches_or_order(rng: np.random.Generator) -> None:
    # Growing magnitudes force the range to double many times in one order, never in the other.
    x = rng.normal(0, 1, (64, 4, 5, 5)) * np.logspace(-6, 3, 64).reshape(-1, 1, 1, 1)
    x = x.astype(np.float32)
    one = observe(x)
    for other in (observe(*x[:, None]), observe(*x[::-1, None]), observe(x[:7], x[7:])):
        assert other.limit == one.limit
        np.testing.assert_array_equal(other.counts, one.counts)
        assert (other.minimum, other.maximum) == (one.minimum, one.maximum)
    assert one.counts.sum() == x.size
    edges = (np.arange(BINS + 1) - BINS // 2) * one.width
    np.testing.assert_array_equal(one.counts, np.histogram(x, edges)[0])


def test_large_tensors_are_sampled_and_their_extremes_are_exact(rng: np.random.Generator) -> None:
    x = rng.normal(0, 1, (2, 16, 112, 112)).astype(np.float32)
    x[1, 3, 50, 60] = -9.0
    seen = observe(x)
    assert (seen.minimum, seen.maximum) == (x.min(), x.max())
    assert 2 * 2**12 < seen.counts.sum() <= 2 * 2**14
    for one in (observe(x[:1], x[1:]), observe(x[1:], x[:1])):
        np.testing.assert_array_equal(one.counts, seen.counts)
    share = seen.counts / seen.counts.sum()
    everything = np.histogram(x, (np.arange(BINS + 1) - BINS // 2) * seen.width)[0] / x.size
    # Kolmogorov: a random sample of so many is further away once in 10^5 seeds.
    apart = 2.5 / np.sqrt(seen.counts.sum())
    np.testing.assert_allclose(np.cumsum(share), np.cumsum(everything), atol=apart)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("relu", [True, False])
def test_methods_on_a_tensor_with_a_far_outlier(
    rng: np.random.Generator, grid: str, relu: bool
) -> None:
    x = rng.laplace(0, 1, 200_000).astype(np.float32)
    x[0] = 60.0
    x = np.maximum(x, 0) if relu else x
    seen = observe(x[:, None])
    ranges = {m: find_range(seen, m, grid) for m in METHODS}
    assert ranges["minmax"][1] == 60.0
    for method in ("percentile", "entropy", "mse"):
        low, high = ranges[method]
        # With 256 levels and a tail of empty bins the divergence is flat: only an upper bound.
        assert 3 < high <= (60 if method == "entropy" else 55)
        assert low <= 0
    errors = {m: rounding_error(x, m, grid, seen) for m in METHODS}
    # The outlier costs the mean squared error something too, so only these two must win by it.
    assert errors["mse"] <= 1.01 * min(errors.values())
    assert errors["mse"] < 0.95 * errors["minmax"]


def test_percentile_covers_its_share(rng: np.random.Generator) -> None:
    x = rng.random(100_000).astype(np.float32)
    low, high = find_range(observe(x[:, None]), "percentile", "int8")
    assert low == -high
    assert np.mean(x <= high) == pytest.approx(0.9999, abs=3e-4)


def test_entropy_finds_what_the_definition_says(rng: np.random.Generator) -> None:
    # A direct reading of the published algorithm, bin by bin, on the same histogram.
    x = np.abs(rng.normal(0, 1, 50_000)).astype(np.float32)
    x[:5] = 7.9
    seen = observe(x[:, None])
    counts = seen.magnitudes.reshape(-1, 2).sum(1).astype(float)  # 2048 bins over [0, 8)
    counts = counts[: int(np.ceil(x.max() / (2 * seen.width)))]
    counts[0] = counts[1]
    best = (np.inf, 0)
    for end in range(len(counts), 127, -8):
        p = counts[:end].copy()
        p[-1] += counts[end:].sum()
        q = np.zeros(end)
        for part in (np.flatnonzero(np.arange(end) * 128 // end == i) for i in range(128)):
            used = p[part] > 0
            if used.any():
                q[part[used]] = counts[part].sum() / used.sum()
        keep = p > 0
        p, q = p[keep] / p.sum(), np.maximum(q[keep] / q.sum(), 1e-12)
        best = min(best, (float((p * np.log(p / q)).sum()), end))
    expected = min(best[1] * 2 * seen.width, x.max())
    assert find_range(seen, "entropy", "int8")[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_awkward_tensors_have_a_usable_range(method: str) -> None:
    for x in ([0.0, 0.0], [5.0, 5.0], [-3.0, -3.0], [1e-12, 2e-12], [-1e30, 1e30], [0.0, 1.0]):
        seen = observe(np.array([x]))
        for grid in GRIDS:
            low, high = find_range(seen, method, grid)
            scale, zero = scale_of((low, high), grid)
            assert low <= 0 <= high
            assert low < high
            assert scale > 0
            assert 0 <= zero <= 255
            # Zero is exact: padding and ReLU depend on it.
            assert quantize_activation(np.zeros(1, np.float32), scale, zero, grid)[0] == 0


def test_what_has_no_range_is_refused() -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(DataError, match="not finite"):
            observe(np.array([[1.0, value]]))
    with pytest.raises(DataError, match="no crops"):
        TensorObserver("x").statistics()
    for method, grid in (("magic", "int8"), ("mse", "int4")):
        with pytest.raises(UsageError, match="known"):
            find_range(observe(np.ones((1, 2))), method, grid)
