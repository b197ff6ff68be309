"""A lint of Q/DQ graphs: what TensorRT, OpenVINO and onnxruntime refuse or compute slowly.

It runs on every graph that is built. The graph comes from `edgehp.quantization.qdq`, but the float
network under it may be anybody's, and each TensorRT has rules of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.graph import WEIGHTED, GraphView
from edgehp.quantization.recipe import FLAVORS

if TYPE_CHECKING:
    import onnx

__all__ = ["RULES", "Finding", "lint"]

_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule."""

    rule: str
    node: str
    message: str
    hint: str

    def __str__(self) -> str:
        """The finding as two lines of an error."""
        return f"{self.rule} at {self.node}: {self.message}\nhint: {self.hint}"


def lint(
    model: onnx.ModelProto, flavor: str, float_layers: Collection[str] = ()
) -> tuple[Finding, ...]:
    """Check a Q/DQ graph against the rules of its flavor.

    Args:
        model: the Q/DQ graph.
        flavor: ``"tensorrt"`` or ``"cpu"``.
        float_layers: nodes that are meant to stay in floating point.

    Raises:
        UsageError: unknown flavor.
        DataError: its constants lie in another file.
    """
    if flavor not in FLAVORS:
        raise UsageError(f"unknown Q/DQ flavor {flavor!r}; known: {', '.join(FLAVORS)}")
    graph = _Graph(model, flavor, float_layers)
    return tuple(f for rule in RULES.values() for f in rule(graph))


class _Graph(GraphView):
    """A Q/DQ graph with what the rules ask about it."""

    def __init__(self, model: onnx.ModelProto, flavor: str, float_layers: Collection[str]) -> None:
        super().__init__(model)
        self.tensorrt = flavor == "tensorrt"
        self.float_layers = frozenset(float_layers)

    def dequantizer(self, tensor: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes `tensor`, or None."""
        node = self.producer.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def value(self, node: onnx.NodeProto, index: int) -> npt.NDArray[np.generic] | None:
        """A constant input of `node`, or None."""
        if len(node.input) <= index or not self.is_constant(node.input[index]):
            return None
        return self.array(node.input[index])

    def pairs(self) -> Iterator[tuple[onnx.NodeProto, bool]]:
        """Every Q and DQ node, and whether a constant lies behind it (a weight or bias)."""
        for node in self.of_type(*_PAIR):
            first = node
            while (before := self.producer.get(first.input[0])) is not None and (
                before.op_type in _PAIR
            ):
                first = before
            yield node, self.is_constant(first.input[0])

    def is_int8(self, node: onnx.NodeProto) -> bool:
        """Whether all inputs that a layer computes with come through Q/DQ."""
        read = node.input[:2] if node.op_type in WEIGHTED else node.input
        return all(self.dequantizer(i) is not None for i in read if self.reads(node, i))

    def reads(self, node: onnx.NodeProto, tensor: str) -> bool:
        """Whether `tensor` is something that a layer computes with: its weight or an activation."""
        return node.op_type in WEIGHTED or not self.is_constant(tensor)


def _zero_point(g: _Graph) -> Iterator[Finding]:
    for node, weight in g.pairs():
        zero = g.value(node, 2)
        if weight and zero is not None and np.any(zero):
            yield Finding(
                "zero-point", node.name, "an asymmetric weight", "quantize weights symmetrically"
            )
        # Without a zero point the type is uint8.
        uint8 = node.op_type == "QuantizeLinear" if zero is None else zero.dtype == np.uint8
        if g.tensorrt and not weight and (uint8 or np.any(zero)):
            yield Finding(
                "zero-point",
                node.name,
                "a uint8 or asymmetric activation; TensorRT takes int8 with zero point 0 only",
                "quantize for the tensorrt flavor",
            )


def _scale(g: _Graph) -> Iterator[Finding]:
    for node, weight in g.pairs():
        scale = g.value(node, 1)
        what = hint = ""
        if scale is None:
            what, hint = "a scale that the graph computes", "make the scale a constant"
        elif not (np.isfinite(scale.astype(np.float64)) & (scale.astype(np.float64) > 0)).all():
            what, hint = "a scale that is not positive and finite", "calibrate on other crops"
        elif not weight and scale.size > 1:
            what, hint = "an activation with a scale per channel", "use one scale for the tensor"
        if what:
            yield Finding("scale", node.name, what, hint)


def _axis(g: _Graph) -> Iterator[Finding]:
    for node in g.of_type(*WEIGHTED):
        dq = g.dequantizer(node.input[1])
        scale = None if dq is None else g.value(dq, 1)
        if dq is None or scale is None:
            continue
        # Axis 0 is the output channel of Conv, and of Gemm with transB=1.
        axis = g.attribute(dq, "axis", 1)
        channels = g.array(dq.input[0]).shape[0] if g.is_constant(dq.input[0]) else scale.size
        if scale.size != channels or axis != 0:
            found = "one scale for all channels" if scale.size == 1 else f"scales on axis {axis}"
            yield Finding(
                "weight-axis", node.name, f"a weight with {found}", "use one per output channel"
            )


def _bias(g: _Graph) -> Iterator[Finding]:
    for node in g.of_type(*WEIGHTED) if g.tensorrt else ():
        if len(node.input) > 2 and g.dequantizer(node.input[2]) is not None:
            yield Finding(
                "integer-bias",
                node.name,
                "an integer bias; TensorRT refuses int32 DequantizeLinear",
                "leave the bias in floating point: the engine folds it in",
            )


def _residual_add(g: _Graph) -> Iterator[Finding]:
    for node, skip in g.residual_adds():
        if node.name in g.float_layers:
            continue
        through = [g.dequantizer(i) is not None for i in node.input]
        if not through[skip]:
            yield Finding(
                "residual-add", node.name, "a skip in floating point", "put Q/DQ on the skip"
            )
        if g.tensorrt and through[1 - skip]:
            yield Finding(
                "residual-add",
                node.name,
                "Q/DQ between the last convolution and its residual Add, which keeps TensorRT from "
                "adding in the convolution's kernel",
                "quantize the skip only",
            )


def _float(g: _Graph) -> Iterator[Finding]:
    """Layers that lost their INT8; what never has any is `placement.float_operators`."""
    for node in g.model.graph.node:
        if node.name in g.float_layers:
            continue
        if node.op_type in ("Relu", "Clip") and g.dequantizer(node.input[0]) is not None:
            yield Finding(
                "not-int8",
                node.name,
                "Q/DQ before an activation function keeps it out of its layer's kernel",
                "put the pair behind it",
            )
        if node.op_type in ("Conv", "MaxPool") and not g.is_int8(node):
            yield Finding(
                "not-int8",
                node.name,
                f"a {node.op_type} in floating point among INT8 layers",
                "quantize its inputs, or name it among the layers that stay in floating point",
            )


RULES: dict[str, Callable[[_Graph], Iterator[Finding]]] = {
    "zero-point": _zero_point,
    "scale": _scale,
    "weight-axis": _axis,
    "integer-bias": _bias,
    "residual-add": _residual_add,
    "not-int8": _float,
}
