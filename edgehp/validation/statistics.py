"""Bootstrap intervals: how much of a figure is chance in the choice of frames.

Everything edgehp puts an interval on is a mean over frames: the MAE (of a frame's error), or the
drop (of the difference of two networks' errors on the same frame, hence *paired*: what makes a
frame hard for both cancels). Frames that are not independent, such as those of one video, are
resampled together as a group.

Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError

__all__ = ["DEFAULT_RESAMPLES", "DEFAULT_SEED", "SMALL", "Interval", "mean_interval"]

Array = npt.NDArray[np.float64]

DEFAULT_RESAMPLES = 10_000
DEFAULT_SEED = 20240229
# Below this many independent units the percentile interval is visibly biased; BCa corrects it.
SMALL = 200
# Elements gathered at once: 32 MB of float64.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        value: the mean itself (the point estimate).
        low: lower end.
        high: upper end.
        level: nominal coverage, 0..1.
        method: ``"percentile"`` or ``"bca"``.
        units: how many independent units (frames or groups) were resampled.
        unit: ``"frame"`` or what a group is.
        resamples: how often.
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
    level: float = 0.95,
    resamples: int = DEFAULT_RESAMPLES,
    seed: int = DEFAULT_SEED,
    method: str = "auto",
) -> Interval:
    """The mean of `values` with a bootstrap interval.

    Args:
        values: [n], finite. For a paired interval of a drop: the differences per frame.
        groups: [n] names; values of one group are resampled together. None: each on its own.
        unit: what a group is, in a word, for reports.
        level: nominal coverage.
        resamples: number of bootstrap resamples.
        seed: of the resampling.
        method: ``"percentile"``, ``"bca"``, or ``"auto"``: BCa below `SMALL` units.

    Raises:
        DataError: no values, or one is not finite.
        UsageError: an argument out of its range.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or v.size == 0 or not np.isfinite(v).all():
        raise DataError(f"expected a list of finite values to resample, found shape {v.shape}")
    if not 0 < level < 1 or resamples < 100 or method not in ("auto", "percentile", "bca"):
        raise UsageError(
            f"bootstrap: level {level}, {resamples} resamples, method {method!r}: expected 0..1, "
            "at least 100, and percentile, bca or auto"
        )
    sums, counts = _units(v, groups)
    n = len(sums)
    chosen = ("bca" if n < SMALL else "percentile") if method == "auto" else method
    mean = float(v.mean())
    tail = (1 - level) / 2
    if n == 1:
        # One unit says nothing about the next: no interval, and honestly so.
        low, high = -np.inf, np.inf
    else:
        means = _resampled(sums, counts, resamples, np.random.default_rng(seed))
        ends = (tail, 1 - tail)
        if chosen == "bca":
            ends = _bca_levels(means, mean, _jackknife(sums, counts), tail)
        low, high = np.quantile(means, ends)
    return Interval(mean, float(low), float(high), level, chosen, n, unit, resamples, seed)


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


def _jackknife(sums: Array, counts: Array) -> Array:
    return np.asarray((sums.sum() - sums) / (counts.sum() - counts))


def _bca_levels(means: Array, mean: float, jackknife: Array, tail: float) -> tuple[float, float]:
    """Quantile levels of the bias-corrected and accelerated interval (chapter 14.3)."""
    normal = NormalDist()
    # Half of the ties count as below: a statistic that hardly varies must not look biased.
    below = float(((means < mean) + 0.5 * (means == mean)).mean())
    if not 0 < below < 1:
        return tail, 1 - tail
    z0 = normal.inv_cdf(below)
    centred = jackknife.mean() - jackknife
    scale = float((centred**2).sum()) ** 1.5
    a = 0.0 if scale == 0 else float((centred**3).sum()) / (6 * scale)
    levels = []
    for z in (normal.inv_cdf(tail), normal.inv_cdf(1 - tail)):
        levels.append(normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))
    return levels[0], levels[1]
