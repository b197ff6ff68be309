"""A lint that knows what TensorRT, OpenVINO and onnxruntime do with a Q/DQ graph.

The rules are data (`RULES`): an id, what is wrong, the remedy, the flavours it holds for, and a
check that yields the nodes concerned. Run before every build.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgehp.errors import UsageError
from edgehp.quantization.graphview import WEIGHTED, GraphView
from edgehp.quantization.halves import HALF_OPSET
from edgehp.quantization.placement import FLAVOURS

if TYPE_CHECKING:
    import onnx

__all__ = ["RULES", "Finding", "Rule", "lint"]

_TRT = ("tensorrt",)
_CPU = ("cpu",)
_NARROW = 16  # TensorRT's INT8 convolution kernels work on at least 16 channels
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_DECODE = ("Softmax", "ReduceSum", "Sqrt", "Sub", "Mul", "Squeeze")
_AVERAGES = ("GlobalAveragePool", "AveragePool", "ReduceMean")

# (node, detail)
Hit = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule."""

    rule: str
    node: str
    message: str
    remedy: str


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


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: stable name, used in reports and tests.
        what: what is wrong, in a sentence.
        remedy: what to do.
        flavours: where it holds.
        check: yields (node, detail) for each place.
    """

    id: str
    what: str
    remedy: str
    flavours: tuple[str, ...]
    check: Callable[[Context], Iterator[Hit]]


def lint(
    model: onnx.ModelProto,
    flavour: str,
    *,
    keep_float: Collection[str] = (),
    head: bool | None = None,
) -> tuple[Finding, ...]:
    """Check a Q/DQ graph against the rules of its flavour.

    Args:
        model: the Q/DQ graph.
        flavour: ``"tensorrt"`` or ``"cpu"``.
        keep_float: nodes that are meant to stay in floating point.
        head: whether the Gemm nodes are meant to be integers; None: in ``"cpu"`` only.

    Raises:
        UsageError: unknown flavour.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"unknown Q/DQ flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    external = [
        Finding(_EXTERNAL.id, t.name, f"{t.name}: {_EXTERNAL.what}", _EXTERNAL.remedy)
        for t in model.graph.initializer
        if t.data_location == t.EXTERNAL
    ]
    if external:  # the values that the other rules look at are not here
        return tuple(external)
    context = Context(
        GraphView(model), frozenset(keep_float), flavour == "cpu" if head is None else head
    )
    return tuple(
        _finding(rule, node, detail)
        for rule in RULES
        if flavour in rule.flavours
        for node, detail in rule.check(context)
    )


def _finding(rule: Rule, node: str, detail: str) -> Finding:
    message = f"{node}: {rule.what}" + (f" ({detail})" if detail else "")
    return Finding(rule.id, node, message, rule.remedy)


def _activation_zero_point(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        zero = c.value(node, 2)
        if not weight and zero is not None and zero.dtype == np.int8 and np.any(zero):
            yield node.name, f"zero point {int(zero.reshape(-1)[0])}"


def _activation_uint8(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        zero = c.value(node, 2)
        # Without a zero point the type is uint8.
        uint8 = zero is None if node.op_type == "QuantizeLinear" else False
        if not weight and (uint8 or (zero is not None and zero.dtype == np.uint8)):
            yield node.name, ""


def _bad_scale(c: Context) -> Iterator[Hit]:
    for node, _ in c.pairs():
        scale = c.value(node, 1)
        if scale is None:
            continue
        values = scale.astype(np.float64)
        if not np.isfinite(values).all() or (values <= 0).any():
            yield node.name, f"smallest {values.min():g}"


def _scale_not_constant(c: Context) -> Iterator[Hit]:
    for node, _ in c.pairs():
        if c.value(node, 1) is None:
            yield node.name, node.input[1]


def _activation_per_channel(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        scale = c.value(node, 1)
        if not weight and scale is not None and scale.size > 1:
            yield node.name, f"{scale.size} scales"


def _weight_dqs(c: Context) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    for node in c.view.of_type(*WEIGHTED):
        dq = c.through_dq(node.input[1])
        if dq is not None and c.of_weight(dq):
            yield node, dq


def _weight_zero_point(c: Context) -> Iterator[Hit]:
    for _, dq in _weight_dqs(c):
        zero = c.value(dq, 2)
        if zero is not None and np.any(zero):
            yield dq.name, ""


def _weight_per_tensor(c: Context) -> Iterator[Hit]:
    for node, dq in _weight_dqs(c):
        scale = c.value(dq, 1)
        axis = c.view.attribute(dq, "axis", 1)
        if scale is None:
            continue
        if scale.size == 1:
            yield dq.name, "one scale for the whole weight"
        elif axis != 0:
            yield dq.name, f"axis {axis} of {node.op_type}"


def _bias_quantised(c: Context) -> Iterator[Hit]:
    for node in c.view.of_type(*WEIGHTED):
        if len(node.input) > 2 and node.input[2] and c.through_dq(node.input[2]) is not None:
            yield node.name, node.input[2]


def _between_conv_and_relu(c: Context) -> Iterator[Hit]:
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


def _conv_float(c: Context) -> Iterator[Hit]:
    yield from _float_input(c, ("Conv",))


def _conv_weight_float(c: Context) -> Iterator[Hit]:
    kinds = WEIGHTED if c.head else ("Conv",)
    for node in c.view.of_type(*kinds):
        if node.name not in c.keep_float and c.through_dq(node.input[1]) is None:
            yield node.name, ""


def _gemm_float(c: Context) -> Iterator[Hit]:
    if c.head:
        yield from _float_input(c, ("Gemm",))


def _pool_float(c: Context) -> Iterator[Hit]:
    yield from _float_input(c, ("MaxPool", *_AVERAGES))


def _residual(c: Context) -> Iterator[tuple[onnx.NodeProto, bool, bool]]:
    """Residual Adds with whether the skip and the other side come through Q/DQ."""
    for node, skip in c.view.residual_adds():
        if node.name in c.keep_float:
            continue
        sides = [c.through_dq(i) is not None for i in node.input]
        yield node, sides[skip], sides[1 - skip]


def _add_both(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if skip and other)


def _add_wrong_side(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if other and not skip)


def _add_skip_float(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, other in _residual(c) if not (skip or other))


def _cpu_skip_float(c: Context) -> Iterator[Hit]:
    yield from ((n.name, "") for n, skip, _ in _residual(c) if not skip)


def _half_scale_opset(c: Context) -> Iterator[Hit]:
    if c.view.opset >= HALF_OPSET:
        return
    for node, _ in c.pairs():
        scale = c.value(node, 1)
        if scale is not None and scale.dtype == np.float16:
            yield node.name, f"opset {c.view.opset}"


def _mixed_scale_types(c: Context) -> Iterator[Hit]:
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


def _narrow(c: Context) -> Iterator[Hit]:
    first = next(iter(c.view.of_type("Conv")), None)
    for node in c.view.of_type("Conv"):
        dq = c.through_dq(node.input[1])
        weight = None if dq is None else c.value(dq, 0)
        if weight is None or node is first or node.name in c.keep_float:
            continue
        if min(weight.shape[:2]) < _NARROW:
            yield node.name, f"{weight.shape[1]} -> {weight.shape[0]} channels"


def _weight_stored_float(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        if weight and node.op_type == "QuantizeLinear":
            yield node.name, node.input[0]


def _dynamic_size(c: Context) -> Iterator[Hit]:
    for value in c.view.inputs:
        dims = value.type.tensor_type.shape.dim
        if any(not d.HasField("dim_value") or d.dim_value < 1 for d in list(dims)[1:]):
            yield value.name, "only the batch may be free"


def _decode_quantised(c: Context) -> Iterator[Hit]:
    for node in c.view.of_type(*_DECODE):
        for name in node.input:
            dq = c.through_dq(name)
            # The normalisation before the first convolution is no decode.
            if dq is not None and not c.of_weight(dq) and c.view.conv_depth.get(name, 0) > 0:
                yield node.name, dq.name


def _unpaired(c: Context) -> Iterator[Hit]:
    for node, weight in c.pairs():
        if node.op_type == "QuantizeLinear" and not weight:
            users = c.view.consumers.get(node.output[0], [])
            if any(c.view.nodes[u].op_type != "DequantizeLinear" for u, _ in users) or not users:
                yield node.name, ""


def _external(c: Context) -> Iterator[Hit]:
    yield from ()  # found before the graph's values are looked at, see `lint`


_EXTERNAL = Rule(
    "external-data",
    "its values lie in another file, and TensorRT's parser gets bytes only",
    "save the graph as one file (onnx.save with save_as_external_data=False)",
    FLAVOURS,
    _external,
)

RULES: tuple[Rule, ...] = (
    _EXTERNAL,
    Rule(
        "activation-zero-point",
        "an int8 activation with a zero point that is not 0; TensorRT refuses it",
        "calibrate symmetrically: scale = largest magnitude / 127, zero point 0",
        _TRT,
        _activation_zero_point,
    ),
    Rule(
        "activation-uint8",
        "a uint8 activation; TensorRT's parser refuses it",
        "emit the graph in the tensorrt flavour",
        _TRT,
        _activation_uint8,
    ),
    Rule(
        "bad-scale",
        "a scale that is zero, negative or not finite",
        "calibrate again with crops that the network answers to; a dead tensor needs any positive "
        "scale",
        FLAVOURS,
        _bad_scale,
    ),
    Rule(
        "scale-not-constant",
        "a scale that the graph computes; engines need constants",
        "run onnxsim, or calibrate statically",
        FLAVOURS,
        _scale_not_constant,
    ),
    Rule(
        "activation-per-channel",
        "an activation with a scale per channel; only weights may have one",
        "use one scale for the tensor",
        FLAVOURS,
        _activation_per_channel,
    ),
    Rule(
        "weight-zero-point",
        "an asymmetric weight",
        "quantise weights symmetrically with zero point 0",
        FLAVOURS,
        _weight_zero_point,
    ),
    Rule(
        "weight-per-tensor",
        "a weight that is not quantised per output channel",
        "one scale per output channel, axis 0",
        FLAVOURS,
        _weight_per_tensor,
    ),
    Rule(
        "bias-quantised",
        "an integer bias; TensorRT refuses int32 DequantizeLinear",
        "leave the bias in floating point: the engine folds it in",
        _TRT,
        _bias_quantised,
    ),
    Rule(
        "between-conv-and-relu",
        "Q/DQ before a Relu keeps it from being fused and costs a bit of resolution",
        "put the pair behind the Relu",
        FLAVOURS,
        _between_conv_and_relu,
    ),
    Rule(
        "conv-input-float",
        "a convolution without Q/DQ on its input would run in floating point",
        "quantise its input, or name it in keep_float",
        FLAVOURS,
        _conv_float,
    ),
    Rule(
        "weight-float",
        "a layer asked for in INT8 with a weight in floating point",
        "quantise the weight, or name the layer in keep_float",
        FLAVOURS,
        _conv_weight_float,
    ),
    Rule(
        "gemm-float",
        "a fully connected layer in floating point where INT8 was asked for",
        "quantise its input, or name it in keep_float",
        FLAVOURS,
        _gemm_float,
    ),
    Rule(
        "pool-float",
        "pooling in floating point splits the chain of INT8 layers",
        "put Q/DQ on its input",
        FLAVOURS,
        _pool_float,
    ),
    Rule(
        "add-both-quantised",
        "both inputs of a residual Add are quantised, so it is not fused into the convolution",
        "quantise the skip only; leave the edge from the last convolution alone",
        _TRT,
        _add_both,
    ),
    Rule(
        "add-wrong-side",
        "the edge from the last convolution to a residual Add is quantised and the skip is not",
        "quantise the skip instead",
        _TRT,
        _add_wrong_side,
    ),
    Rule(
        "add-skip-float",
        "a residual Add whose skip is in floating point",
        "put Q/DQ on the skip",
        _TRT,
        _add_skip_float,
    ),
    Rule(
        "add-float",
        "a residual Add whose skip is in floating point leaves the integers",
        "put Q/DQ on the skip",
        _CPU,
        _cpu_skip_float,
    ),
    Rule(
        "half-scale-opset",
        f"FP16 scales need opset {HALF_OPSET}",
        f"raise the graph to opset {HALF_OPSET} before it is quantised",
        FLAVOURS,
        _half_scale_opset,
    ),
    Rule(
        "mixed-types",
        "scales, weight and bias of one layer have different types; strongly typed engines "
        "refuse the layer",
        "use one of FP32 and FP16 for all of them",
        FLAVOURS,
        _mixed_scale_types,
    ),
    Rule(
        "narrow-convolution",
        f"INT8 convolutions of fewer than {_NARROW} channels have no fast kernel",
        f"use at least {_NARROW} channels, or name the layer in keep_float",
        _TRT,
        _narrow,
    ),
    Rule(
        "weight-stored-float",
        "a weight stored in floating point with a Q behind it makes the file four times as large",
        "store int8 and a DequantizeLinear alone",
        FLAVOURS,
        _weight_stored_float,
    ),
    Rule(
        "dynamic-size",
        "an input whose height, width or channels are free",
        "export with a fixed input size",
        FLAVOURS,
        _dynamic_size,
    ),
    Rule(
        "decode-quantised",
        "the decode (softmax, expectation) must stay in floating point",
        "remove Q/DQ behind the head",
        FLAVOURS,
        _decode_quantised,
    ),
    Rule(
        "unpaired",
        "a QuantizeLinear that no DequantizeLinear follows",
        "put a DequantizeLinear with the same scale behind it",
        FLAVOURS,
        _unpaired,
    ),
)
