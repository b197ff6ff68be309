"""Give every layer integer weights that answer best to the inputs it really gets.

The inputs are those of the quantised graph. Memory does not grow with the number of crops: only
second moments are kept, of as many layers at once as the largest layer alone needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp._memory import give_back
from edgehp.quantization.calibrate import with_outputs
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.rounding import Moments, round_jointly
from edgehp.quantization.runner import Runner

if TYPE_CHECKING:
    import onnx

__all__ = ["reconstruct"]

_log = logging.getLogger(__name__)
_BATCH = 8
_PIXELS = 64  # output pixels taken of a crop: neighbours say almost the same
_SEED = 20260
# Moments held at once, in float32 numbers: the largest layer of a ResNet18 or 34 (4608 inputs).
_HELD = 4608 * 4608

Emitter = Callable[[Recipe], "onnx.ModelProto"]
Array = npt.NDArray[np.float32]


def reconstruct(
    source: onnx.ModelProto,
    emitter: Emitter,
    recipe: Recipe,
    crops: Iterable[npt.NDArray[np.uint8]],
    *,
    damping: float = 0.01,
    threads: int | None = None,
    most_layers: int = 99,
) -> Recipe:
    """The recipe with `weights` and `bias_shifts` fitted to the crops.

    Args:
        source: float graph.
        emitter: emits a recipe of it.
        recipe: methods and layers kept in floating point.
        crops: uint8 [S, S, 3] each; read once for every group of layers.
        damping: see `edgehp.quantization.rounding.round_jointly`.
        threads: of the engine; None takes all cores.
        most_layers: fitted on one pass over the crops, as if the others of them were rounded to
            nearest; as many as fit into the memory of the largest.
    """
    view = GraphView(source)
    weights, shifts = dict(recipe.weights), dict(recipe.bias_shifts)
    done: list[str] = []

    def fit_some(graph: GraphView) -> bool:
        """Fit the layers that come next, if any; what that takes is gone when it returns."""
        todo = [n for n in _layers(graph, view) if n not in done]
        if not todo:
            return False
        fits = [_Fit.of(view, graph, name) for name in _group(view, todo, most_layers)]
        _measure(graph.model, fits, crops, threads)
        for fit in fits:
            flat = fit.weight.reshape(len(fit.weight), -1)
            q, shift = round_jointly(flat, fit.scales, fit.moments, damping=damping)
            weights[fit.name] = q.reshape(fit.weight.shape)
            shifts[fit.name] = shift.astype(np.float32)
            done.append(fit.name)
        _log.info("rounded %d layers, last %s", len(done), done[-1])
        return True

    while True:
        current = replace(
            recipe, weights=dict(weights), bias_shifts=dict(shifts), bias_correction=False
        )
        give_back()
        if not fit_some(GraphView(emitter(current))):
            return current


def _layers(graph: GraphView, source: GraphView) -> Iterator[str]:
    """Nodes with integer weights and a float bias, in graph order."""
    for node in graph.model.graph.node:
        original = source.nodes.get(node.name)
        if original is None or not source.has_weight(original) or len(original.input) < 3:
            continue
        dq = graph.producer.get(node.input[1])
        whole = source.attribute(original, "group", 1) == 1
        if whole and dq is not None and dq.op_type == "DequantizeLinear":
            yield node.name


def _group(view: GraphView, todo: Sequence[str], most: int) -> list[str]:
    group: list[str] = []
    held = 0
    for name in todo[:most]:
        weight = view.array(view.nodes[name].input[1])
        held += (weight.size // len(weight)) ** 2
        if group and held > _HELD:
            break
        group.append(name)
    return group


@dataclass(frozen=True)
class _Window:
    """What a convolution's kernel sees: its size, strides and pads (top, left, bottom, right)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class _Fit:
    name: str
    weight: Array
    scales: npt.NDArray[np.float64]
    input: str
    window: _Window | None
    moments: Moments

    @classmethod
    def of(cls, source: GraphView, graph: GraphView, name: str) -> _Fit:
        node, original = graph.nodes[name], source.nodes[name]
        weight = source.array(original.input[1]).astype(np.float32)
        window = None
        if original.op_type == "Conv":
            # Of the emitted node: the exact picture is padded before it.
            ints = {a.name: list(a.ints) for a in node.attribute}
            high, wide = weight.shape[2:]
            down, right = ints.get("strides", [1, 1])
            pads = ints.get("pads", [0] * 4)
            window = _Window((high, wide), (down, right), (pads[0], pads[1], pads[2], pads[3]))
        return cls(
            name,
            weight,
            graph.array(graph.producer[node.input[1]].input[1]).astype(np.float64),
            node.input[0],
            window,
            Moments(weight[0].size),
        )


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
            fit.moments.update(_samples(outputs[inputs.index(fit.input)], fit.window, rng))


def _samples(x: Array, window: _Window | None, rng: np.random.Generator) -> Array:
    """What the kernel sees at some output pixels: [N, K]."""
    if window is None:
        return x.reshape(len(x), -1)
    top, left, bottom, right = window.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    high, wide = window.kernel
    columns = (x.shape[3] - wide) // window.strides[1] + 1
    count = ((x.shape[2] - high) // window.strides[0] + 1) * columns
    chosen = rng.permutation(count)[:_PIXELS] if count > _PIXELS else np.arange(count)
    row, column = np.divmod(chosen, columns)
    r = (row[:, None] * window.strides[0] + np.arange(high))[:, :, None]
    c = (column[:, None] * window.strides[1] + np.arange(wide))[:, None, :]
    seen = x[:, :, r, c].transpose(0, 2, 1, 3, 4)  # [n, pixels, C, kh, kw]
    return np.ascontiguousarray(seen).reshape(len(x) * len(chosen), -1)
