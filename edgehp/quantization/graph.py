"""A read-only index of an ONNX graph: who makes a tensor, who uses it, what is constant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgehp.errors import DataError

if TYPE_CHECKING:
    import onnx

# A node's name and the number of one of its inputs.
Edge = tuple[str, int]
# Operators with a weight in input 1 whose output channels are axis 0 (Gemm: with transB=1).
WEIGHTED = ("Conv", "Gemm")
# Functions of one value that engines compute in the kernel of the layer before. A product is the
# gate of SiLU and of squeeze-and-excitation, and fused as they are.
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish")


def network_digest(model: onnx.ModelProto) -> str:
    """SHA-256 (hex) of a graph's nodes, weights and operator sets.

    Names of producers, versions and metadata are left out: they change no number.
    """
    digest = hashlib.sha256(model.graph.SerializeToString(deterministic=True))
    for opset in sorted((o.domain, o.version) for o in model.opset_import):
        digest.update(repr(opset).encode())
    return digest.hexdigest()


def with_constants(
    model: onnx.ModelProto, constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A copy of `model` with these constants in place of its own, and only their memory.

    What is copied into a message and then removed or replaced is kept as long as the message.
    """
    import onnx

    out = onnx.ModelProto()
    for source, target, left_out in (
        (model, out, "graph"),
        (model.graph, out.graph, "initializer"),
    ):
        for field, value in source.ListFields():
            if field.name == left_out:
                continue
            if hasattr(value, "extend"):
                getattr(target, field.name).extend(value)
            elif field.message_type is not None:
                getattr(target, field.name).CopyFrom(value)
            else:
                setattr(target, field.name, value)
    for tensor in constants:
        out.graph.initializer.append(tensor)
    return out


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` whose only outputs are these intermediate tensors."""
    import onnx

    out = with_constants(model, model.graph.initializer)
    known = {o.name: o for o in model.graph.output}
    del out.graph.output[:]
    for name in tensors:
        info = known.get(name) or onnx.helper.make_empty_tensor_value_info(name)
        out.graph.output.append(info)
    return out


def add_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Add nodes of one output each, in place, each just before the first node that reads it.

    New nodes may read each other; those that no node reads are left out.
    """
    waiting = {n.output[0]: n for n in nodes}
    ordered = [n for node in model.graph.node for n in _with_inputs(node, waiting)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _with_inputs(
    node: onnx.NodeProto, waiting: dict[str, onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """The nodes among `waiting` that `node` reads, which are taken out, and then itself."""
    for name in node.input:
        if (needed := waiting.pop(name, None)) is not None:
            yield from _with_inputs(needed, waiting)
    yield node


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove the constants that no node reads, in place."""
    read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
    constants = model.graph.initializer
    for i in reversed(range(len(constants))):
        if constants[i].name not in read:
            del constants[i]


class GraphView:
    """An index of `model`, which must not be changed while the view is used.

    Raises:
        DataError: nodes without a name or with the same name; edges are named after nodes.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[Edge]] = {}
        self._tensors: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if not node.name or node.name in self.nodes:
                raise DataError(
                    f"the graph's {node.op_type} node {node.name!r} has no name of its own\n"
                    "hint: export it again with named nodes, or build it with edgehp"
                )
            self.nodes[node.name] = node
            for output in node.output:
                self.producer[output] = node
            for i, name in enumerate(node.input):
                if name:
                    self.consumers.setdefault(name, []).append((node.name, i))
            if node.op_type == "Constant":
                for a in node.attribute:
                    if a.name == "value":
                        self._tensors[node.output[0]] = a.t

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        versions = [o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")]
        return int(max(versions))

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(o.name for o in self.model.graph.output)

    @cached_property
    def inputs(self) -> tuple[onnx.ValueInfoProto, ...]:
        """The graph's inputs that are not weights."""
        return tuple(i for i in self.model.graph.input if i.name not in self._tensors)

    def is_constant(self, tensor: str) -> bool:
        """Whether `tensor` is an initializer or comes from a Constant node."""
        return tensor in self._tensors

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The constant called `name`, or None."""
        return self._tensors.get(name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of the constant called `name`.

        Raises:
            DataError: no such constant, or its values lie in another file.
        """
        from onnx import numpy_helper

        t = self._tensors.get(name)
        if t is None:
            raise DataError(f"{name} is not a constant of the graph")
        if t.data_location == t.EXTERNAL:
            raise DataError(f"the values of {name} lie in another file; save the graph as one file")
        return np.asarray(numpy_helper.to_array(t))

    def of_type(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these operator types, in graph order."""
        return (n for n in self.model.graph.node if n.op_type in kinds)

    def attribute(self, node: onnx.NodeProto, name: str, default: int) -> int:
        """An integer attribute of `node`."""
        found: int = next((a.i for a in node.attribute if a.name == name), default)
        return found

    def has_weight(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is a Conv or Gemm with a constant floating-point weight [Cout, ...]."""
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            return False
        t = self._tensors.get(node.input[1])
        if t is None or t.data_type != t.FLOAT:
            return False
        return node.op_type == "Conv" or self.attribute(node, "transB", 0) == 1

    @cached_property
    def conv_depth(self) -> dict[str, int]:
        """The largest number of convolutions on a way from an input to each tensor."""
        depth: dict[str, int] = {}
        for node in self.model.graph.node:
            deepest = max((depth.get(i, 0) for i in node.input), default=0)
            for output in node.output:
                depth[output] = deepest + (node.op_type == "Conv")
        return depth

    def residual_adds(self) -> Iterator[tuple[onnx.NodeProto, int]]:
        """Each Add of a convolution's answer and another tensor, with the input of its skip.

        The skip (identity or downsampling) is the side with fewer convolutions before it. Sums in
        attention, capsules and decodes are none: no engine adds them in a convolution's kernel.
        """
        for node in self.of_type("Add"):
            if any(map(self.is_constant, node.input)):
                continue
            if any(map(self._of_convolution, node.input)):
                depths = [self.conv_depth.get(i, 0) for i in node.input]
                yield node, 0 if depths[0] < depths[1] else 1

    def _of_convolution(self, tensor: str) -> bool:
        """Whether a convolution makes `tensor`, an activation or another Add behind it allowed."""
        wanted, seen = [tensor], set[str]()
        while wanted:
            name = wanted.pop()
            node = self.producer.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type == "Conv":
                return True
            if node.op_type in (*ACTIVATIONS, "Mul", "Add"):
                wanted += node.input
        return False

    def body(self) -> frozenset[str]:
        """Names of the nodes from the first to the last Conv or Gemm: what may change its type.

        Normalisation comes before it and the decode behind it.
        """
        after: set[str] = set()  # tensors
        below: set[str] = set()  # nodes
        for node in self.model.graph.node:
            if self.has_weight(node) or any(i in after for i in node.input):
                after.update(node.output)
                below.add(node.name)
        before: set[str] = set()
        above: set[str] = set()
        for node in reversed(self.model.graph.node):
            if self.has_weight(node) or any(o in before for o in node.output):
                before.update(node.input)
                above.add(node.name)
        return frozenset(below & above)
