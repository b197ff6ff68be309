"""Round a layer's weights together instead of one by one, so that their errors cancel.

The output error of a layer is ``|X D^T|^2``: X are inputs as the quantized network sees them, D its
weights' errors. It is minimized over the integers by coordinate descent, one column of weights
after another, as in QuantEase (Behdin et al., arXiv 2309.01885). Each column makes up for those
before it, so the inputs that vary most come first, as in GPTQ's "activation order" (Frantar et al.,
arXiv 2210.17323). Then a second pass brings nothing. The mean error goes into the bias.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp._memory import give_back
from edgehp.progress import track
from edgehp.quantization.graph import GraphView, with_outputs
from edgehp.quantization.qdq import Emitter, RoundedLayer
from edgehp.quantization.runner import Runner, input_of
from edgehp.quantization.table import CalibrationTable

# Columns whose effect on each other is kept in one small matrix, and of those the ones that are
# brought up to date one by one: the rest is left to matrix products.
_BLOCK, _INNER = 128, 32
_PIXELS = 64  # output pixels taken of a crop: neighbors say almost the same
_SEED = 20260
# Crops of 112 pixels that weights are rounded on: twice as many came out no nearer to FP32. Larger
# crops have more pixels to learn from and take more memory.
_PICTURES = 64

_log = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]


def round_jointly(
    weight: Array,
    scales: npt.NDArray[np.floating],
    inputs: Array,
    *,
    largest: int = 127,
    damping: float = 0.01,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Integers whose answer to the inputs is nearest to that of `weight`.

    Args:
        weight: float32 [Cout, K].
        scales: [Cout], positive.
        inputs: float32 [N, K], samples of what the layer reads.
        largest: integer magnitude that a weight may have.
        damping: how strongly a weight is held at its own value where the samples say little, as a
            share of the mean variance of an input.

    Returns:
        int8 [Cout, K] in ``-largest..largest``, and what to add to the bias [Cout] to keep the mean
        output.
    """
    mean = inputs.mean(0, dtype=np.float64)
    inputs = inputs - mean.astype(np.float32)
    variance = np.einsum("nk,nk->k", inputs, inputs) / len(inputs)
    order = np.argsort(-variance, kind="stable")
    x = inputs[:, order]
    hold = np.float32(len(inputs) * damping * max(float(variance.mean()), 1e-20))
    # In units of the scales, rows are columns of the layer: a block of them is contiguous.
    integers: Array = np.ascontiguousarray((weight / scales[:, None].astype(np.float32)).T[order])
    answer: Array = np.zeros((len(x), len(weight)), np.float32)  # X D^T: the layer's error
    for start in range(0, len(integers), _BLOCK):
        block = slice(start, start + _BLOCK)
        seen: Array = x[:, block]
        own: Array = seen.T @ seen
        own[np.diag_indices_from(own)] += hold
        rest: Array = seen.T @ answer
        change: Array = _descend(integers[block], own, rest, largest)
        answer -= seen @ change
    q = np.empty(weight.shape, np.int8)
    q[:, order] = integers.T
    error = q * scales.astype(np.float64)[:, None] - weight
    return q, -(error @ mean)


def _descend(values: Array, own: Array, rest: Array, largest: int) -> Array:
    """The best integer for each of `values` given all others, one row after another, in place.

    Args:
        values: real weights [B, Cout] in units of their scales; become integers.
        own: covariance [B, B] of their inputs.
        rest: how the layer's error varies with these inputs [B, Cout]; used up.
        largest: integer magnitude that a weight may have.

    Returns:
        What was added to `values`.
    """
    change = np.zeros_like(values)
    inverse = 1 / own.diagonal()
    for start in range(0, len(own), _INNER):
        end = min(start + _INNER, len(own))
        for j in range(start, end):
            new = own[j, start:j] @ change[start:j]
            np.subtract(rest[j], new, out=new)
            new *= inverse[j]
            new += values[j]
            np.rint(new, out=new)
            np.minimum(new, largest, out=new)
            np.maximum(new, -largest, out=new)
            np.subtract(new, values[j], out=change[j])
            values[j] = new
        rest[end:] -= own[end:, start:end] @ change[start:end]
    return change


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
    layers = [n for n in emitter.placement.weights if len(source.nodes[n].input) > 2]
    graph = GraphView(emitter(table, method))
    inputs = {name: _input(graph, name) for name in layers}
    tensors = list(dict.fromkeys(i.tensor for i in inputs.values()))
    pixels = math.prod(input_of(graph.model)[1:])
    count = max(1, min(_PICTURES, _PICTURES * 112 * 112 // pixels))
    some = [crops[i] for i in range(0, len(crops), -(-len(crops) // count))]
    runner = Runner(with_outputs(graph.model, tensors), tensors, threads=threads)
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
        samples = []
        for part in seen[inputs[name].tensor]:
            x = inputs[name].values(part)
            samples.append(x.reshape(len(x), -1) if window is None else window.samples(x, rng))
        x, rows = np.concatenate(samples), weight.reshape(len(weight), -1)
        scales, largest = emitter.scales(name, table, method), emitter.largest(name, table, method)
        groups = source.attribute(source.nodes[name], "group", 1)
        # The channels of each group read their own part of the input.
        split = (np.split(rows, groups), np.split(scales, groups), np.split(x, groups, 1))
        parts = [round_jointly(*group, largest=largest) for group in zip(*split, strict=True)]
        q = np.concatenate([p[0] for p in parts]).reshape(weight.shape)
        done[name] = RoundedLayer(q, np.concatenate([p[1] for p in parts]).astype(np.float32))
    _log.info("rounded the weights of %d layers jointly on %d crops", len(done), len(some))
    return done


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
