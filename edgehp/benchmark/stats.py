"""Latencies as whole distributions, and how much faster one network is than another.

Nothing is ever clipped: the slowest inference is the one a review asks about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgehp.benchmark.lanes import Turn
from edgehp.files import Record
from edgehp.validation.statistics import mean_interval

Array = npt.NDArray[np.float64]

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
# Of the upper bound of a percentile, as MLPerf Inference asks in its early-stopping rule.
CONFIDENCE = 0.99
# Buckets a factor of two: the width of one is at most 1/64 (1.6 %) of its value.
SUB_BUCKETS = 64
# Nothing that is timed here is shorter; shorter values share the first bucket.
_UNIT_S = 1e-7


class Percentile(Record, frozen=True):
    """One percentile of a sample.

    Attributes:
        p: 0..100.
        ms: nearest-rank value, one that was really measured.
        bound_ms: the percentile of the process is below this at 99 % confidence; None where the
            sample is too small to say.
        needed: how large a sample must be for a bound.
    """

    p: float
    ms: float
    bound_ms: float | None
    needed: int


class Histogram(Record, frozen=True):
    """Counts in buckets of a constant relative width, after HdrHistogram.

    Bucket ``i`` holds values from ``unit_s * 2**(i / buckets_per_octave)`` seconds up to, but not
    including, the lower end of the next one; values below `unit_s` are in bucket 0.
    """

    counts: dict[int, int]
    unit_s: float = _UNIT_S
    buckets_per_octave: int = SUB_BUCKETS

    @classmethod
    def of(cls, seconds: npt.ArrayLike) -> Histogram:
        """The histogram of durations in seconds."""
        values = np.asarray(seconds, np.float64)
        index = np.floor(np.log2(np.maximum(values, _UNIT_S) / _UNIT_S) * SUB_BUCKETS)
        found, counts = np.unique(index.astype(np.int64), return_counts=True)
        return cls({int(i): int(c) for i, c in zip(found, counts, strict=True)})

    def edges(self, index: int) -> tuple[float, float]:
        """Lower and upper end of a bucket, seconds."""
        low, high = (2 ** (i / self.buckets_per_octave) for i in (index, index + 1))
        return self.unit_s * low, self.unit_s * high


class Latency(Record, frozen=True):
    """A sample of durations, in milliseconds, the unit people compare in.

    Attributes:
        count: how many.
        mean_ms: their mean.
        max_ms: the slowest of all, never clipped.
        percentiles: 50, 90, 95, 99 and 99.9.
        histogram: of all of them.
    """

    count: int
    mean_ms: float
    max_ms: float
    percentiles: tuple[Percentile, ...]
    histogram: Histogram

    def at(self, p: float) -> Percentile:
        """The percentile `p`, one of `PERCENTILES`."""
        return next(q for q in self.percentiles if q.p == p)


def percentile(ordered: Array, p: float) -> float:
    """Nearest-rank percentile, 0..100, of values in ascending order: one that was measured."""
    # The tiny step back undoes what 99.9 / 100 * 1000 rounds up.
    rank = math.ceil(p / 100 * ordered.size - 1e-9)
    return float(ordered[max(rank, 1) - 1])


def needed_for(p: float) -> int:
    """Fewest values of which the largest bounds percentile `p` with confidence `CONFIDENCE`.

    From P(all n values lie below the percentile) = (p/100)^n <= 1 - confidence.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(p / 100))


def upper_bound(ordered: Array, p: float) -> float | None:
    """An upper confidence bound of a percentile, free of any assumption on the distribution.

    The smallest order statistic x(k) with P(Binomial(n, p) < k) >= `CONFIDENCE`: the binomial bound
    that MLPerf Inference's early-stopping rule rests on (mlcommons/inference, "Early Stopping
    Criterion"). None where even the largest value is none: the sample is too small.
    """
    n = ordered.size
    if n < needed_for(p):
        return None
    # j values lie above the percentile: Binomial(n, 1 - p). x(n - j) is a bound as long as
    # P(at most j above) <= 1 - CONFIDENCE; log space, because 0.999^600000 has no float.
    above = 1 - p / 100
    j = np.arange(n, dtype=np.float64)
    steps = np.log((n - j) / (j + 1)) + (math.log(above) - math.log1p(-above))
    log_pmf = n * math.log1p(-above) + np.concatenate(([0.0], np.cumsum(steps)))
    cdf = np.cumsum(np.exp(log_pmf))
    allowed = int(np.searchsorted(cdf, 1 - CONFIDENCE, side="right")) - 1
    return float(ordered[n - 1 - max(allowed, 0)])


def summarize(seconds: npt.ArrayLike) -> Latency | None:
    """Everything about a sample of durations in seconds; None for an empty one."""
    ordered = np.sort(np.asarray(seconds, np.float64))
    if ordered.size == 0:
        return None
    percentiles = []
    for p in PERCENTILES:
        bound = upper_bound(ordered, p)
        bound_ms = None if bound is None else bound * 1e3
        at = percentile(ordered, p) * 1e3
        percentiles.append(Percentile(p, at, bound_ms, needed_for(p)))
    mean, last = float(ordered.mean()) * 1e3, float(ordered[-1]) * 1e3
    return Latency(int(ordered.size), mean, last, tuple(percentiles), Histogram.of(ordered))


class Speedup(Record, frozen=True):
    """How many times faster the artifact is.

    Attributes:
        mode: of the turns.
        stage: whose medians are compared, or ``"images_per_s"``.
        ratio: geometric mean over pairs of turns, reference over artifact; above 1 is faster.
        low: lower end of the 95 % interval over pairs; None for fewer than three.
        high: the upper end.
        pairs: turns compared.
    """

    mode: str
    stage: str
    ratio: float
    low: float | None
    high: float | None
    pairs: int


def speedup(artifact: Sequence[Turn], reference: Sequence[Turn], stage: str) -> Speedup | None:
    """Compare turns in the order they were taken, the i-th with the i-th.

    Turns of a pair follow each other within seconds, so what the machine does to both cancels.

    Args:
        artifact: its turns.
        reference: those of the other, in the same mode.
        stage: a stage whose medians are compared, or ``"images_per_s"``.

    Returns:
        None where no pair has figures.
    """
    logs = []
    for a, b in zip(artifact, reference, strict=False):
        time_a, time_b = _time(a, stage), _time(b, stage)
        if time_a and time_b:
            logs.append(math.log(time_b / time_a))
    if not logs:
        return None
    interval = mean_interval(logs)
    enough = len(logs) >= 3
    return Speedup(
        artifact[0].mode,
        stage,
        math.exp(interval.value),
        math.exp(interval.low) if enough else None,
        math.exp(interval.high) if enough else None,
        len(logs),
    )


def _time(turn: Turn, stage: str) -> float | None:
    """Seconds of one image or call in this turn."""
    if stage == "images_per_s":
        return turn.seconds / turn.images if turn.images else None
    values = turn.stages.get(stage)
    return float(np.median(values)) if values is not None and values.size else None
