"""A lint of Q/DQ graphs: what TensorRT, OpenVINO and onnxruntime refuse or compute slowly.

It runs on every graph that is built. The graph comes from `edgehp.quantization.qdq`, but the float
network under it may be anybody's, and each TensorRT has rules of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.graph import WEIGHTED, GraphView
from edgehp.quantization.placement import Placement
from edgehp.quantization.recipe import FLAVORS

if TYPE_CHECKING:
    import onnx

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


def lint(model: onnx.ModelProto, flavor: str, placement: Placement) -> tuple[Finding, ...]:
    """Check a Q/DQ graph against the rules of its flavor.

    Args:
        model: the Q/DQ graph.
        flavor: one of `recipe.FLAVORS`.
        placement: where pairs and integer weights should be.

    Raises:
        UsageError: unknown flavor.
        DataError: its constants lie in another file.
    """
    if flavor not in FLAVORS:
        raise UsageError(f"unknown Q/DQ flavor {flavor!r}; known: {', '.join(FLAVORS)}")
    graph = _Graph(model, flavor, placement)
    return tuple(f for rule in RULES.values() for f in rule(graph))


class _Graph(GraphView):
    """A Q/DQ graph with what the rules ask about it."""

    def __init__(self, model: onnx.ModelProto, flavor: str, placement: Placement) -> None:
        super().__init__(model)
        self.tensorrt = flavor == "tensorrt"
        self.placement = placement

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


def _missing(g: _Graph) -> Iterator[Finding]:
    wanted = [*g.placement.edges, *((name, 1) for name in g.placement.weights)]
    for name, index in wanted:
        node = g.nodes[name]
        if g.dequantizer(node.input[index]) is None:
            what = "weight" if node.op_type in WEIGHTED and index == 1 else "input"
            yield Finding(
                "not-int8",
                name,
                f"a {node.op_type} with a floating-point {what} among INT8 layers",
                "quantize it, or name it among the layers that stay in floating point",
            )


def _needless(g: _Graph) -> Iterator[Finding]:
    for node in g.model.graph.node:
        for index, tensor in enumerate(node.input):
            pair = g.dequantizer(tensor)
            wanted = (node.name, index) in g.placement.edges
            if pair is None or wanted or g.is_constant(pair.input[0]) or node.op_type in _PAIR:
                continue
            yield Finding(
                "needless-pair",
                node.name,
                f"Q/DQ in front of {node.op_type}, which keeps the engine from computing it in the "
                "kernel of the layer before",
                "put the pair behind it; of a residual Add, quantize the skip only",
            )


RULES: dict[str, Callable[[_Graph], Iterator[Finding]]] = {
    "zero-point": _zero_point,
    "scale": _scale,
    "weight-axis": _axis,
    "integer-bias": _bias,
    "not-int8": _missing,
    "needless-pair": _needless,
}
