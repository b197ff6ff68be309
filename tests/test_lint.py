"""Every rule of the lint against a graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgehp.errors import UsageError
from edgehp.quantization.lint import RULES, lint
from edgehp.quantization.qdq import Emitter
from edgehp.quantization.recipe import FLAVORS
from edgehp.quantization.table import CalibrationTable, calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, node_of, set_constant, small_network

Break = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, random_crops(4, SIZE), threads=1)


def add_pair(model: onnx.ModelProto, tensor: str, consumer: str, *, weight: bool = False) -> None:
    """A Q/DQ pair on one edge, with an int8 zero point."""
    at = next(i for i, n in enumerate(model.graph.node) if n.name == consumer)
    names = [f"{tensor}.x.scale", f"{tensor}.x.zero"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), names[0]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), names[1]))
    q, dq = f"{tensor}.x.q", f"{tensor}.x.dq"
    node = model.graph.node[at]
    node.input[list(node.input).index(tensor)] = dq
    for i, (kind, x, y) in enumerate((("Quantize", tensor, q), ("Dequantize", q, dq))):
        new = helper.make_node(f"{kind}Linear", [x, *names], [y], name=y)
        model.graph.node.insert(at + i, new)


def bypass(model: onnx.ModelProto, consumer: str, index: int) -> None:
    """Let a consumer read the tensor before its Q/DQ pair."""
    node = node_of(model, consumer)
    dq = node_of(model, node.input[index])
    node.input[index] = node_of(model, dq.input[0]).input[0]


def bad_zero_point(m: onnx.ModelProto) -> None:
    set_constant(m, "relu.zero_point", np.array(3, np.int8))


def uint8(m: onnx.ModelProto) -> None:
    set_constant(m, "relu.zero_point", np.array(0, np.uint8))


def bad_scale(value: float) -> Break:
    return lambda m: set_constant(m, "relu.scale", np.array(value, np.float32))


def computed_scale(m: onnx.ModelProto) -> None:
    m.graph.node.insert(0, helper.make_node("Abs", ["relu.scale"], ["s"], name="s"))
    for name in ("relu.q", "relu.dq"):
        node_of(m, name).input[1] = "s"


def per_channel_activation(m: onnx.ModelProto) -> None:
    set_constant(m, "relu.scale", np.full(16, 0.1, np.float32))
    set_constant(m, "relu.zero_point", np.zeros(16, np.int8))


def asymmetric_weight(m: onnx.ModelProto) -> None:
    set_constant(m, "a.conv1.weight.zero_point", np.ones(16, np.int8))


def per_tensor_weight(m: onnx.ModelProto) -> None:
    set_constant(m, "a.conv1.weight.scale", np.array(0.1, np.float32))
    set_constant(m, "a.conv1.weight.zero_point", np.array(0, np.int8))


def weight_axis(m: onnx.ModelProto) -> None:
    node_of(m, "a.conv1.weight.dq").attribute[0].i = 1


def integer_bias(m: onnx.ModelProto) -> None:
    name = "a.conv1.bias"
    set_constant(m, name, np.zeros(16, np.int32))
    m.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float32), "b.scale"))
    m.graph.node.insert(
        0, helper.make_node("DequantizeLinear", [name, "b.scale"], ["b.dq"], name="b.dq")
    )
    node_of(m, "a.conv1").input[2] = "b.dq"


def float_weight(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(
        numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "float.weight")
    )
    node_of(m, "a.conv1").input[1] = "float.weight"


def wrong_side(m: onnx.ModelProto) -> None:
    bypass(m, "b.add", 1)
    add_pair(m, "b.conv2", "b.add")


BREAKS: list[tuple[str, str, Break, str]] = [
    ("zero-point", "tensorrt", bad_zero_point, "relu.q"),
    ("zero-point", "tensorrt", uint8, "relu.dq"),
    ("zero-point", "cpu", asymmetric_weight, "a.conv1.weight.dq"),
    ("scale", "tensorrt", bad_scale(0.0), "relu.q"),
    ("scale", "cpu", bad_scale(-1.0), "relu.q"),
    ("scale", "tensorrt", bad_scale(float("nan")), "relu.q"),
    ("scale", "tensorrt", bad_scale(float("inf")), "relu.q"),
    ("scale", "cpu", computed_scale, "relu.q"),
    ("scale", "tensorrt", per_channel_activation, "relu.q"),
    ("weight-axis", "cpu", per_tensor_weight, "a.conv1"),
    ("weight-axis", "cpu", weight_axis, "a.conv1"),
    ("integer-bias", "tensorrt", integer_bias, "a.conv1"),
    ("needless-pair", "tensorrt", lambda m: add_pair(m, "a.conv2", "a.add"), "a.add"),
    ("needless-pair", "tensorrt", wrong_side, "b.add"),
    ("not-int8", "tensorrt", wrong_side, "b.add"),
    ("not-int8", "tensorrt", lambda m: bypass(m, "b.add", 1), "b.add"),
    ("not-int8", "cpu", lambda m: bypass(m, "b.add", 1), "b.add"),
    ("needless-pair", "cpu", lambda m: add_pair(m, "a.conv1", "a.relu1"), "a.relu1"),
    ("not-int8", "tensorrt", lambda m: bypass(m, "a.conv2", 0), "a.conv2"),
    ("not-int8", "tensorrt", lambda m: bypass(m, "conv1", 0), "conv1"),
    ("not-int8", "tensorrt", float_weight, "a.conv1"),
    ("not-int8", "tensorrt", lambda m: bypass(m, "maxpool", 0), "maxpool"),
]


@pytest.mark.parametrize(("rule", "flavor", "break_it", "node"), BREAKS)
def test_a_broken_graph_is_found(
    network: onnx.ModelProto,
    table: CalibrationTable,
    rule: str,
    flavor: str,
    break_it: Break,
    node: str,
) -> None:
    emitter = Emitter(network, flavor)
    graph = emitter(table, "minmax")
    assert lint(graph, flavor, emitter.placement) == ()
    break_it(graph)
    found = [f for f in lint(graph, flavor, emitter.placement) if f.rule == rule]
    assert node in [f.node for f in found]
    assert all(f.message and f.hint in str(f).splitlines()[-1] for f in found)


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert set(RULES) == {rule for rule, *_ in BREAKS}


def test_a_float_layer_is_found_unless_it_was_asked_for(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    kept = ("a.conv1", "b.add", "maxpool")
    for flavor in FLAVORS:
        emitter = Emitter(network, flavor, float_layers=kept)
        graph = emitter(table, "minmax")
        assert lint(graph, flavor, emitter.placement) == ()
        everything = Emitter(network, flavor).placement
        assert set(kept) <= {f.node for f in lint(graph, flavor, everything)}


def test_an_unknown_flavor_is_refused(network: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="known: tensorrt, cpu"):
        lint(network, "tflite", Emitter(network, "cpu").placement)
