"""A described network of others (`edgehp.networks.description`) as a deployed graph.

The network's nodes stay as they are, between two parts of our own:

* in front, uint8 NHWC crops become what the network was trained with (names begin with ``in/``);
* behind, its output becomes ``angles`` and, of bins, ``spread`` (names begin with ``out/``).

ONNX knows no atan2 and no cross product: both are written out of simpler operators that TensorRT,
OpenVINO and onnxruntime all have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from edgehp.errors import CheckpointError
from edgehp.networks.description import (
    ANGLES,
    DarkRule,
    Description,
    InputSpec,
    OutputSpec,
)
from edgehp.networks.foreign import free_batch, read_network, replace_all, shape_of
from edgehp.networks.graph import INPUT, OUTPUTS, GraphBuilder, decode_bins, outputs_of
from edgehp.networks.simplify import run_graph, simplify
from edgehp.networks.spec import Bins, DeployedSpec

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

_log = logging.getLogger(__name__)

# ITU-R BT.601, as OpenCV's COLOR_RGB2GRAY, which networks for grey pictures were trained with.
GREY_WEIGHTS = (0.299, 0.587, 0.114)
_TINY = 1e-12
_WIDTH = {"euler": 3, "quaternion": 4, "sixd": 6, "matrix": 9}


class _Part(NamedTuple):
    """One network file, ready to be put between input and decode.

    Attributes:
        model: of a single float32 input with a free batch.
        input: its name.
        nhwc: whether channels come last.
        outputs: names of those that are decoded.
        width: number of values of all of them together, a crop; None where the file does not say.
    """

    model: onnx.ModelProto
    input: str
    nhwc: bool
    outputs: tuple[str, ...]
    width: int | None


def deployed_graph(
    description: Description, *, simple: bool = True
) -> tuple[onnx.ModelProto, DeployedSpec]:
    """Wrap the network files of a description into one deployed graph.

    Args:
        description: with files that exist.
        simple: turn a quantized network back into floating point, run onnxsim, bring linear layers
            into one form and fold normalisation into the first convolution. False keeps every node
            as it is, for a teacher that is asked on this machine only.

    Returns:
        The graph and the specification that it carries.

    Raises:
        CheckpointError: a file is no network that can be read, or not as described.
        EnvironmentalError: onnx, onnxruntime or onnxsim is missing or failed.
    """
    parts = [_part(p, description, as_written=not simple) for p in description.paths]
    spec = _spec(description, parts)
    b = GraphBuilder()
    x = _input(b, description)
    found = []
    for number, part in enumerate(parts):
        crops = x
        if part.nhwc:
            crops = b.node("Transpose", f"{x}.nhwc{number or ''}", [x], perm=[0, 2, 3, 1])
        prefix = f"{number + 1}/" if len(parts) > 1 else ""
        outputs = b.include(part.model, {part.input: crops}, prefix)
        tensors = [outputs[o] for o in part.outputs]
        found.append(_decoded(b, f"out/{number or ''}", description.output, tensors, spec))
    _answer(b, description.output, found, spec)
    versions = [max(o.version for o in p.model.opset_import) for p in parts]
    if len(set(versions)) > 1:
        raise CheckpointError(
            f"{description.name}: its files have the operator sets {versions}, expected one for "
            "all\nhint: export them again alike"
        )
    model = b.model(spec, versions[0])
    _try(model, description, spec)
    if simple:
        model = _fold_input(_linear_layers(simplify(model)))
        _try(model, description, spec)
    return model, spec


def described_spec(description: Description) -> DeployedSpec:
    """The specification of a described network: what its deployed graph carries.

    Raises:
        CheckpointError: a file is no network that can be read, or not as described.
    """
    # The number of bins stands in the network's output alone, which Q/DQ pairs do not change: that
    # they are turned back is said where it is done.
    parts = [_part(path, description, as_written=True) for path in description.paths]
    return _spec(description, parts)


def _spec(description: Description, parts: Sequence[_Part]) -> DeployedSpec:
    output, bins = description.output, None
    if output.kind == "bins":
        counts = {p.width for p in parts}
        width = next(iter(counts))
        if len(counts) != 1 or width is None or width % 3 or width < 6:
            raise CheckpointError(
                f"{description.name}: {width or 'an unknown number of'} values in the output of "
                "bins, expected the same number for each of three angles"
            )
        bins = Bins(width // 3, output.first, output.last)
    return DeployedSpec(
        name=description.name,
        bins=bins,
        preprocessing=description.input.preprocessing,
        licence=description.licence,
    )


def _part(path: Path, description: Description, *, as_written: bool = False) -> _Part:
    """Read a network file and look whether it is as described."""
    model = read_network(path, as_written=as_written)
    given = {i.name: i for i in model.graph.input}
    name = description.input.name or next(iter(given), "")
    if name not in given:
        raise CheckpointError(f"{path}: no input {name!r}, found {', '.join(given) or 'none'}")
    if len(given) > 1:
        raise CheckpointError(
            f"{path} has the inputs {', '.join(given)}, expected one\n"
            "hint: export the network with the picture as its only input"
        )
    spec, channels, shape = description.input, len(description.input.mean), shape_of(given[name])
    if len(shape) != 4:
        raise CheckpointError(f"{path}: its input is {shape}, expected four dimensions")
    nhwc = spec.layout == "NHWC" or (
        not spec.layout and shape[3] == channels and shape[1] != channels
    )
    sides = (spec.size, spec.size, channels) if nhwc else (channels, spec.size, spec.size)
    if any(d is not None and d != s for d, s in zip(shape[1:], sides, strict=True)):
        raise CheckpointError(
            f"{path}: its input is {[d or '?' for d in shape]}, the description says "
            f"{['N', *sides]}\nhint: correct size, colour or layout under [input]"
        )
    outputs = [o.name for o in model.graph.output]
    names = description.output.names or tuple(outputs[:1])
    for wanted in names:
        if wanted not in outputs:
            raise CheckpointError(f"{path}: no output {wanted!r}, found {', '.join(outputs)}")
    model = free_batch(model, name, sides, names)
    shapes = [shape_of(o) for o in model.graph.output]
    widths = [int(np.prod([d or 0 for d in s[1:]])) if len(s) > 0 else 0 for s in shapes]
    width = sum(widths) if all(widths) else None
    expected = _WIDTH.get(description.output.kind)
    if expected is not None and width is not None and width != expected:
        shown = [f"{n} {[d or 'N' for d in s]}" for n, s in zip(names, shapes, strict=True)]
        raise CheckpointError(
            f"{path}: the output is {', '.join(shown)}, expected {expected} values a crop for "
            f"{description.output.kind}"
        )
    return _Part(model, name, nhwc, names, width)


def _input(b: GraphBuilder, description: Description) -> str:
    """Crops as the network was trained with, NCHW."""
    p = description.input
    x = b.node("Cast", "in/to_float", [INPUT], to=1)
    x = b.node("Transpose", "in/to_nchw", [x], perm=[0, 3, 1, 2])
    if p.dark is not None:
        return _brightened(b, x, p, p.dark)
    # In the order of RGB, whatever the network's is.
    order = [2, 1, 0] if p.colour == "BGR" else [0, 1, 2]
    mean, std = (np.resize(v, 3)[order].reshape(1, 3, 1, 1) for v in (p.mean, p.std))
    x = b.node("Sub", "in/centred", [x, b.constant("in/mean", mean)])
    x = b.node("Mul", "in/scaled", [x, b.constant("in/gain", 1 / std)])
    if p.colour == "GREY":
        return _grey(b, x)
    if p.colour == "BGR":
        x = b.node("Gather", "in/bgr", [x, b.constant("in/order", order)], axis=1)
    return x


def _grey(b: GraphBuilder, x: str) -> str:
    weights = b.constant("in/grey_weights", np.array(GREY_WEIGHTS).reshape(1, 3, 1, 1))
    x = b.node("Mul", "in/weighted", [x, weights])
    return b.node("ReduceSum", "in/grey", [x, b.constant("in/channel", [1])], keepdims=1)


def _brightened(b: GraphBuilder, x: str, p: InputSpec, rule: DarkRule) -> str:
    """``grey * gain - mean / std``; the gain rises where the crop is dark (`DarkRule`)."""
    x = _grey(b, x)
    count = p.size * p.size
    # numpy.percentile: linear between the two nearest ranks.
    rank = (count - 1) * rule.percentile / 100
    low, share = int(rank), rank - int(rank)
    most = count - low
    flat = b.node("Flatten", "in/pixels", [x], axis=1)
    b.node("TopK", "in/bright", [flat, b.constant("in/most", [most])], "in/bright_at")
    ends = [most - 1, max(most - 2, 0)]
    pair = b.node("Gather", "in/ranks", ["in/bright", b.constant("in/ends", ends)], axis=1)
    weights = b.constant("in/shares", [[1 - share, share]])
    pair = b.node("Mul", "in/shared", [pair, weights])
    level = b.node("ReduceSum", "in/level", [pair, b.constant("in/level_axis", [1])], keepdims=1)
    floored = b.node("Max", "in/floored", [level, b.constant("in/floor", rule.floor)])
    raised = b.node("Div", "in/raised", [b.constant("in/rise", rule.gain), floored])
    dark = b.node("Less", "in/is_dark", [level, b.constant("in/below", rule.below)])
    usual = b.constant("in/usual", [[1 / p.std[0]]])
    gain = b.node("Where", "in/gain", [dark, raised, usual])
    gain = b.node("Unsqueeze", "in/gain4", [gain, b.constant("in/gain_axes", [2, 3])])
    x = b.node("Mul", "in/brightened", [x, gain])
    offset = b.constant("in/offset", p.mean[0] / p.std[0])
    return b.node("Sub", "in/centred", [x, offset])


def _decoded(
    b: GraphBuilder, tag: str, output: OutputSpec, tensors: Sequence[str], spec: DeployedSpec
) -> str:
    """What of several files is averaged: angles [N, 3], matrices [N, 9] or probabilities."""
    if spec.bins is not None:
        parts = [b.node("Flatten", f"{tag}flat{i}", [t], axis=1) for i, t in enumerate(tensors)]
        x = parts[0] if len(parts) == 1 else b.node("Concat", f"{tag}joined", parts, axis=1)
        shape = b.constant(f"{tag}shape", [0, 3, spec.bins.count])
        x = b.node("Reshape", f"{tag}logits", [x, shape])
        x = b.node("Softmax", f"{tag}probabilities", [x], axis=2)
        return _reordered(b, x, output.order, f"{tag}ordered")
    if len(tensors) > 1:
        column = b.constant(f"{tag}column", [-1, 1])
        parts = [b.node("Reshape", f"{tag}column{i}", [t, column]) for i, t in enumerate(tensors)]
        x = b.node("Concat", f"{tag}joined", parts, axis=1)
    else:
        shape = b.constant(f"{tag}shape", [-1, _WIDTH[output.kind]])
        x = b.node("Reshape", f"{tag}values", [tensors[0], shape])
    if output.kind == "euler":
        return _reordered(b, x, output.order, f"{tag}ordered")
    if output.kind == "quaternion":
        return _matrix_of_quaternion(b, tag, x, output.order)
    return _matrix_of_sixd(b, tag, x) if output.kind == "sixd" else x


def _picked(b: GraphBuilder, name: str, x: str, index: Sequence[int]) -> str:
    """Some of the values [N, K] or rows [N, K, ...], by their numbers."""
    return b.node("Gather", name, [x, b.constant(f"{name}.index", index)], axis=1)


def _reordered(b: GraphBuilder, x: str, order: Sequence[str], name: str) -> str:
    if tuple(order) == ANGLES:
        return x
    return _picked(b, name, x, [order.index(a) for a in ANGLES])


def _matrix_of_quaternion(b: GraphBuilder, tag: str, x: str, order: Sequence[str]) -> str:
    """Rotation matrices [N, 9], row by row, of quaternions [N, 4] of any length."""
    # Each entry is a sum of products of two of the four: one constant says which.
    terms = np.zeros((3, 3, 4, 4))
    w, *xyz = (order.index(name) for name in "wxyz")
    for i in range(3):
        j, k = (i + 1) % 3, (i + 2) % 3
        one, two, three = xyz[i], xyz[j], xyz[k]
        for factor, a in ((1, w), (1, one), (-1, two), (-1, three)):
            terms[i, i, a, a] = factor
        terms[i, j, one, two] = terms[j, i, one, two] = 2
        terms[i, j, three, w], terms[j, i, three, w] = -2, 2
    x = _unit(b, f"{tag}unit", x)
    left = b.node("Unsqueeze", f"{tag}left", [x, b.constant(f"{tag}left_axis", [2])])
    right = b.node("Unsqueeze", f"{tag}right", [x, b.constant(f"{tag}right_axis", [1])])
    products = b.node("Mul", f"{tag}products", [left, right])
    flat = b.constant(f"{tag}products_shape", [-1, 1, 16])
    products = b.node("Reshape", f"{tag}products_flat", [products, flat])
    constant = b.constant(f"{tag}terms", terms.reshape(1, 9, 16))
    x = b.node("Mul", f"{tag}signed", [products, constant])
    axis = b.constant(f"{tag}terms_axis", [2])
    return b.node("ReduceSum", f"{tag}matrix", [x, axis], keepdims=0)


def _matrix_of_sixd(b: GraphBuilder, tag: str, x: str) -> str:
    """Rotation matrices [N, 9], row by row, of 6D outputs (Zhou et al., arXiv 1812.07035, eq. 15).

    Columns are x, y, z: the first made a unit vector, z perpendicular to it and to the second.
    """
    first, second = _picked(b, f"{tag}a", x, [0, 1, 2]), _picked(b, f"{tag}b", x, [3, 4, 5])
    one = _unit(b, f"{tag}x", first)
    three = _unit(b, f"{tag}z", _cross(b, f"{tag}xb", one, second))
    two = _cross(b, f"{tag}y", three, one)
    x = b.node("Concat", f"{tag}columns", [one, two, three], axis=1)
    return _picked(b, f"{tag}matrix", x, [0, 3, 6, 1, 4, 7, 2, 5, 8])


def _cross(b: GraphBuilder, name: str, left: str, right: str) -> str:
    after, before = [1, 2, 0], [2, 0, 1]
    plus, minus = (
        b.node(
            "Mul",
            f"{name}.{sign}",
            [_picked(b, f"{name}.{sign}.l", left, i), _picked(b, f"{name}.{sign}.r", right, j)],
        )
        for sign, i, j in (("plus", after, before), ("minus", before, after))
    )
    return b.node("Sub", name, [plus, minus])


def _unit(b: GraphBuilder, name: str, x: str) -> str:
    """Vectors [N, K] made of length one; one of length zero stays zero."""
    square = b.node("Mul", f"{name}.square", [x, x])
    axis = b.constant(f"{name}.axis", [1])
    length = b.node("ReduceSum", f"{name}.sum", [square, axis], keepdims=1)
    length = b.node("Sqrt", f"{name}.length", [length])
    length = b.node("Max", f"{name}.some", [length, b.constant(f"{name}.tiny", _TINY)])
    return b.node("Div", name, [x, length])


def _answer(b: GraphBuilder, output: OutputSpec, found: Sequence[str], spec: DeployedSpec) -> None:
    """The graph's outputs from the mean of what the files gave."""
    x = found[0]
    if len(found) > 1:
        x = b.node("Sum", "out/sum", list(found))
        x = b.node("Mul", "out/mean", [x, b.constant("out/share", 1 / len(found))])
    signs = np.array(output.signs, np.float64)
    if spec.bins is not None:
        decode_bins(b, spec.bins, signs, x)
        return
    if output.kind == "euler":
        from edgehp.pose import convention

        factor = signs * (180 / np.pi if convention(output.convention).radians else 1)
        b.node("Mul", OUTPUTS[0], [x, b.constant("out/factor", factor[None])])
        return
    _angles_of_matrix(b, x, signs, transposed=bool(output.transposed))


def _angles_of_matrix(
    b: GraphBuilder, x: str, signs: npt.NDArray[np.float64], *, transposed: bool
) -> None:
    """(pitch, yaw, roll) of the rotation ``S M S``, as `edgehp.pose.euler_from_matrix`.

    With R the canonical rotation: pitch = atan2(R12, R22), yaw = atan2(R02, hypot(R00, R01)), roll
    = atan2(-R01, R00). All are free of the matrix's scale.
    """

    def entries(name: str, *wanted: tuple[int, int]) -> str:
        index = [3 * j + i if transposed else 3 * i + j for i, j in wanted]
        sign = np.array([[signs[i] * signs[j] for i, j in wanted]])
        found = b.node("Gather", f"{name}.at", [x, b.constant(f"{name}.index", index)], axis=1)
        return b.node("Mul", name, [found, b.constant(f"{name}.signs", sign)])

    row = entries("out/row", (0, 0), (0, 1))
    square = b.node("Mul", "out/row_square", [row, row])
    axis = b.constant("out/row_axis", [1])
    level = b.node(
        "Sqrt", "out/level", [b.node("ReduceSum", "out/row_sum", [square, axis], keepdims=1)]
    )
    first, last = entries("out/first", (2, 2)), entries("out/last", (0, 0))
    beside = b.node("Concat", "out/beside", [first, level, last], axis=1)
    above = entries("out/above", (1, 2), (0, 2), (0, 1))
    flip = b.constant("out/flip", [[1.0, 1.0, -1.0]])
    above = b.node("Mul", "out/opposite", [above, flip])
    # atan2(y, x): the arc tangent of y / |x|, mirrored at a quarter turn where x is negative.
    size = b.node("Abs", "out/beside_size", [beside])
    size = b.node("Max", "out/beside_some", [size, b.constant("out/tiny", _TINY)])
    angle = b.node("Atan", "out/atan", [b.node("Div", "out/tangent", [above, size])])
    zero = b.constant("out/zero", 0.0)
    half = b.node(
        "Where",
        "out/half_turn",
        [
            b.node("Less", "out/below", [above, zero]),
            b.constant("out/minus_pi", -np.pi),
            b.constant("out/pi", np.pi),
        ],
    )
    behind = b.node("Sub", "out/mirrored", [half, angle])
    angle = b.node(
        "Where", "out/radians", [b.node("Less", "out/behind", [beside, zero]), behind, angle]
    )
    b.node("Mul", OUTPUTS[0], [angle, b.constant("out/degrees", 180 / np.pi)])


def _fold_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold gain, colour order and grey of our part into the first convolution, where it is next.

    The mean stays: the zero padding of the convolution stands for it.
    """
    from edgehp.quantization.graph import GraphView

    view = GraphView(model)
    users = view.consumers.get("in/centred", [])
    chain = []
    while len(users) == 1 and (own := view.nodes[users[0][0]]).name.startswith("in/"):
        chain.append(own)
        users = view.consumers.get(own.output[0], [])
    node = view.nodes[users[0][0]] if len(users) == 1 else None
    known = {"in/scaled", "in/bgr", "in/weighted", "in/grey"}
    if (
        node is None
        or not chain
        or not {n.name for n in chain} <= known
        or not view.has_weight(node)
        or node.op_type != "Conv"
        or view.attribute(node, "group", 1) != 1
        or len(view.consumers[node.input[1]]) > 1
    ):
        return model
    from onnx import numpy_helper

    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight = view.array(node.input[1]).astype(np.float64)
    for step in reversed(chain):
        if step.name == "in/grey":
            weight = np.repeat(weight, 3, axis=1)
        elif step.name == "in/bgr":
            weight = weight[:, ::-1]
        else:
            factor = next(view.array(i) for i in step.input if view.is_constant(i))
            weight = weight * factor.reshape(1, 3, 1, 1)
    made = numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), node.input[1])
    tensor.CopyFrom(made)
    node.input[0] = "in/centred"
    return _without(model, {n.name for n in chain})


def _linear_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Bring products with constant weights into the form that the quantization knows.

    That is Gemm with a weight [Cout, Cin] and a bias; a MatMul of matrices [N, Cin] and the Add
    behind it become one. Convolutions without a bias get one of zeros, which costs nothing and
    lets joint rounding correct their mean.
    """
    import onnx
    from onnx import helper, numpy_helper

    from edgehp.quantization.graph import GraphView

    view = GraphView(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in inferred.graph.value_info}
    gone: set[str] = set()

    def constant(name: str, values: npt.NDArray[np.floating]) -> str:
        array = np.ascontiguousarray(values, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    for node in model.graph.node:
        if len(node.input) < 2 or not view.is_constant(node.input[1]):
            continue
        if node.op_type == "Conv" and len(node.input) == 2:
            width = view.array(node.input[1]).shape[0]
            node.input.append(constant(f"{node.name}.bias", np.zeros(width)))
        if node.op_type == "MatMul" and ranks.get(node.input[0]) == 2:
            weight = view.array(node.input[1])
            if weight.ndim != 2:
                continue
            bias, users = np.zeros(weight.shape[1]), view.consumers.get(node.output[0], [])
            add = view.nodes[users[0][0]] if len(users) == 1 else None
            if add is not None and add.op_type == "Add":
                other = add.input[1 - users[0][1]]
                if view.is_constant(other) and view.array(other).size == weight.shape[1]:
                    bias = view.array(other).reshape(-1)
                    gone.add(add.name)
                    node.output[0] = add.output[0]
            name = node.name
            node.op_type = "Gemm"
            node.input[1] = constant(f"{name}.weight", weight.T)
            node.input.append(constant(f"{name}.bias", bias))
            node.attribute.append(helper.make_attribute("transB", 1))
        elif node.op_type == "Gemm" and not view.attribute(node, "transA", 0):
            factors = {a.name: a.f for a in node.attribute if a.name in ("alpha", "beta")}
            weight = view.array(node.input[1]) * factors.get("alpha", 1.0)
            weight = weight if view.attribute(node, "transB", 0) else weight.T
            bias = np.zeros(len(weight))
            if len(node.input) > 2:
                if not view.is_constant(node.input[2]):
                    continue
                bias = bias + view.array(node.input[2]).reshape(-1) * factors.get("beta", 1.0)
            replace_all(node.attribute, [helper.make_attribute("transB", 1)])
            node.input[1:] = [
                constant(f"{node.name}.weight", weight),
                constant(f"{node.name}.bias", bias),
            ]
    return _without(model, gone)


def _without(model: onnx.ModelProto, gone: set[str]) -> onnx.ModelProto:
    """The model without these nodes and what only they read, and with no word on shapes."""
    from edgehp.quantization.graph import drop_unread

    replace_all(model.graph.node, [n for n in model.graph.node if n.name not in gone])
    del model.graph.value_info[:]
    drop_unread(model)
    return model


def _try(model: onnx.ModelProto, description: Description, spec: DeployedSpec) -> None:
    """Run the graph on random crops, alone and together: what the shapes do not say, they do.

    Raises:
        CheckpointError: it does not run, mixes the crops of a batch, or gives no three angles.
    """
    size = spec.preprocessing.size
    crops = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    outputs = outputs_of(spec)
    where = ", ".join(p.name for p in description.paths)
    try:
        together = run_graph(model, crops, outputs)
        alone = [run_graph(model, c[None], outputs) for c in crops]
    except RuntimeError as e:
        line = " ".join(str(e).split())[:300]
        raise CheckpointError(
            f"{where}: onnxruntime cannot run the network: {line}\n"
            "hint: export it with a dynamic batch, and describe its input as it is"
        ) from e
    for name, answer, parts in zip(outputs, together, zip(*alone, strict=True), strict=True):
        if answer.shape != (3, 3) or not np.isfinite(answer).all():
            raise CheckpointError(
                f"{where}: {name} of three crops is {list(answer.shape)}, expected finite numbers "
                "of shape [3, 3]: the output is not as described"
            )
        apart = float(np.abs(answer - np.concatenate(parts)).max())
        if apart > 1.0:
            raise CheckpointError(
                f"{where}: a crop's answer depends on the others of its batch (by {apart:.2g} "
                "degrees)\nhint: export the network with a dynamic batch, in evaluation mode"
            )
