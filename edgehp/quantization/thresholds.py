"""From a histogram to the range that 8 bits should cover: min-max, percentile, entropy, MSE.

Two grids: ``"int8"`` is symmetric, 127 steps either side of zero; ``"uint8"`` has 255 steps between
two ends that include zero. Every method gives a range ``(low, high)`` for each grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.observers import BINS, Statistics

__all__ = ["ALGORITHM", "GRIDS", "METHODS", "Range", "find_range"]

# Raised when any method below would give other numbers for the same crops.
ALGORITHM = 1
GRIDS = ("int8", "uint8")

Range = tuple[float, float]
Array = npt.NDArray[np.float64]

_PERCENTILE = 99.99  # of the absolute value, the usual choice of Wu et al., arXiv 2004.09602
_KL_BINS = 2048  # TensorRT's calibrator: 2048 bins of the absolute value, 128 levels
_KL_STEP = 8
_ZERO = BINS // 2


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
    return min((index + 1) * seen.width, largest)


def _entropy(seen: Statistics, levels: int, largest: float) -> float:
    """TensorRT's entropy calibration (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Zeros are represented exactly, so their spike says nothing: their bin takes its neighbour's
    count, as NVIDIA's own tools do.
    """
    used = int(np.ceil(largest / seen.width - 1e-9))
    # Whole numbers of fine bins per bin: a fraction would comb the counts.
    factor = -(-used // _KL_BINS)
    bins = -(-used // factor)
    counts = seen.magnitudes[: bins * factor].reshape(bins, factor).sum(1).astype(np.float64)
    counts[0] = counts[min(1, bins - 1)]
    quantised = levels + 1
    if bins <= quantised:
        return largest
    best, threshold = np.inf, largest
    for end in range(bins, quantised - 1, -_KL_STEP):
        divergence = _divergence(counts, end, quantised)
        if divergence < best:
            best, threshold = divergence, min(end * factor * seen.width, largest)
    return threshold


def _divergence(counts: Array, end: int, levels: int) -> float:
    """KL(reference || quantised) when values beyond bin `end` are clipped into the last one."""
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
    x = seen.centres[_ZERO:]
    counts = seen.magnitudes.astype(np.float64)
    # Bin 0 holds the exact zeros of ReLU, which cost nothing whatever the scale.
    counts[0] = 0.0
    used = counts > 0
    x, counts = x[used], counts[used]
    if x.size == 0:
        return largest
    candidates = largest * np.linspace(0.2, 1.0, 161)
    errors = [_squared_error(x, counts, t / levels, 0.0, t) for t in candidates]
    return float(candidates[int(np.argmin(errors))])


def _squared_error(x: Array, counts: Array, scale: float, low: float, high: float) -> float:
    rounded = np.clip(np.round(x / scale) * scale, low, high)
    return float(np.sum(counts * (x - rounded) ** 2))


def _mse_two_sided(seen: Statistics, low: float, high: float) -> Range:
    counts = seen.counts.astype(np.float64)
    used = counts > 0
    x, counts = seen.centres[used], counts[used]
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
