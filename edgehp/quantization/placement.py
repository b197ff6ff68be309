"""Where Q/DQ pairs go in each flavor. Emitters, calibration and the lint all ask here.

NVIDIA ModelOpt's placement for ResNets: the input of every convolution; of a residual Add only the
skip; the inputs of max pooling and of the global average pooling. Nothing between Conv and Relu,
nothing on the last convolution's edge to the Add: engines add in higher precision, TensorRT inside
the convolution's kernel. A pair there adds a quarter to the difference to FP32, and OpenVINO does
not compute it as the graph says, by which candidates are compared. Flavor ``"cpu"`` quantizes every
Gemm, too.

Flavor ``"onnxruntime"`` is ``"cpu"`` with a pair on both sides of a residual Add: onnxruntime
computes a convolution in integers only where its answer becomes integers at once.

Networks of others are placed by the same rules. Activations (`_FUSED`) run in the kernel of the
layer before them, gates of SiLU and of squeeze-and-excitation between two layers: no pair lies in
front of them. Layers of fewer than 16 channels stay in floating point, as with ModelOpt: integer
kernels work on 16 and more at once, and the last of them is often the pose itself. Whatever else
there is stays in floating point, and `float_operators` names it. Nothing behind the last layer with
weights is quantized: that is the decode.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgehp.errors import UsageError
from edgehp.quantization.graph import ACTIVATIONS, Edge, GraphView
from edgehp.quantization.recipe import FLAVORS

if TYPE_CHECKING:
    import onnx

# These hand on a selection of their input's values, or the same in another shape: with the same
# scale on both sides the second rounding changes nothing.
_TRANSPARENT = ("MaxPool", "Flatten", "Reshape")
_AVERAGES = ("GlobalAveragePool", "AveragePool", "ReduceMean")
# Engines compute these inside of a layer's kernel, or they only rename and move what it made.
_FUSED = (
    *(*ACTIVATIONS, "Mul", "Concat"),
    *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity"),
)
_FEWEST_CHANNELS = 16
# They compute shapes, or stand for a number.
_SHAPES = ("Shape", "Gather", "Constant", "ConstantOfShape", "Cast", "Slice", "Split", "Expand")


@dataclass(frozen=True)
class Placement:
    """Which edges get a Q/DQ pair and which weights become integers.

    Attributes:
        edges: (node, input number) -> the tensor whose range gives the scale.
        weights: nodes whose weight (input 1) becomes int8 per output channel.
    """

    edges: Mapping[Edge, str]
    weights: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors whose ranges are needed, in graph order."""
        return tuple(dict.fromkeys(self.edges.values()))


def quantizable_layers(view: GraphView, flavor: str) -> tuple[str, ...]:
    """Names of the nodes that `float_layers` may name, in graph order."""
    return tuple(dict.fromkeys(node for node, _ in _edges(view, flavor)))


def float_operators(view: GraphView, flavor: str) -> dict[str, tuple[str, ...]]:
    """Operators between the layers that stay in floating point: type -> names of the nodes.

    A layer that works on numbers that are not constant, or of a kind without integer kernels, costs
    the engine a conversion on either side.
    """
    quantized = set(quantizable_layers(view, flavor))
    body, found = view.body(), dict[str, list[str]]()
    for node in view.model.graph.node:
        usual = node.op_type in (*_FUSED, *_SHAPES) or node.name in quantized
        # A Gemm stays in floating point where the engine's own placement leaves it there.
        if node.name in body and not usual and not view.has_weight(node):
            found.setdefault(node.op_type, []).append(node.name)
    return {kind: tuple(names) for kind, names in found.items()}


def place(
    view: GraphView,
    flavor: str,
    float_layers: Collection[str] = (),
) -> Placement:
    """The placement of `flavor` for a float graph.

    Args:
        view: the float graph.
        flavor: ``"tensorrt"`` or ``"cpu"``.
        float_layers: names of nodes whose inputs and weights stay in floating point.

    Raises:
        UsageError: unknown flavor, `float_layers` names a node that cannot be quantized, or the
            graph has no convolution with constant weights.
    """
    edges = _edges(view, flavor)
    known = {node for node, _ in edges}
    if unknown := sorted(set(float_layers) - known):
        raise UsageError(
            f"{', '.join(unknown)}: no quantizable layer of this network in the {flavor} "
            f"flavor; expected names such as {', '.join(sorted(known)[:4])}"
        )
    if not any(view.nodes[node].op_type == "Conv" for node in known):
        raise UsageError("the graph has no Conv with constant float32 weights to quantize")
    kept = set(float_layers)
    chosen = {e: _source(view, view.nodes[e[0]].input[e[1]]) for e in edges if e[0] not in kept}
    weights = tuple(dict.fromkeys(n for n, _ in chosen if view.has_weight(view.nodes[n])))
    return Placement(MappingProxyType(chosen), weights)


def observed_tensors(model: onnx.ModelProto, flavors: Sequence[str] = FLAVORS) -> tuple[str, ...]:
    """Every tensor whose range one of the flavors needs, in graph order."""
    view = GraphView(model)
    found = {t for f in flavors for t in place(view, f).tensors}
    order = [i.name for i in view.inputs] + [o for n in model.graph.node for o in n.output]
    return tuple(t for t in order if t in found)


def _edges(view: GraphView, flavor: str) -> list[Edge]:
    if flavor not in FLAVORS:
        raise UsageError(f"unknown Q/DQ flavor {flavor!r}; known: {', '.join(FLAVORS)}")
    cpu = flavor != "tensorrt"
    skips = {n.name: skip for n, skip in view.residual_adds()}
    body = view.body()
    found: list[Edge] = []
    for node in view.model.graph.node:
        if node.name not in body:
            continue
        behind_conv = view.conv_depth.get(node.output[0], 0) > 0
        if view.has_weight(node):
            if (node.op_type == "Conv" or cpu) and not _is_small(view, node):
                found.append((node.name, 0))
        elif node.name in skips:
            sides = (0, 1) if flavor == "onnxruntime" else (skips[node.name],)
            found += [(node.name, i) for i in sides]
        elif behind_conv and node.op_type in ("MaxPool", *_AVERAGES):
            found.append((node.name, 0))
    return found


def _is_small(view: GraphView, node: onnx.NodeProto) -> bool:
    """Whether a layer has too few channels; the picture's own three are no reason."""
    shape = view.array(node.input[1]).shape
    read = shape[1] * view.attribute(node, "group", 1)
    on_picture = view.conv_depth.get(node.input[0], 0) == 0
    return shape[0] < _FEWEST_CHANNELS or (read < _FEWEST_CHANNELS and not on_picture)


def _source(view: GraphView, tensor: str) -> str:
    """The tensor whose range `tensor` shares."""
    while (node := view.producer.get(tensor)) is not None and node.op_type in _TRANSPARENT:
        tensor = node.input[0]
    return tensor
