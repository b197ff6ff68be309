"""Q/DQ graphs: put the pairs and the integer weights in, and take those of a layer out again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError, UsageError
from edgehp.quantization.graph import GraphView, add_nodes, drop_unread, with_constants
from edgehp.quantization.half import to_half_body
from edgehp.quantization.placement import place
from edgehp.quantization.ranges import Range
from edgehp.quantization.recipe import BODIES
from edgehp.quantization.table import CalibrationTable

if TYPE_CHECKING:
    import onnx

# Of the symmetric grid.
_LARGEST_INT8 = 127

_INT8 = 127
_UINT8 = 255
_EMPTY_CHANNEL = 1.0  # scale of a channel whose weights are all zero: any positive one is exact
# Largest weight where uint8 activations have a zero point far from 0, which is the picture and
# tanh: x86 processors without VNNI add two products in 16 bits, 2 * 255 * 127 saturates them, and
# integers far from 0 are the rule there. NNCF calls it `overflow_fix` and does it for the first
# layer, too. SiLU and its kind go little below 0 and have small integers, like ReLU.
_NO_OVERFLOW = 64
_FAR = 64  # zero point
_GRID = {"tensorrt": "int8", "cpu": "uint8", "onnxruntime": "uint8"}

Array = npt.NDArray[np.float64]


class RoundedLayer(NamedTuple):
    """Integers of a layer other than those nearest to its weights.

    Attributes:
        weight: int8, of the weight's shape, on the scales of `weight_scales`.
        bias_shift: float32 [Cout], what to add to the bias because of them.
    """

    weight: npt.NDArray[np.int8]
    bias_shift: npt.NDArray[np.float32]


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
        return float(_representable(max(-low, high) / _INT8, half)), 0
    scale = float(_representable((high - low) / _UINT8, half))
    if scale == 1.0:
        # OpenVINO drops such a pair behind uint8 crops, whatever their mean is, and the layer stays
        # in floating point.
        scale = float(np.nextafter(np.float32(1), np.float32(2)))
    return scale, int(np.clip(np.round(-low / scale), 0, _UINT8))


def _representable(scale: float | Array, half: bool) -> Array:
    """The nearest float16 or float32 above zero, as float64."""
    info = np.finfo(np.float16 if half else np.float32)
    smallest = float(info.smallest_subnormal if half else info.tiny)
    return np.clip(scale, smallest, float(info.max)).astype(info.dtype).astype(np.float64)


def quantize_activation(
    x: npt.NDArray[np.float32], scale: float, zero: int, grid: str
) -> npt.NDArray[np.float32]:
    """What Q and DQ make of `x`: for simulation and tests."""
    low, high = (-128, 127) if grid == "int8" else (0, 255)
    q = np.clip(np.round(x / np.float32(scale)) + zero, low, high)
    return np.asarray((q - zero) * np.float32(scale), np.float32)


def weight_scales(
    weight: npt.NDArray[np.float32], *, largest: int = _INT8, half: bool = False
) -> Array:
    """Symmetric scales per output channel (axis 0), float64 [Cout].

    Args:
        weight: float32 [Cout, ...].
        largest: integer that the largest magnitude of a channel becomes.
        half: round the scales to float16, never to zero.

    Raises:
        DataError: a weight is not finite.
    """
    scales = np.abs(weight.reshape(weight.shape[0], -1)).max(1).astype(np.float64) / largest
    if not np.isfinite(scales).all():
        raise DataError("a weight is not finite; the checkpoint is damaged")
    return np.where(scales > 0, _representable(scales, half), _EMPTY_CHANNEL)


def quantize_weight(weight: npt.NDArray[np.float32], scales: Array) -> npt.NDArray[np.int8]:
    """Round a weight [Cout, ...] to int8 in [-127, 127] on `scales` [Cout]."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    q = np.round(weight.astype(np.float64) / scales.reshape(shape))
    return np.clip(q, -_INT8, _INT8).astype(np.int8)


class Emitter:
    """Emits Q/DQ graphs of one float graph.

    ``"cpu"``: uint8 activations, an FP32 body. Biases stay in FP32: OpenVINO and onnxruntime fold
    them into the integer convolution. ``"tensorrt"``: symmetric int8; opset 17 with FP32 scales,
    or an FP16 body with FP16 scales at opset 19: a strongly typed engine computes what lies outside
    of Q/DQ in the graph's own type.

    Args:
        model: the deployed float graph; not modified.
        flavor: ``"tensorrt"`` or ``"cpu"``.
        body: ``"fp32"`` or, ``tensorrt`` only, ``"fp16"``.
        float_layers: nodes that stay in floating point.

    Raises:
        UsageError: unknown flavor or body, or a layer that does not exist.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        flavor: str,
        body: str = "fp32",
        float_layers: Collection[str] = (),
    ) -> None:
        if body not in BODIES:
            raise UsageError(f"body {body!r} is none of {', '.join(BODIES)}")
        self.source = GraphView(model)
        self.placement = place(self.source, flavor, float_layers)
        if body == "fp16" and flavor != "tensorrt":
            raise UsageError(f"the {flavor} flavor has an FP32 body; FP16 is for tensorrt")
        self._grid = _GRID[flavor]
        self._nearest: dict[tuple[str, int], tuple[Array, npt.NDArray[np.int8]]] = {}
        self._target, self._half = model, frozenset[str]()
        if body == "fp16":
            self._target, self._half = to_half_body(model, self.placement.weights)

    def weight(self, layer: str) -> npt.NDArray[np.float32]:
        """A layer's float weight [Cout, ...]."""
        return self.source.array(self.source.nodes[layer].input[1]).astype(np.float32)

    def largest(self, layer: str, table: CalibrationTable, method: str) -> int:
        """The largest magnitude that a layer's integer weights may have."""
        ends = table.range_of(self.placement.edges[layer, 0], method, self._grid)
        _, zero = scale_of(ends, self._grid)
        return _NO_OVERFLOW if zero > _FAR else _INT8

    def scales(self, layer: str, table: CalibrationTable, method: str) -> Array:
        """Scales of a layer's weight, float64 [Cout]."""
        return self._rounded(layer, self.largest(layer, table, method))[0]

    def _rounded(self, layer: str, largest: int) -> tuple[Array, npt.NDArray[np.int8]]:
        """Scales of a layer's weight and its nearest integers: most methods share them."""
        if (layer, largest) not in self._nearest:
            weight = self.weight(layer)
            scales = weight_scales(weight, largest=largest, half=layer in self._half)
            self._nearest[layer, largest] = scales, quantize_weight(weight, scales)
        return self._nearest[layer, largest]

    def __call__(
        self,
        table: CalibrationTable,
        method: str,
        rounded: Mapping[str, RoundedLayer] | None = None,
    ) -> onnx.ModelProto:
        """The Q/DQ graph.

        A tensor gets one Q and one DQ, shared by all consumers that want it; consumers that are
        kept in floating point go on reading the tensor itself. Weights are int8 with a DQ alone.

        Args:
            table: ranges by tensor name of the float graph.
            method: calibration method.
            rounded: layer -> its integers, where they are not the nearest.

        Raises:
            UsageError: the table lacks a range.
        """
        # The float weights that integers replace are not copied: the result is a quarter the size.
        out = with_constants(self._target, ())
        inserter = _Inserter(self._grid)
        nodes = {n.name: n for n in out.graph.node}
        for (name, index), tensor in self.placement.edges.items():
            ends = table.range_of(tensor, method, self._grid)
            node = nodes[name]
            node.input[index] = inserter.activation(node.input[index], ends, name in self._half)
        for name in self.placement.weights:
            original = self.source.nodes[name]
            half = name in self._half
            scales, q = self._rounded(name, self.largest(name, table, method))
            layer = (rounded or {}).get(name)
            if layer is not None:
                q = layer.weight
            nodes[name].input[1] = inserter.weight(original.input[1], q, scales, half)
            if layer is not None:
                bias = self.source.array(original.input[2]) + layer.bias_shift
                nodes[name].input[2] = inserter.constant(
                    f"{original.input[2]}.corrected", bias.astype(_type(half))
                )
        add_nodes(out, inserter.nodes)
        read = {i for n in out.graph.node for i in n.input} | {o.name for o in out.graph.output}
        for tensor in (*self._target.graph.initializer, *inserter.constants):
            if tensor.name in read:
                out.graph.initializer.append(tensor)
        return out


def _type(half: bool) -> type[np.float16] | type[np.float32]:
    return np.float16 if half else np.float32


class _Inserter:
    """Collects Q, DQ and their constants."""

    def __init__(self, grid: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._grid = grid
        self._made: dict[tuple[str, bool], str] = {}

    def constant(self, name: str, values: npt.NDArray[np.generic]) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def activation(self, tensor: str, ends: Range, half: bool) -> str:
        key = (tensor, half)
        if key not in self._made:
            scale, zero = scale_of(ends, self._grid, half=half)
            parameters = [
                self.constant(f"{tensor}.scale", np.array(scale, _type(half))),
                self.constant(f"{tensor}.zero_point", np.array(zero, self._grid)),
            ]
            q = self._node("QuantizeLinear", f"{tensor}.q", [tensor, *parameters])
            self._made[key] = self._node("DequantizeLinear", f"{tensor}.dq", [q, *parameters])
        return self._made[key]

    def weight(self, name: str, q: npt.NDArray[np.int8], scales: Array, half: bool) -> str:
        parameters = [
            self.constant(f"{name}.int8", q),
            self.constant(f"{name}.scale", scales.astype(_type(half))),
            self.constant(f"{name}.zero_point", np.zeros(len(q), np.int8)),
        ]
        return self._node("DequantizeLinear", f"{name}.dq", parameters, axis=0)

    def _node(self, kind: str, name: str, inputs: list[str], axis: int | None = None) -> str:
        from onnx import helper

        node = helper.make_node(kind, inputs, [name], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return name


def quantized_layers(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes of a Q/DQ graph that read a quantized activation, in graph order."""
    view = GraphView(model)
    return tuple(
        node.name
        for node in model.graph.node
        if any(_quantizer(view, name) is not None for name in node.input)
    )


def remove_qdq(
    model: onnx.ModelProto, layers: Collection[str], source: onnx.ModelProto
) -> onnx.ModelProto:
    """A Q/DQ graph with some of its layers in floating point again.

    Their inputs are read without Q/DQ; weights and biases are those of the float graph, in the type
    that the layer computes in. The other layers keep their integers and scales.

    Args:
        model: the Q/DQ graph; not modified.
        layers: names of nodes, of `quantized_layers`.
        source: the float graph that it was made from.

    Raises:
        UsageError: a layer is not quantized.
        DataError: the float graph lacks a layer's weight.
    """
    from onnx import numpy_helper

    if unknown := sorted(set(layers) - set(quantized_layers(model))):
        raise UsageError(f"{', '.join(unknown[:4])}: not a quantized layer of this graph")
    view, original = GraphView(model), GraphView(source)
    out = with_constants(model, model.graph.initializer)

    def restored(node: onnx.NodeProto, index: int, dtype: npt.DTypeLike) -> str:
        given = original.nodes.get(node.name)
        if given is None or len(given.input) <= index:
            raise DataError(f"the float graph has no input {index} of {node.name}")
        name = f"{given.input[index]}.float"
        values = original.array(given.input[index]).astype(dtype)
        out.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    for node in out.graph.node:
        if node.name not in layers:
            continue
        for index, name in enumerate(node.input):
            if (q := _quantizer(view, name)) is not None:
                node.input[index] = q.input[0]
            elif (dq := view.producer.get(name)) is not None and dq.op_type == "DequantizeLinear":
                dtype = view.array(dq.input[1]).dtype
                node.input[index] = restored(node, index, dtype)
                if len(node.input) > 2:
                    node.input[2] = restored(node, 2, dtype)
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        read = {i for n in out.graph.node for i in n.input}
        kept = [n for n in out.graph.node if n.op_type != kind or n.output[0] in read]
        del out.graph.node[:]
        out.graph.node.extend(kept)
    drop_unread(out)
    return out


def without_qdq(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """A symmetric int8 Q/DQ graph as a float graph and the ranges of its tensors.

    For engines that quantize by ranges instead. Weights keep the values that they were rounded to;
    everything is FP32 again.

    Args:
        model: the Q/DQ graph of flavor ``"tensorrt"``, in FP32 or FP16; not modified.

    Returns:
        The float graph, and the largest magnitude of each tensor that was quantized.
    """
    import onnx
    from onnx import helper, numpy_helper

    view, ranges, given = GraphView(model), {}, {}
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        scale = view.array(node.input[1]).astype(np.float32)
        if (q := view.producer.get(node.input[0])) is not None and q.op_type == "QuantizeLinear":
            given[node.output[0]] = q.input[0]
            ranges[q.input[0]] = float(scale.reshape(-1)[0]) * _LARGEST_INT8
            continue
        values = view.array(node.input[0]).astype(np.float32)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
        product = values * (scale.reshape(shape) if scale.ndim else scale)
        constants[node.output[0]] = numpy_helper.from_array(product, node.output[0])
    for name, tensor in constants.items():
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            constants[name] = numpy_helper.from_array(values, name)
    out = with_constants(model, constants.values())
    nodes = []
    for node in out.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for i, name in enumerate(node.input):
            node.input[i] = given.get(name, name)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT16:
                attribute.CopyFrom(helper.make_attribute("to", onnx.TensorProto.FLOAT))
        nodes.append(node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    drop_unread(out)
    del out.graph.value_info[:]
    return out, ranges


def _quantizer(view: GraphView, tensor: str) -> onnx.NodeProto | None:
    """The QuantizeLinear of the pair behind which `tensor` lies, or None."""
    dq = view.producer.get(tensor)
    if dq is None or dq.op_type != "DequantizeLinear":
        return None
    return view.producer.get(dq.input[0])
