"""Streaming observers: one pass over any number of crops in the same memory.

A `TensorObserver` keeps a signed histogram over ``[-R, R)`` with R a power of two that doubles when
a larger value comes (neighbouring bins are then added). Because all grids nest, the histogram of a
set of crops does not depend on their order or on the batch size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError

__all__ = ["BINS", "Statistics", "TensorObserver", "weight_ranges"]

BINS = 8192  # of the signed histogram: 2048 to 4096 per side, as TensorRT's calibrator or finer
_HALF = BINS // 2
_SMALLEST = 2.0**-40
_CHUNK = 1 << 20  # values binned at once: bounds the temporary arrays to about 16 MiB

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """What was seen of one tensor.

    Attributes:
        name: of the tensor.
        minimum: smallest value.
        maximum: largest value.
        counts: int64 [BINS], values per bin of ``[-limit, limit)``; zero sits at the start of bin
            ``BINS / 2``.
        limit: end of the histogram, a power of two.
        channel_mean: float64 [C], mean per channel (axis 1).
        channel_peak: float64 [C], largest magnitude per channel in a crop, mean over crops.
    """

    name: str
    minimum: float
    maximum: float
    counts: npt.NDArray[np.int64]
    limit: float
    channel_mean: Array
    channel_peak: Array

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.limit / _HALF

    @property
    def centres(self) -> Array:
        """Centres of the bins, float64 [BINS]."""
        return np.asarray((np.arange(BINS) - _HALF + 0.5) * self.width, np.float64)

    @property
    def magnitudes(self) -> npt.NDArray[np.int64]:
        """Counts of the absolute value, int64 [BINS / 2], bins over ``[0, limit)``."""
        return self.counts[_HALF:] + self.counts[_HALF - 1 :: -1]


class TensorObserver:
    """Minimum, maximum, histogram, channel means and channel peaks of one tensor."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._minimum = math.inf
        self._maximum = -math.inf
        self._limit = _SMALLEST
        self._counts = np.zeros(BINS, np.int64)
        self._sums: Array | None = None
        self._peaks: Array | None = None
        self._seen = 0  # values per channel
        self._crops = 0

    def update(self, values: npt.NDArray[np.float32]) -> None:
        """Take in a batch [N, C, ...].

        Raises:
            DataError: a value is not finite, or the number of channels changed.
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
        scale = np.float32(_HALF / self._limit)  # a power of two: the product is exact
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            index = flat[start : start + _CHUNK] * scale
            np.floor(index, out=index)
            bins = index.astype(np.int32)
            bins += _HALF
            np.minimum(bins, BINS - 1, out=bins)
            self._counts += np.bincount(bins, minlength=BINS)
        self._add_channels(values)

    def _grow(self, magnitude: float) -> None:
        if self._minimum == self._maximum == 0.0:
            return
        wanted = 2.0 ** math.ceil(math.log2(max(magnitude, _SMALLEST)))
        if not self._counts.any():
            self._limit = max(self._limit, wanted)
        while self._limit < wanted:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.zeros(BINS, np.int64)
            self._counts[_HALF // 2 : _HALF // 2 + _HALF] = merged
            self._limit *= 2

    def _add_channels(self, values: npt.NDArray[np.float32]) -> None:
        # Sum over pixels in float32 pairwise, over crops in float64: a plain float32 sum over
        # thousands of crops would lose the last digits.
        if values.ndim < 2:
            values = values.reshape(1, -1)
        pixels = values.reshape(values.shape[0], values.shape[1], -1)
        sums = pixels.sum(2).astype(np.float64).sum(0)
        peaks = np.maximum(pixels.max(2), -pixels.min(2)).astype(np.float64).sum(0)
        if self._sums is None or self._peaks is None:
            self._sums, self._peaks = np.zeros_like(sums), np.zeros_like(peaks)
        if sums.shape != self._sums.shape:
            raise DataError(
                f"{self._name}: {sums.size} channels after {self._sums.size}; "
                "one network has one number"
            )
        self._sums += sums
        self._peaks += peaks
        self._crops += pixels.shape[0]
        self._seen += pixels.shape[0] * pixels.shape[2]

    def statistics(self) -> Statistics:
        """What was seen so far.

        Raises:
            DataError: nothing was seen.
        """
        if self._sums is None or self._peaks is None:
            raise DataError(f"{self._name}: no crops were observed; calibration needs some")
        return Statistics(
            self._name,
            self._minimum,
            self._maximum,
            self._counts.copy(),
            self._limit,
            self._sums / self._seen,
            self._peaks / self._crops,
        )


def weight_ranges(weight: npt.NDArray[np.floating]) -> Array:
    """Largest magnitude per output channel (axis 0) of a weight [Cout, ...]: float64 [Cout].

    Raises:
        DataError: a weight is not finite.
    """
    ranges = np.abs(weight.reshape(weight.shape[0], -1)).max(1).astype(np.float64)
    if not np.isfinite(ranges).all():
        raise DataError("a weight is not finite; the checkpoint is damaged")
    return np.asarray(ranges, np.float64)
