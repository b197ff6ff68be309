"""Round a layer's weights together instead of one by one, so that their errors cancel.

The output error of a layer is a quadratic form of its weights' errors D, separate for each output
channel: ``tr(D A D^T)`` with ``A`` the covariance of the inputs as the quantized network sees them.
It is minimized over the integers by coordinate descent, one column at a time, as in QuantEase
(Behdin et al., arXiv 2309.01885); the mean error goes into the bias.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp._memory import give_back
from edgehp.quantization.graph import GraphView, with_outputs
from edgehp.quantization.qdq import Emitter, RoundedLayer
from edgehp.quantization.runner import Runner
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

__all__ = ["Moments", "round_jointly", "round_layers"]

_BLOCK = 128
# Samples multiplied at once: each product reads and writes the whole matrix.
_TOGETHER = 1024
_SWEEPS = 3
_BATCH = 8
_PIXELS = 64  # output pixels taken of a crop: neighbors say almost the same
_SEED = 20260
# Moments held at once, in float32 numbers: the largest layer of a ResNet18 or 34 (4608 inputs).
_HELD = 4608 * 4608

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
    for _ in range(_SWEEPS):
        for part in _strips(len(a)):
            _sweep(values, weight, part, a, step, largest * step)
    q = np.clip(np.round(values / step[:, None]), -largest, largest).astype(np.int8)
    error = q * scales.astype(np.float64)[:, None] - weight
    return q, -(error @ mean)


def _strips(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _sweep(values: Array, weight: Array, part: slice, a: Array, step: Array, limit: Array) -> None:
    """The best integer of each column in `part` given all other columns."""
    rest = ((weight - values) @ a[:, part]).T.copy()  # [block, Cout]: rows are contiguous
    own = a[part, part]
    for j in range(len(own)):
        column = part.start + j
        old = values[:, column]
        new = np.clip(np.round((old + rest[j] / own[j, j]) / step) * step, -limit, limit)
        change = new - old
        values[:, column] = new
        rest -= own[j][:, None] * change


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


class _Fit(NamedTuple):
    """A layer that is being fitted.

    Attributes:
        name: of the node.
        weight: float32, as the float graph has it.
        input: the tensor that it reads in the quantized graph.
        window: of a convolution's kernel; None for Gemm.
        moments: of what it reads.
    """

    name: str
    weight: Array
    input: str
    window: _Window | None
    moments: Moments


def round_layers(
    emitter: Emitter,
    table: CalibrationTable,
    method: str,
    crops: Iterable[npt.NDArray[np.uint8]],
    *,
    threads: int | None = None,
) -> dict[str, RoundedLayer]:
    """Integers of every layer with a weight and a bias, fitted to the inputs it really gets.

    The inputs are those of the quantized graph. Memory does not grow with the number of crops: only
    second moments are kept, of as many layers at once as the largest layer alone needs. Layers that
    are fitted on one pass over the crops see each other's weights rounded to nearest.

    Args:
        emitter: of the float graph.
        table: its calibration table.
        method: calibration method.
        crops: uint8 [S, S, 3] each; read once for every group of layers.
        threads: of the processor; None takes all cores.
    """
    source = emitter.source
    todo = [n for n in emitter.placement.weights if _can_be_rounded(source, n)]
    done: dict[str, RoundedLayer] = {}
    while group := _group(source, [n for n in todo if n not in done]):
        give_back()
        graph = emitter(table, method, done)
        fits = [_fit(source, GraphView(graph), name) for name in group]
        _measure(graph, fits, crops, threads)
        del graph
        while fits:
            fit = fits.pop(0)
            flat = fit.weight.reshape(len(fit.weight), -1)
            scales = emitter.scales(fit.name, table, method)
            largest = emitter.largest(fit.name, table, method)
            q, shift = round_jointly(flat, scales, fit.moments, largest=largest)
            done[fit.name] = RoundedLayer(q.reshape(fit.weight.shape), shift.astype(np.float32))
            del fit
        _log.info("rounded %d of %d layers", len(done), len(todo))
    return done


def _can_be_rounded(source: GraphView, name: str) -> bool:
    node = source.nodes[name]
    return len(node.input) > 2 and source.attribute(node, "group", 1) == 1


def _group(source: GraphView, todo: Sequence[str]) -> list[str]:
    """The layers that come next and fit into memory together."""
    group: list[str] = []
    held = 0
    for name in todo:
        weight = source.array(source.nodes[name].input[1])
        held += (weight.size // len(weight)) ** 2
        if group and held > _HELD:
            break
        group.append(name)
    return group


def _fit(source: GraphView, graph: GraphView, name: str) -> _Fit:
    node = source.nodes[name]
    weight = source.array(node.input[1]).astype(np.float32)
    window = None
    if node.op_type == "Conv":
        ints = {a.name: list(a.ints) for a in node.attribute}
        high, wide = weight.shape[2:]
        down, right = ints.get("strides", [1, 1])
        pads = ints.get("pads", [0] * 4)
        window = _Window((high, wide), (down, right), (pads[0], pads[1], pads[2], pads[3]))
    return _Fit(name, weight, graph.nodes[name].input[0], window, Moments(weight[0].size))


def _measure(
    graph: onnx.ModelProto,
    fits: Sequence[_Fit],
    crops: Iterable[npt.NDArray[np.uint8]],
    threads: int | None,
) -> None:
    inputs = list(dict.fromkeys(f.input for f in fits))
    runner = Runner(with_outputs(graph, inputs), inputs, threads=threads, batch=_BATCH)
    rng = np.random.default_rng(_SEED)
    for outputs in runner.stream(crops):
        for fit in fits:
            x = outputs[inputs.index(fit.input)]
            fit.moments.update(
                x.reshape(len(x), -1) if fit.window is None else fit.window.samples(x, rng)
            )
