"""Round a layer's weights together instead of one by one, so that their errors cancel.

The output error of a layer is a quadratic form of its weights' errors D, separate for each output
channel: ``tr(D A D^T)`` with ``A`` the covariance of the inputs as the quantized network sees them.
It is minimized over the integers by coordinate descent, one column at a time, as in QuantEase
(Behdin et al., arXiv 2309.01885); the mean error goes into the bias.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp._memory import give_back
from edgehp.progress import track
from edgehp.quantization.graph import GraphView, with_outputs
from edgehp.quantization.qdq import Emitter, RoundedLayer
from edgehp.quantization.runner import Runner, input_of
from edgehp.quantization.table import CalibrationTable

__all__ = ["Moments", "round_jointly", "round_layers"]

_BLOCK = 128
# Samples multiplied at once: each product reads and writes the whole matrix.
_TOGETHER = 1024
_SWEEPS = 3
_BATCH = 8
_PIXELS = 64  # output pixels taken of a crop: neighbors say almost the same
_SEED = 20260
# Crops of 112 pixels that weights are rounded on: twice as many came out no nearer to FP32. Larger
# crops have more pixels to learn from and take more memory.
_PICTURES = 128

_log = logging.getLogger(__name__)

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
    largest: int = 127,
    damping: float = 0.01,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Integers whose answer to the inputs is nearest to that of `weight`.

    Args:
        weight: float32 [Cout, K].
        scales: [Cout], positive.
        moments: of the layer; used up.
        largest: integer magnitude that a weight may have.
        damping: how strongly a weight is held at its own value where the samples say little, as a
            share of the mean variance of an input.

    Returns:
        int8 [Cout, K] in ``-largest..largest``, and what to add to the bias [Cout] to keep the mean
        output.
    """
    mean, a = moments.finish()
    a[np.diag_indices_from(a)] += np.float32(damping * max(float(np.trace(a)) / len(a), 1e-20))
    step = scales.astype(np.float32)
    # The first sweep starts from the real weights: each column makes up for those before it.
    values = weight.astype(np.float32)
    for sweep in range(_SWEEPS):
        for part in _strips(len(a)):
            changed = len(a) if sweep else part.start
            _sweep(values, weight, part, a[:changed, part], a[part, part], step, largest)
    q = np.clip(np.round(values / step[:, None]), -largest, largest).astype(np.int8)
    error = q * scales.astype(np.float64)[:, None] - weight
    return q, -(error @ mean)


def _strips(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _sweep(
    values: Array,
    weight: Array,
    part: slice,
    behind: Array,
    own: Array,
    step: Array,
    largest: int,
) -> None:
    """The best integer of each column in `part` given the others, in place.

    Args:
        values: [Cout, K], of which the first ``len(behind)`` columns may differ from `weight`.
        weight: [Cout, K].
        part: the columns.
        behind: their covariance with those columns that may differ.
        own: their covariance with each other.
        step: scales [Cout].
        largest: integer magnitude that a weight may have.
    """
    changed = len(behind)
    error = weight[:, :changed] - values[:, :changed]
    rest = (error @ behind).T.copy()  # [block, Cout]: rows are contiguous
    for j in range(len(own)):
        column = part.start + j
        old = values[:, column]
        new = np.rint((old + rest[j] / own[j, j]) / step)
        np.clip(new, -largest, largest, out=new)
        new *= step
        change = new - old
        values[:, column] = new
        rest[j + 1 :] -= own[j, j + 1 :, None] * change


class _Window(NamedTuple):
    """What a convolution's kernel sees: its size, strides and pads (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]

    def samples(self, x: Array, rng: np.random.Generator) -> Array:
        """The inputs at some output pixels of a batch [n, C, H, W]: [n * pixels, C * kh * kw]."""
        top, left, bottom, right = self.pads
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        high, wide = self.kernel
        columns = (x.shape[3] - wide) // self.strides[1] + 1
        count = ((x.shape[2] - high) // self.strides[0] + 1) * columns
        chosen = rng.permutation(count)[:_PIXELS] if count > _PIXELS else np.arange(count)
        row, column = np.divmod(chosen, columns)
        r = (row[:, None] * self.strides[0] + np.arange(high))[:, :, None]
        c = (column[:, None] * self.strides[1] + np.arange(wide))[:, None, :]
        seen = x[:, :, r, c].transpose(0, 2, 1, 3, 4)  # [n, pixels, C, kh, kw]
        return np.ascontiguousarray(seen).reshape(len(x) * len(chosen), -1)


class _Input(NamedTuple):
    """What a layer reads in the quantized graph: integers of a tensor, with their scale."""

    tensor: str
    scale: float
    zero: int

    def values(self, integers: npt.NDArray[Any]) -> Array:
        """The numbers that the integers stand for."""
        x = integers.astype(np.float32)
        x -= np.float32(self.zero)
        x *= np.float32(self.scale)
        return x


def round_layers(
    emitter: Emitter,
    table: CalibrationTable,
    method: str,
    crops: Sequence[npt.NDArray[np.uint8]],
    *,
    threads: int | None = None,
) -> dict[str, RoundedLayer]:
    """Integers of every layer with a weight and a bias, fitted to the inputs it really gets.

    The inputs are those of the graph whose weights are rounded to nearest, of one pass over some
    of the crops. They are kept as the integers that they are, so memory is bounded.

    Args:
        emitter: of the float graph.
        table: its calibration table.
        method: calibration method.
        crops: uint8 [S, S, 3] each; a part of them is used, evenly spread.
        threads: of the processor; None takes all cores.
    """
    source = emitter.source
    layers = [n for n in emitter.placement.weights if _can_be_rounded(source, n)]
    graph = GraphView(emitter(table, method))
    inputs = {name: _input(graph, name) for name in layers}
    tensors = list(dict.fromkeys(i.tensor for i in inputs.values()))
    pixels = math.prod(input_of(graph.model)[1:])
    count = max(1, min(_PICTURES, _PICTURES * 112 * 112 // pixels))
    some = [crops[i] for i in range(0, len(crops), -(-len(crops) // count))]
    runner = Runner(with_outputs(graph.model, tensors), tensors, threads=threads, batch=_BATCH)
    seen: dict[str, list[npt.NDArray[Any]]] = {t: [] for t in tensors}
    for outputs in runner.stream(some):
        for tensor, integers in zip(tensors, outputs, strict=True):
            seen[tensor].append(integers)
    del graph, runner
    give_back()
    done: dict[str, RoundedLayer] = {}
    rng = np.random.default_rng(_SEED)
    for name in track(layers, "layers", "rounding"):
        weight, window = emitter.weight(name), _window(source, name)
        moments = Moments(weight[0].size)
        for part in seen[inputs[name].tensor]:
            x = inputs[name].values(part)
            moments.update(x.reshape(len(x), -1) if window is None else window.samples(x, rng))
        q, shift = round_jointly(
            weight.reshape(len(weight), -1),
            emitter.scales(name, table, method),
            moments,
            largest=emitter.largest(name, table, method),
        )
        done[name] = RoundedLayer(q.reshape(weight.shape), shift.astype(np.float32))
    _log.info("rounded the weights of %d layers jointly on %d crops", len(done), len(some))
    return done


def _can_be_rounded(source: GraphView, name: str) -> bool:
    node = source.nodes[name]
    return len(node.input) > 2 and source.attribute(node, "group", 1) == 1


def _input(graph: GraphView, name: str) -> _Input:
    dq = graph.producer[graph.nodes[name].input[0]]
    scale, zero = (graph.array(i).item() for i in dq.input[1:])
    return _Input(dq.input[0], float(scale), int(zero))


def _window(source: GraphView, name: str) -> _Window | None:
    """Of a convolution; None for Gemm."""
    node = source.nodes[name]
    if node.op_type != "Conv":
        return None
    ints = {a.name: list(a.ints) for a in node.attribute}
    high, wide = source.array(node.input[1]).shape[2:]
    down, right = ints.get("strides", [1, 1])
    pads = ints.get("pads", [0] * 4)
    return _Window((high, wide), (down, right), (pads[0], pads[1], pads[2], pads[3]))
