"""Every rule of the lint against a graph that breaks it, and both emitters against all of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgehp.errors import UsageError
from edgehp.quantization.calibrate import calibrate
from edgehp.quantization.lint import RULES, lint
from edgehp.quantization.placement import FLAVOURS
from edgehp.quantization.qdq import Recipe
from edgehp.quantization.quantise import emit
from edgehp.quantization.table import CalibrationTable
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, constant_of, node_of, set_constant, small_network

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


def stored_float(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(
        numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "float.weight")
    )
    parameters = ["a.conv1.weight.scale", "a.conv1.weight.zero_point"]
    node = helper.make_node("QuantizeLinear", ["float.weight", *parameters], ["fq"], name="fq",
                            axis=0)  # fmt: skip
    m.graph.node.insert(0, node)
    node_of(m, "a.conv1.weight.dq").input[0] = "fq"


def half_scales(m: onnx.ModelProto) -> None:
    set_constant(m, "relu.scale", np.array(0.1, np.float16))


def half_weight_scale(m: onnx.ModelProto) -> None:
    set_constant(m, "a.conv1.weight.scale", np.full(16, 0.1, np.float16))


def narrow(m: onnx.ModelProto) -> None:
    set_constant(m, "a.conv1.weight.int8", np.ones((8, 16, 3, 3), np.int8))


def external(m: onnx.ModelProto) -> None:
    t = constant_of(m, "a.conv1.bias")
    t.ClearField("raw_data")
    t.data_location = onnx.TensorProto.EXTERNAL


def free_height(m: onnx.ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


def wrong_side(m: onnx.ModelProto) -> None:
    bypass(m, "b.add", 1)
    add_pair(m, "b.conv2", "b.add")


def unpaired(m: onnx.ModelProto) -> None:
    at = [n.name for n in m.graph.node].index("avgpool")
    m.graph.node.insert(at + 1, helper.make_node("QuantizeLinear", ["avgpool", "relu.scale"],
                                                 ["loose"], name="loose"))  # fmt: skip


BREAKS: list[tuple[str, str, Break, str]] = [
    ("activation-zero-point", "tensorrt", bad_zero_point, "relu.q"),
    ("activation-uint8", "tensorrt", uint8, "relu.dq"),
    ("bad-scale", "tensorrt", bad_scale(0.0), "relu.q"),
    ("bad-scale", "cpu", bad_scale(-1.0), "relu.q"),
    ("bad-scale", "tensorrt", bad_scale(float("nan")), "relu.q"),
    ("bad-scale", "tensorrt", bad_scale(float("inf")), "relu.q"),
    ("scale-not-constant", "cpu", computed_scale, "relu.q"),
    ("activation-per-channel", "tensorrt", per_channel_activation, "relu.q"),
    ("weight-zero-point", "tensorrt", asymmetric_weight, "a.conv1.weight.dq"),
    ("weight-per-tensor", "cpu", per_tensor_weight, "a.conv1.weight.dq"),
    ("weight-per-tensor", "cpu", weight_axis, "a.conv1.weight.dq"),
    ("bias-quantised", "tensorrt", integer_bias, "a.conv1"),
    ("between-conv-and-relu", "cpu", lambda m: add_pair(m, "a.conv1", "a.relu1"), "a.conv1.x.dq"),
    ("conv-input-float", "tensorrt", lambda m: bypass(m, "a.conv2", 0), "a.conv2"),
    ("weight-float", "tensorrt", float_weight, "a.conv1"),
    ("gemm-float", "cpu", lambda m: bypass(m, "heads", 0), "heads"),
    ("pool-float", "tensorrt", lambda m: bypass(m, "maxpool", 0), "maxpool"),
    ("add-both-quantised", "tensorrt", lambda m: add_pair(m, "a.conv2", "a.add"), "a.add"),
    ("add-wrong-side", "tensorrt", wrong_side, "b.add"),
    ("add-skip-float", "tensorrt", lambda m: bypass(m, "b.add", 1), "b.add"),
    ("add-float", "cpu", lambda m: bypass(m, "b.add", 1), "b.add"),
    ("half-scale-opset", "tensorrt", half_scales, "relu.q"),
    ("mixed-types", "tensorrt", half_weight_scale, "a.conv1"),
    ("narrow-convolution", "tensorrt", narrow, "a.conv1"),
    ("weight-stored-float", "tensorrt", stored_float, "fq"),
    ("external-data", "tensorrt", external, "a.conv1.bias"),
    ("dynamic-size", "cpu", free_height, "crops"),
    ("decode-quantised", "tensorrt", lambda m: add_pair(m, "logits", "probabilities"),
     "probabilities"),
    ("unpaired", "cpu", unpaired, "loose"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "flavour", "break_it", "node"), BREAKS)
def test_a_broken_graph_is_found(
    network: onnx.ModelProto,
    table: CalibrationTable,
    rule: str,
    flavour: str,
    break_it: Break,
    node: str,
) -> None:
    graph = emit(network, table, Recipe(), flavour=flavour)
    assert lint(graph, flavour) == ()
    break_it(graph)
    found = [f for f in lint(graph, flavour) if f.rule == rule]
    assert node in [f.node for f in found]
    assert all(f.message.startswith(f"{f.node}: ") and f.remedy for f in found)


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {r.id for r in RULES} == {rule for rule, *_ in BREAKS}
    assert len({r.id for r in RULES}) == len(RULES)
    assert all(r.what and r.remedy and r.flavours for r in RULES)


@pytest.mark.parametrize(
    ("flavour", "options"),
    [
        ("cpu", {}),
        ("cpu", {"quantise_sum": False}),
        ("tensorrt", {}),
        ("tensorrt", {"head": True}),
        ("tensorrt", {"body": "fp16"}),
        ("tensorrt", {"body": "fp16", "head": True}),
    ],
)
def test_what_is_emitted_is_clean(
    network: onnx.ModelProto, table: CalibrationTable, flavour: str, options: dict[str, object]
) -> None:
    graph = emit(network, table, Recipe("mse"), flavour=flavour, **options)  # type: ignore[arg-type]
    assert lint(graph, flavour, head=True if options.get("head") else None) == ()


def test_a_float_layer_is_found_unless_it_was_asked_for(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    kept = ("a.conv1", "b.add", "maxpool")
    for flavour in FLAVOURS:
        graph = emit(network, table, Recipe(keep_float=frozenset(kept)), flavour=flavour)
        assert lint(graph, flavour, keep_float=kept) == ()
        assert set(kept) <= {f.node for f in lint(graph, flavour)}


def test_an_unknown_flavour_is_refused(network: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="known: tensorrt, cpu"):
        lint(network, "tflite")
