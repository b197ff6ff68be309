"""Round a layer's weights together instead of one by one, so that their errors cancel.

The output error of a layer is a quadratic form of its weights' errors D, separate for each output
channel: ``tr(D A D^T)`` with ``A`` the covariance of the inputs as the quantised network sees them.
It is minimised over the integers by coordinate descent, one column at a time, as in QuantEase
(Behdin et al., arXiv 2309.01885); the mean error goes into the bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Moments", "round_jointly"]

_INT8 = 127
_BLOCK = 128
# Samples multiplied at once: each product reads and writes the whole matrix.
_TOGETHER = 1024
_SWEEPS = 3

Array = npt.NDArray[np.float32]


class Moments:
    """Mean and covariance of a layer's inputs, summed over samples.

    Args:
        inputs: K, number of weights of an output channel.
    """

    def __init__(self, inputs: int) -> None:
        self._products = np.zeros((inputs, inputs), np.float32)
        self._sum = np.zeros(inputs, np.float64)
        self._origin: Array | None = None
        self._waiting: list[Array] = []
        self._count = 0

    def update(self, x: Array) -> None:
        """Add samples, float32 [N, K]."""
        if self._origin is None:
            # Near the mean: sums of squares in float32 keep their digits.
            self._origin = x.mean(0)
        x = x - self._origin
        self._sum += x.sum(0, dtype=np.float64)
        self._count += len(x)
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            x = np.concatenate(self._waiting)
            self._waiting.clear()
            # The upper half only, by strips: a product of the whole size would double the memory.
            for part in _strips(len(self._products)):
                self._products[part, part.start :] += x[:, part].T @ x[:, part.start :]

    def finish(self) -> tuple[npt.NDArray[np.float64], Array]:
        """Mean [K] and covariance [K, K]. To be called once: it works in place."""
        self._flush()
        count = max(self._count, 1)
        mean = self._sum / count
        small = mean.astype(np.float32)
        self._products /= np.float32(count)
        for part in _strips(len(small)):
            behind = slice(part.start, None)
            self._products[part, behind] -= np.outer(small[part], small[behind])
            self._products[behind, part] = self._products[part, behind].T
        origin = 0.0 if self._origin is None else self._origin.astype(np.float64)
        return mean + origin, self._products


def round_jointly(
    weight: Array,
    scales: npt.NDArray[np.floating],
    moments: Moments,
    *,
    damping: float = 0.01,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Integers whose answer to the inputs is nearest to that of `weight`.

    Args:
        weight: float32 [Cout, K].
        scales: [Cout], positive.
        moments: of the layer; used up.
        damping: how strongly a weight is held at its own value where the samples say little, as a
            share of the mean variance of an input.

    Returns:
        int8 [Cout, K] in -127..127, and what to add to the bias [Cout] to keep the mean output.
    """
    mean, a = moments.finish()
    a[np.diag_indices_from(a)] += np.float32(damping * max(float(np.trace(a)) / len(a), 1e-20))
    step = scales.astype(np.float32)
    # The first sweep starts from the real weights: each column makes up for those before it.
    values = weight.astype(np.float32)
    for _ in range(_SWEEPS):
        for part in _strips(len(a)):
            _sweep(values, weight, part, a, step)
    q = np.clip(np.round(values / step[:, None]), -_INT8, _INT8).astype(np.int8)
    error = q * scales.astype(np.float64)[:, None] - weight
    return q, -(error @ mean)


def _strips(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _sweep(values: Array, weight: Array, part: slice, a: Array, step: Array) -> None:
    """The best integer of each column in `part` given all other columns."""
    limit = _INT8 * step
    rest = ((weight - values) @ a[:, part]).T.copy()  # [block, Cout]: rows are contiguous
    own = a[part, part]
    for j in range(len(own)):
        column = part.start + j
        old = values[:, column]
        new = np.clip(np.round((old + rest[j] / own[j, j]) / step) * step, -limit, limit)
        change = new - old
        values[:, column] = new
        rest -= own[j][:, None] * change
