"""The checks behind the rules of the lint: each yields the nodes that break its rule."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.quantization.graphview import WEIGHTED, GraphView
from edgehp.quantization.halves import HALF_OPSET

if TYPE_CHECKING:
    import onnx

__all__ = ["NARROW", "Context", "Hit"]

NARROW = 16  # TensorRT's INT8 convolution kernels work on at least 16 channels
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_DECODE = ("Softmax", "ReduceSum", "Sqrt", "Sub", "Mul", "Squeeze")
_AVERAGES = ("GlobalAveragePool", "AveragePool", "ReduceMean")

# (node, detail)
Hit = tuple[str, str]


@dataclass(frozen=True)
class Context:
    """What the checks look at.

    Attributes:
        view: the Q/DQ graph.
        keep_float: nodes that were asked to stay in floating point.
        head: whether the Gemm nodes were asked to be integers.
    """

    view: GraphView
    keep_float: frozenset[str]
    head: bool

    def through_dq(self, tensor: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes `tensor`, or None."""
        node = self.view.producer.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def float_source(self, tensor: str) -> str:
        """The tensor before any Q/DQ pairs."""
        while (node := self.view.producer.get(tensor)) is not None and node.op_type in _PAIR:
            tensor = node.input[0]
        return tensor

    def of_weight(self, dq: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear has a constant behind it."""
        return self.view.is_constant(self.float_source(dq.input[0]))

    def pairs(self) -> Iterator[tuple[onnx.NodeProto, bool]]:
        """Every Q and DQ node, and whether it belongs to a constant (weight or bias)."""
        for node in self.view.of_type(*_PAIR):
            yield node, self.of_weight(node)

    def value(self, node: onnx.NodeProto, index: int) -> npt.NDArray[np.generic] | None:
        """A constant input of `node`, or None."""
        if len(node.input) <= index or not self.view.is_constant(node.input[index]):
            return None
        return self.view.array(node.input[index])


def activation_zero_point(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        zero = c.value(node, 2)
        if not weight and zero is not None and zero.dtype == np.int8 and np.any(zero):
            yield node.name, f"zero point {int(zero.reshape(-1)[0])}"


def activation_uint8(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        zero = c.value(node, 2)
        # Without a zero point the type is uint8.
        uint8 = zero is None if node.op_type == "QuantizeLinear" else False
        if not weight and (uint8 or (zero is not None and zero.dtype == np.uint8)):
            yield node.name, ""


def bad_scale(c: Context) -> Iterator[Hit]:
    for node, _ in c.pairs():
        scale = c.value(node, 1)
        if scale is None:
            continue
        values = scale.astype(np.float64)
        if not np.isfinite(values).all() or (values <= 0).any():
            yield node.name, f"smallest {values.min():g}"


def scale_not_constant(c: Context) -> Iterator[Hit]:
    for node, _ in c.pairs():
        if c.value(node, 1) is None:
            yield node.name, node.input[1]


def activation_per_channel(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        scale = c.value(node, 1)
        if not weight and scale is not None and scale.size > 1:
            yield node.name, f"{scale.size} scales"


def _weight_dqs(c: Context) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    for node in c.view.of_type(*WEIGHTED):
        dq = c.through_dq(node.input[1])
        if dq is not None and c.of_weight(dq):
            yield node, dq


def weight_zero_point(c: Context) -> Iterator[Hit]:
    for _, dq in _weight_dqs(c):
        zero = c.value(dq, 2)
        if zero is not None and np.any(zero):
            yield dq.name, ""


def weight_per_tensor(c: Context) -> Iterator[Hit]:
    for node, dq in _weight_dqs(c):
        scale = c.value(dq, 1)
        axis = c.view.attribute(dq, "axis", 1)
        if scale is None:
            continue
        if scale.size == 1:
            yield dq.name, "one scale for the whole weight"
        elif axis != 0:
            yield dq.name, f"axis {axis} of {node.op_type}"


def bias_quantised(c: Context) -> Iterator[Hit]:
    for node in c.view.of_type(*WEIGHTED):
        if len(node.input) > 2 and node.input[2] and c.through_dq(node.input[2]) is not None:
            yield node.name, node.input[2]


def between_conv_and_relu(c: Context) -> Iterator[Hit]:
    for node in c.view.of_type("Relu"):
        dq = c.through_dq(node.input[0])
        if dq is None:
            continue
        made = c.view.producer.get(c.float_source(dq.input[0]))
        if made is not None and made.op_type in ("Conv", "Gemm", "Add"):
            yield dq.name, f"between {made.name} and {node.name}"


def _float_input(c: Context, kinds: Collection[str], index: int | None = 0) -> Iterator[Hit]:
    for node in c.view.of_type(*kinds):
        if node.name in c.keep_float:
            continue
        numbers = range(len(node.input)) if index is None else (index,)
        for i in numbers:
            if not c.view.is_constant(node.input[i]) and c.through_dq(node.input[i]) is None:
                yield node.name, f"input {node.input[i]} is in floating point"


def conv_float(c: Context) -> Iterator[Hit]:
    yield from _float_input(c, ("Conv",))


def conv_weight_float(c: Context) -> Iterator[Hit]:
    kinds = WEIGHTED if c.head else ("Conv",)
    for node in c.view.of_type(*kinds):
        if node.name not in c.keep_float and c.through_dq(node.input[1]) is None:
            yield node.name, ""


def gemm_float(c: Context) -> Iterator[Hit]:
    if c.head:
        yield from _float_input(c, ("Gemm",))


def pool_float(c: Context) -> Iterator[Hit]:
    yield from _float_input(c, ("MaxPool", *_AVERAGES))


def _residual(c: Context) -> Iterator[tuple[onnx.NodeProto, bool, bool]]:
    """Residual Adds with whether the skip and the other side come through Q/DQ."""
    for node, skip in c.view.residual_adds():
        if node.name in c.keep_float:
            continue
        sides = [c.through_dq(i) is not None for i in node.input]
        yield node, sides[skip], sides[1 - skip]


def add_both(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if skip and other)


def add_wrong_side(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if other and not skip)


def add_skip_float(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if not (skip or other))


def cpu_skip_float(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, _ in _residual(c) if not skip)


def half_scale_opset(c: Context) -> Iterator[Hit]:
    if c.view.opset >= HALF_OPSET:
        return
    for node, _ in c.pairs():
        scale = c.value(node, 1)
        if scale is not None and scale.dtype == np.float16:
            yield node.name, f"opset {c.view.opset}"


def mixed_scale_types(c: Context) -> Iterator[Hit]:
    """A DQ in another float type than the rest of its layer breaks strong typing."""
    for node in c.view.of_type(*WEIGHTED):
        kinds = set()
        for name in node.input[:2]:
            dq = c.through_dq(name)
            scale = None if dq is None else c.value(dq, 1)
            if scale is not None:
                kinds.add(str(scale.dtype))
        for name in node.input[1:3]:
            t = c.view.tensor(name)
            if t is not None:
                kinds.add(str(c.view.array(name).dtype))
        if len(kinds) > 1:
            yield node.name, " and ".join(sorted(kinds))


def narrow(c: Context) -> Iterator[Hit]:
    first = next(iter(c.view.of_type("Conv")), None)
    for node in c.view.of_type("Conv"):
        dq = c.through_dq(node.input[1])
        weight = None if dq is None else c.value(dq, 0)
        if weight is None or node is first or node.name in c.keep_float:
            continue
        if min(weight.shape[:2]) < NARROW:
            yield node.name, f"{weight.shape[1]} -> {weight.shape[0]} channels"


def weight_stored_float(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        if weight and node.op_type == "QuantizeLinear":
            yield node.name, node.input[0]


def dynamic_size(c: Context) -> Iterator[Hit]:
    for value in c.view.inputs:
        dims = value.type.tensor_type.shape.dim
        if any(not d.HasField("dim_value") or d.dim_value < 1 for d in list(dims)[1:]):
            yield value.name, "only the batch may be free"


def decode_quantised(c: Context) -> Iterator[Hit]:
    for node in c.view.of_type(*_DECODE):
        for name in node.input:
            dq = c.through_dq(name)
            # The normalisation before the first convolution is no decode.
            if dq is not None and not c.of_weight(dq) and c.view.conv_depth.get(name, 0) > 0:
                yield node.name, dq.name


def unpaired(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        if node.op_type == "QuantizeLinear" and not weight:
            users = c.view.consumers.get(node.output[0], [])
            if any(c.view.nodes[u].op_type != "DequantizeLinear" for u, _ in users) or not users:
                yield node.name, ""


def external(c: Context) -> Iterator[Hit]:
    yield from ()  # found before the graph's values are looked at, see `lint`
