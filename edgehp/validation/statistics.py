"""Intervals of means: how much of a figure is chance in the choice of frames.

Everything edgehp puts an interval on is a mean over units: the MAE (of a frame's error), the drop
(of the difference of two networks' errors on the same frame, hence *paired*: what makes a frame
hard for both cancels) or the logarithm of a ratio (of two networks' times in a pair of turns).
Frames that are not independent, such as those of one video, count as one unit.

From `SMALL` units on the interval is a percentile bootstrap, below it is Student's t. A plain
percentile interval is too narrow by sqrt((n - 1) / n) and by the normal quantile in place of t's;
both are corrected by taking percentiles further out (the *expanded* percentile interval).

Sources: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Hesterberg, "What
Teachers Should Know About the Bootstrap", The American Statistician 69(4), 2015, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError

__all__ = ["DEFAULT_RESAMPLES", "DEFAULT_SEED", "SMALL", "Interval", "mean_interval", "t_quantile"]

Array = npt.NDArray[np.float64]

LEVEL = 0.95
DEFAULT_RESAMPLES = 10_000
DEFAULT_SEED = 20240229
# Below this many independent units there is too little to resample from.
SMALL = 15
# Elements gathered at once: 32 MB of float64.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its interval.

    Attributes:
        value: the mean itself (the point estimate).
        low: lower end.
        high: upper end.
        level: nominal coverage, 0..1.
        method: ``"percentile"`` or ``"t"``.
        units: how many independent units (frames or groups) there are.
        unit: ``"frame"`` or what a group is.
        resamples: of the bootstrap; 0 for t.
        seed: of the resampling.
    """

    value: float
    low: float
    high: float
    level: float
    method: str
    units: int
    unit: str
    resamples: int
    seed: int


def mean_interval(
    values: npt.ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    unit: str = "frame",
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = DEFAULT_SEED,
) -> Interval:
    """The mean of `values` with an interval of 95 %.

    Args:
        values: [n], finite. For a drop: the differences per frame. For a ratio: its logarithms.
        groups: [n] names; values of one group are one unit. None: each on its own.
        unit: what a group is, in a word, for reports.
        resamples: number of bootstrap resamples, at least 100.
        seed: of the resampling.

    Returns:
        The interval; without bounds where there is one unit, which says nothing about the next.

    Raises:
        DataError: no values, or one is not finite.
        UsageError: an argument out of its range.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or v.size == 0 or not np.isfinite(v).all():
        raise DataError(f"expected a list of finite values, found the shape {v.shape}")
    if resamples < 100:
        raise UsageError(f"{resamples} bootstrap resamples; expected at least 100")
    sums, counts = _units(v, groups)
    n = len(sums)
    mean = float(v.mean())
    low, high = -math.inf, math.inf
    method = "t" if n < SMALL else "percentile"
    if n >= SMALL:
        means = _resampled(sums, counts, resamples, np.random.default_rng(seed))
        tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1))
        low, high = (float(q) for q in np.quantile(means, (tail, 1 - tail)))
    elif n > 1:
        # Of a mean over units of different sizes, by linearization; equal sizes give the usual one.
        deviations = (sums - mean * counts) / counts.mean()
        error = math.sqrt(float((deviations**2).sum()) / (n - 1) / n)
        half = t_quantile(n - 1) * error
        low, high = mean - half, mean + half
    return Interval(mean, low, high, LEVEL, method, n, unit, resamples if n >= SMALL else 0, seed)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Half the width, in standard errors, of a two-sided interval of Student's t.

    By bisection of the closed form of the distribution for whole degrees of freedom (Abramowitz &
    Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4).

    Args:
        freedom: degrees of freedom, at least 1.
        level: coverage, 0..1.
    """
    if freedom > 1000:
        # Off by less than 0.2 %.
        return NormalDist().inv_cdf((1 + level) / 2)
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < level else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _units(values: Array, groups: Sequence[str] | None) -> tuple[Array, Array]:
    """Sum and number of the values of each independent unit."""
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise UsageError(f"{len(groups)} group names for {len(values)} values")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums: Array = np.asarray(np.bincount(index, weights=values), np.float64)
    return sums, np.bincount(index).astype(np.float64)


def _resampled(sums: Array, counts: Array, resamples: int, rng: np.random.Generator) -> Array:
    n = len(sums)
    rows = max(1, _CHUNK // n)
    equal = bool((counts == counts[0]).all())
    out = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        index = rng.integers(0, n, (stop - start, n), dtype=np.int32)
        total = sums[index].sum(axis=1)
        weight = n * counts[0] if equal else counts[index].sum(axis=1)
        out[start:stop] = total / weight
    return out
