"""Activation ranges: histograms of what a tensor holds, and the range that 8 bits should cover.

A `TensorObserver` keeps a signed histogram over ``[-R, R)`` with R a power of two that doubles when
a larger value comes (neighbouring bins are then added). Because all grids nest, the histogram of a
set of crops does not depend on their order or on the batch size.

Two grids: ``"int8"`` is symmetric, 127 steps either side of zero; ``"uint8"`` has 255 steps between
two ends that include zero. Each of the four `METHODS` gives a range ``(low, high)`` for each grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError

GRIDS = ("int8", "uint8")
BINS = 8192  # of the signed histogram: 2048 to 4096 per side, as TensorRT's calibrator or finer
_ZERO = BINS // 2
_SMALLEST = 2.0**-40
# Values of a crop that enter the histogram. Neighbouring pixels say almost the same, and counting
# all of them takes longer than the network. The extremes are those of all values.
_COUNTED = 1 << 13
_PERCENTILE = 99.99  # of the absolute value, the usual choice of Wu et al., arXiv 2004.09602
_KL_BINS = 2048  # TensorRT's calibrator: 2048 bins of the absolute value, 128 levels
_KL_STEP = 8

Range = tuple[float, float]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """What was seen of one tensor.

    Attributes:
        minimum: smallest value.
        maximum: largest value.
        counts: int64 [BINS], values per bin of ``[-limit, limit)``; zero sits at the start of bin
            ``BINS / 2``.
        limit: end of the histogram, a power of two.
    """

    minimum: float
    maximum: float
    counts: npt.NDArray[np.int64]
    limit: float

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.limit / _ZERO

    @property
    def centers(self) -> Array:
        """Centers of the bins, float64 [BINS]."""
        return np.asarray((np.arange(BINS) - _ZERO + 0.5) * self.width, np.float64)

    @property
    def magnitudes(self) -> npt.NDArray[np.int64]:
        """Counts of the absolute value, int64 [BINS / 2], bins over ``[0, limit)``."""
        return self.counts[_ZERO:] + self.counts[_ZERO - 1 :: -1]


class TensorObserver:
    """Minimum, maximum and histogram of one tensor, in the same memory for any number of crops.

    Args:
        name: of the tensor, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._minimum = math.inf
        self._maximum = -math.inf
        self._limit = _SMALLEST
        self._counts = np.zeros(BINS, np.int64)

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Take in a batch [N, C, ...].

        Raises:
            DataError: a value is not finite.
        """
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"{self._name}: the float network computes values that are not finite; "
                "its weights or the crops are damaged"
            )
        self._minimum, self._maximum = min(self._minimum, low), max(self._maximum, high)
        self._grow(max(-low, high))
        rows = values.reshape(len(values), -1)
        # An odd step comes by all pixels and channels.
        step = 1 if rows.shape[1] <= _COUNTED else rows.shape[1] // _COUNTED | 1
        # A power of two: the product is exact.
        index = rows[:, ::step] * np.float32(_ZERO / self._limit)
        np.floor(index, out=index)
        bins = index.astype(np.int32).reshape(-1)
        bins += _ZERO
        np.minimum(bins, BINS - 1, out=bins)
        self._counts += np.bincount(bins, minlength=BINS)

    def _grow(self, magnitude: float) -> None:
        if self._minimum == self._maximum == 0.0:
            return
        wanted = 2.0 ** math.ceil(math.log2(max(magnitude, _SMALLEST)))
        if not self._counts.any():
            self._limit = max(self._limit, wanted)
        while self._limit < wanted:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.zeros(BINS, np.int64)
            self._counts[_ZERO // 2 : _ZERO // 2 + _ZERO] = merged
            self._limit *= 2

    def statistics(self) -> Statistics:
        """What was seen so far.

        Raises:
            DataError: nothing was seen.
        """
        if self._minimum > self._maximum:
            raise DataError(f"{self._name}: no crops were observed; calibration needs some")
        return Statistics(self._minimum, self._maximum, self._counts.copy(), self._limit)


def find_range(seen: Statistics, method: str, grid: str) -> Range:
    """The range that `method` chooses for a tensor on `grid`; ``low <= 0 <= high``.

    Raises:
        UsageError: unknown method or grid.
    """
    if method not in METHODS or grid not in GRIDS:
        known = f"methods {', '.join(METHODS)}; grids {', '.join(GRIDS)}"
        raise UsageError(f"calibration by {method!r} on {grid!r} is unknown; known {known}")
    low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    if low == high:  # nothing but zeros: any positive range is right
        return (-1.0, 1.0) if grid == "int8" else (0.0, 1.0)
    if grid == "int8":
        threshold = METHODS[method](seen, 127, max(-low, high))
        return -threshold, threshold
    if low == 0.0:
        return 0.0, METHODS[method](seen, 255, high)
    if method == "mse":
        return _mse_two_sided(seen, low, high)
    # Two-sided: the symmetric choice, cut to what was seen.
    threshold = METHODS[method](seen, 127, max(-low, high))
    return max(low, -threshold), min(high, threshold)


def _minmax(seen: Statistics, levels: int, largest: float) -> float:
    return largest


def _percentile(seen: Statistics, levels: int, largest: float) -> float:
    cumulative = np.cumsum(seen.magnitudes)
    wanted = cumulative[-1] * (_PERCENTILE / 100.0)
    index = int(np.searchsorted(cumulative, wanted))
    return float(min((index + 1) * seen.width, largest))


def _entropy(seen: Statistics, levels: int, largest: float) -> float:
    """TensorRT's entropy calibration (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Zeros are represented exactly, so their spike says nothing: their bin takes its neighbour's
    count, as NVIDIA's own tools do.
    """
    used = int(np.ceil(largest / seen.width - 1e-9))
    # A whole number of fine bins per bin: with a fraction, bins would hold unequal shares.
    factor = -(-used // _KL_BINS)
    bins = -(-used // factor)
    counts = seen.magnitudes[: bins * factor].reshape(bins, factor).sum(1).astype(np.float64)
    counts[0] = counts[min(1, bins - 1)]
    levels_used = levels + 1
    if bins <= levels_used:
        return largest
    best, threshold = np.inf, largest
    for end in range(bins, levels_used - 1, -_KL_STEP):
        divergence = _divergence(counts, end, levels_used)
        if divergence < best:
            best, threshold = divergence, min(end * factor * seen.width, largest)
    return threshold


def _divergence(counts: Array, end: int, levels: int) -> float:
    """KL(reference || quantized) when values beyond bin `end` are clipped into the last one."""
    kept = counts[:end]
    reference = kept.copy()
    reference[-1] += counts[end:].sum()
    nonzero = reference > 0
    group = np.arange(end) * levels // end
    totals = np.bincount(group, kept, levels)
    members = np.bincount(group, nonzero.astype(np.float64), levels)
    spread = np.divide(totals, members, out=np.zeros(levels), where=members > 0)[group]
    p = reference[nonzero] / reference.sum()
    q = spread[nonzero]
    if q.sum() == 0:
        return float("inf")
    q = np.maximum(q / q.sum(), 1e-12)
    return float(np.sum(p * np.log(p / q)))


def _mse(seen: Statistics, levels: int, largest: float) -> float:
    x = seen.centers[_ZERO:]
    counts = seen.magnitudes.astype(np.float64)
    # Bin 0 holds the exact zeros of ReLU, which cost nothing whatever the scale.
    counts[0] = 0.0
    used = counts > 0
    x, counts = x[used], counts[used]
    if x.size == 0:
        return largest
    candidates = largest * np.linspace(0.2, 1.0, 81)
    errors = [_squared_error(x, counts, t / levels, 0.0, t) for t in candidates]
    return float(candidates[int(np.argmin(errors))])


def _squared_error(x: Array, counts: Array, scale: float, low: float, high: float) -> float:
    rounded = np.clip(np.round(x / scale) * scale, low, high)
    return float(np.sum(counts * (x - rounded) ** 2))


def _mse_two_sided(seen: Statistics, low: float, high: float) -> Range:
    counts = seen.counts.astype(np.float64)
    used = counts > 0
    x, counts = seen.centers[used], counts[used]
    best = (low, high)
    factors = np.linspace(0.3, 1.0, 36)

    def error(ends: Range) -> float:
        return _squared_error(x, counts, max(ends[1] - ends[0], 1e-30) / 255.0, *ends)

    # Both ends in turn, twice: the optimum is flat and the two hardly interact.
    for _ in range(2):
        best = min(((low * f, best[1]) for f in factors), key=error)
        best = min(((best[0], high * f) for f in factors), key=error)
    return best


METHODS: Mapping[str, Callable[[Statistics, int, float], float]] = MappingProxyType(
    {"minmax": _minmax, "percentile": _percentile, "entropy": _entropy, "mse": _mse}
)
