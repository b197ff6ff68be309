"""What both emitters share: scales, integer weights, and the insertion of Q/DQ nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.graphview import GraphView, with_constants
from edgehp.quantization.observers import weight_ranges
from edgehp.quantization.placement import Placement
from edgehp.quantization.table import CalibrationTable
from edgehp.quantization.thresholds import METHODS, Range

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Recipe",
    "insert_qdq",
    "quantise_activation",
    "quantise_weight",
    "scale_of",
    "weight_scales",
]

_INT8 = 127
_UINT8 = 255
_EMPTY_CHANNEL = 1.0  # scale of a channel whose weights are all zero: any positive one is exact

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """The choices behind a Q/DQ graph.

    Attributes:
        method: calibration method of the activations.
        overrides: tensor -> another method for this tensor.
        keep_float: nodes that stay in floating point.
        bias_correction: fold the mean error of rounded weights into the float biases.
        weights: node -> int8 weight to use in place of rounding to nearest (on the same scales).
        bias_shifts: node -> float32 [Cout] to add to its bias, because of these weights;
            `bias_correction` leaves such a node alone.
        exact_input: rewrite the centring so that the picture is quantised without error
            (`edgehp.quantization.exact_input`).
        full_stem: use all 256 levels behind the stem's ReLU (`edgehp.quantization.stem`;
            symmetric activations only).
    """

    method: str = "minmax"
    overrides: Mapping[str, str] = field(default_factory=dict)
    keep_float: frozenset[str] = frozenset()
    bias_correction: bool = False
    weights: Mapping[str, npt.NDArray[np.int8]] = field(default_factory=dict)
    bias_shifts: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    exact_input: bool = False
    full_stem: bool = False

    def __post_init__(self) -> None:
        """Refuse methods that do not exist."""
        for method in (self.method, *self.overrides.values()):
            if method not in METHODS:
                raise UsageError(
                    f"unknown calibration method {method!r}; known: auto, {', '.join(METHODS)}"
                )

    def range_of(self, table: CalibrationTable, tensor: str, grid: str) -> Range:
        """The range of `tensor` that this recipe asks for."""
        return table.range_of(tensor, self.overrides.get(tensor, self.method), grid)


def scale_of(ends: Range, grid: str, *, half: bool = False) -> tuple[float, int]:
    """Scale and zero point of a range.

    Args:
        ends: (low, high), low <= 0 <= high.
        grid: ``"int8"``: scale = largest magnitude / 127, zero point 0; ``"uint8"``: scale =
            (high - low) / 255, zero point such that 0 is represented exactly.
        half: round the scale to float16, never to zero.
    """
    low, high = ends
    if grid == "int8":
        return _representable(max(-low, high) / _INT8, half), 0
    scale = _representable((high - low) / _UINT8, half)
    return scale, int(np.clip(np.round(-low / scale), 0, _UINT8))


def _representable(scale: float, half: bool) -> float:
    if half:
        info = np.finfo(np.float16)
        return float(np.float16(np.clip(scale, float(info.smallest_subnormal), float(info.max))))
    return float(np.float32(max(scale, float(np.finfo(np.float32).tiny))))


def quantise_activation(
    x: npt.NDArray[np.float32], scale: float, zero: int, grid: str
) -> npt.NDArray[np.float32]:
    """What Q and DQ make of `x`: for simulation and tests."""
    low, high = (-128, 127) if grid == "int8" else (0, 255)
    q = np.clip(np.round(x / np.float32(scale)) + zero, low, high)
    return np.asarray((q - zero) * np.float32(scale), np.float32)


def weight_scales(weight: npt.NDArray[np.float32], *, half: bool = False) -> Array:
    """Symmetric scales per output channel (axis 0), float64 [Cout]: largest magnitude / 127."""
    scales = weight_ranges(weight) / _INT8
    return np.array([_representable(s, half) if s > 0 else _EMPTY_CHANNEL for s in scales])


def quantise_weight(weight: npt.NDArray[np.float32], scales: Array) -> npt.NDArray[np.int8]:
    """Round a weight [Cout, ...] to int8 in [-127, 127] on `scales` [Cout]."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    q = np.round(weight.astype(np.float64) / scales.reshape(shape))
    return np.clip(q, -_INT8, _INT8).astype(np.int8)


def insert_qdq(
    model: onnx.ModelProto,
    source: GraphView,
    placement: Placement,
    table: CalibrationTable,
    recipe: Recipe,
    *,
    grid: str,
    half: Collection[str] = (),
) -> onnx.ModelProto:
    """Put Q/DQ pairs on the placement's edges and integers in place of its weights.

    A tensor gets one Q and one DQ, shared by all consumers that want it; consumers that are kept
    in floating point go on reading the tensor itself. Weights are stored as int8 with a DQ alone.

    Args:
        model: the graph to change (already cast to FP16 where that is asked for); not modified.
        source: the original float graph, whose weights are quantised.
        placement: on node names of both.
        table: ranges by tensor name of `source`.
        recipe: methods and corrections.
        grid: ``"int8"`` or ``"uint8"``, of the activations.
        half: names of nodes that compute in FP16: their scales are FP16.
    """
    # The float weights that integers replace are not copied: the result is a quarter of the size.
    out = with_constants(model, ())
    inserter = _Inserter(out, grid)
    nodes = {n.name: n for n in out.graph.node}
    for (name, index), tensor in placement.edges.items():
        ends = recipe.range_of(table, tensor, grid)
        node = nodes[name]
        node.input[index] = inserter.activation(node.input[index], ends, name in half)
    for name in placement.weights:
        original = source.nodes[name]
        weight = source.array(original.input[1]).astype(np.float32)
        is_half = name in half
        scales = weight_scales(weight, half=is_half)
        given = recipe.weights.get(name)
        q = quantise_weight(weight, scales) if given is None else given
        if q.shape != weight.shape or q.dtype != np.int8:
            raise UsageError(f"{name}: given int8 weights {q.dtype} {q.shape}, not {weight.shape}")
        nodes[name].input[1] = inserter.weight(original.input[1], q, scales, is_half)
        if name in recipe.bias_shifts:
            bias = source.array(original.input[2]) + recipe.bias_shifts[name]
            _replace_bias(inserter, nodes[name], original, bias, is_half)
        elif recipe.bias_correction:
            _correct_bias(inserter, nodes[name], source, table, q, scales, is_half)
    inserter.finish(model)
    return out


def _replace_bias(
    inserter: _Inserter,
    node: onnx.NodeProto,
    original: onnx.NodeProto,
    bias: npt.NDArray[np.floating],
    half: bool,
) -> None:
    name = f"{original.input[2]}.corrected"
    node.input[2] = inserter.constant(name, bias.astype(np.float16 if half else np.float32))


def _correct_bias(
    inserter: _Inserter,
    node: onnx.NodeProto,
    source: GraphView,
    table: CalibrationTable,
    q: npt.NDArray[np.int8],
    scales: Array,
    half: bool,
) -> None:
    """Nagel et al., arXiv 1906.04721, section 4.2: E[(Wq - W) x] leaves the bias.

    E[x] per input channel is the calibration crops'; pixels at the border are taken as all others.
    """
    original = source.nodes[node.name]
    seen = table.tensors.get(original.input[0])
    weight = source.array(original.input[1]).astype(np.float64)
    if seen is None or len(original.input) < 3 or len(seen.channel_mean) != weight.shape[1]:
        return
    error = q * scales.reshape((-1,) + (1,) * (weight.ndim - 1)) - weight
    per_channel = error.reshape(*weight.shape[:2], -1).sum(2)
    shift = per_channel @ np.asarray(seen.channel_mean)
    bias = source.array(original.input[2]).astype(np.float64) - shift
    _replace_bias(inserter, node, original, bias, half)


class _Inserter:
    """Adds nodes before the first node that reads them."""

    def __init__(self, model: onnx.ModelProto, grid: str) -> None:
        self._model = model
        self._grid = grid
        self._made: dict[tuple[str, bool], str] = {}
        self._new: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def activation(self, tensor: str, ends: Range, half: bool) -> str:
        key = (tensor, half)
        if key not in self._made:
            scale, zero = scale_of(ends, self._grid, half=half)
            kind = np.float16 if half else np.float32
            parameters = [
                self.constant(f"{tensor}.scale", np.array(scale, kind)),
                self.constant(f"{tensor}.zero_point", np.array(zero, self._grid)),
            ]
            q = self._node("QuantizeLinear", f"{tensor}.q", [tensor, *parameters])
            self._made[key] = self._node("DequantizeLinear", f"{tensor}.dq", [q, *parameters])
        return self._made[key]

    def weight(self, name: str, q: npt.NDArray[np.int8], scales: Array, half: bool) -> str:
        parameters = [
            self.constant(f"{name}.int8", q),
            self.constant(f"{name}.scale", scales.astype(np.float16 if half else np.float32)),
            self.constant(f"{name}.zero_point", np.zeros(len(q), np.int8)),
        ]
        return self._node("DequantizeLinear", f"{name}.dq", parameters, axis=0)

    def _node(self, kind: str, name: str, inputs: list[str], axis: int | None = None) -> str:
        from onnx import helper

        node = helper.make_node(kind, inputs, [name], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self._new.append(node)
        return name

    def finish(self, source: onnx.ModelProto) -> None:
        """Sort the new nodes in, and add the constants that are read: `source`'s and new ones."""
        graph = self._model.graph
        waiting = {n.output[0]: n for n in self._new}
        ordered = [n for node in graph.node for n in _with_needed(node, waiting)]
        read = {i for n in ordered for i in n.input} | {o.name for o in graph.output}
        del graph.node[:]
        graph.node.extend(ordered)
        for tensor in chain(source.graph.initializer, self._constants):
            if tensor.name in read:
                graph.initializer.append(tensor)


def _with_needed(
    node: onnx.NodeProto, waiting: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """The nodes among `waiting` that `node` needs, which are taken out, and then itself."""
    for name in node.input:
        if (needed := waiting.pop(name, None)) is not None:
            yield from _with_needed(needed, waiting)
    yield node
