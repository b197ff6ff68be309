"""Intervals of means: how much of a figure is chance in the choice of frames; and the gate.

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

from edgehp.errors import AccuracyError, DataError, UsageError

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


# Of t below: table 26.10 of Abramowitz & Stegun, "Handbook of Mathematical Functions".
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(freedom: int) -> float:
    """Half the width, in standard errors, of a two-sided 95 % interval of Student's t.

    Beyond the table by its expansion in 1 / freedom (26.7.5 there), off by less than 0.0005.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**k for k, term in enumerate(terms)))


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


# --- the gate -------------------------------------------------------------------------------------
#
# How much worse than its FP32 reference an artifact may be. It is a test of non-inferiority: the
# drop passes where the upper end of its interval keeps the limit, not where the estimate happens
# to. A set that is too small to tell does not pass.

# Degrees of MAE. Plain per-channel INT8 loses a few thousandths: a tenth means something is wrong.
DEFAULT_MAX_DROP = 0.1
# More than any data set has: what asks for more cannot be told by measuring.
_MOST_UNITS = 1_000_000


@dataclass(frozen=True)
class GateResult:
    """The gate's answer.

    Attributes:
        passed: whether the upper end of the drop's interval is at most the limit.
        max_drop: the limit, degrees.
        needed: frames (or groups) that would do where the estimate is within the limit and the
            interval is not; None elsewhere.
        sentence: the answer for people, with the interval.
        hint: what to do about a drop that did not pass; empty where it did.
    """

    passed: bool
    max_drop: float
    needed: int | None
    sentence: str
    hint: str


def check_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Hold the interval of a drop against the limit.

    Args:
        drop: MAE of the artifact minus MAE of the reference, degrees.
        max_drop: the largest drop that passes, degrees.

    Raises:
        UsageError: the limit is negative or not finite.
    """
    if not 0 <= max_drop < float("inf"):
        raise UsageError(f"--max-drop {max_drop}: expected degrees, 0 or more")
    passed = drop.high <= max_drop
    plural = drop.unit + ("" if drop.units == 1 else "s")
    interval = "no interval"
    if math.isfinite(drop.high):
        interval = f"{drop.level:.0%} interval {drop.low:+.4f} to {drop.high:+.4f}"
    sentence = (
        f"the MAE drop of {drop.value:+.4f} degrees ({interval} over {drop.units} {plural}) "
        f"{'passes' if passed else 'fails'} the limit of {max_drop:g} degrees"
    )
    hint = (
        ""
        if passed
        else "keep more layers in floating point, calibrate with crops that look like the "
        "validation set, or raise --max-drop"
    )
    needed = None
    if not passed and drop.value <= max_drop:
        needed = _needed(drop, max_drop)
        verb = "is" if drop.units == 1 else "are"
        sentence += f"; the estimate keeps it, but {drop.units} {plural} {verb} too few to tell"
        enough = "many more" if needed is None else f"about {needed}"
        hint = f"validate on more {drop.unit}s ({enough} would do), or {hint}"
    return GateResult(passed, max_drop, needed, sentence, hint)


def require_drop(drop: Interval, max_drop: float = DEFAULT_MAX_DROP) -> GateResult:
    """Like `check_drop`, for a build that must not go on.

    Raises:
        AccuracyError: the drop is over the limit, or it cannot be told that it is not.
    """
    result = check_drop(drop, max_drop)
    if not result.passed:
        raise AccuracyError(f"{result.sentence}\nhint: {result.hint}")
    return result


def _needed(drop: Interval, max_drop: float) -> int | None:
    """How many units of the same spread would bring the upper end down to the limit."""
    margin = max_drop - drop.value
    if drop.units < 2 or margin <= 0 or not math.isfinite(drop.high):
        return None
    half = drop.high - drop.value
    deviation = half * math.sqrt(drop.units) / t_quantile(drop.units - 1)
    n = drop.units
    while t_quantile(n - 1) * deviation / math.sqrt(n) > margin:
        n = math.ceil(1.02 * n) + 1
        if n > _MOST_UNITS:
            return None
    return n
