"""Q/DQ graphs of both flavors: placement, numbers, parity with FP32, and layers taken out again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgehp.engines import open_engine
from edgehp.errors import DataError, UsageError
from edgehp.networks.bundled import resolve_network
from edgehp.networks.graph import graph_bytes
from edgehp.quantization.compare import Comparison
from edgehp.quantization.graph import GraphView
from edgehp.quantization.lint import lint
from edgehp.quantization.placement import quantizable_layers
from edgehp.quantization.qdq import (
    Emitter,
    quantize_weight,
    quantized_layers,
    remove_qdq,
    scale_of,
    weight_scales,
    without_qdq,
)
from edgehp.quantization.quantize import QuantizationConfig, quantize
from edgehp.quantization.runner import Runner
from edgehp.quantization.table import CalibrationTable, calibrate
from tests.helpers import random_crops
from tests.quantization_graphs import (
    SIZE,
    constant_of,
    node_of,
    parse_rtx,
    rtx_plan,
    small_network,
)

CROPS = random_crops(12, SIZE)
VARIANTS = [("cpu", "fp32"), ("tensorrt", "fp32"), ("tensorrt", "fp16")]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, CROPS, threads=1)


def quantized_inputs(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Node -> inputs that come from a DQ whose own input is an activation."""
    made = {n.output[0]: n for n in model.graph.node}
    found: dict[str, list[int]] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            dq = made.get(name)
            if dq is not None and dq.op_type == "DequantizeLinear" and dq.input[0] in made:
                found.setdefault(node.name, []).append(i)
    return found


def test_placement_of_both_flavors(network: onnx.ModelProto, table: CalibrationTable) -> None:
    convolutions = ["conv1", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "b.downsample"]
    model = Emitter(network, "tensorrt")(table, "minmax")
    assert quantized_inputs(model) == {
        **{c: [0] for c in convolutions},
        "maxpool": [0],
        "a.add": [1],  # the identity
        "b.add": [1],  # the downsampling side
        "avgpool": [0],
    }
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(constant_of(model, node.input[2]))
            assert zero.dtype == np.int8
            assert not zero.any()
    # One pair per tensor, however many read it.
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.node) == 8
    found = quantized_inputs(model)
    model = Emitter(network, "cpu")(table, "minmax")
    assert quantized_inputs(model) == {**found, "heads": [0]}
    zeros = [n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {numpy_helper.to_array(constant_of(model, z)).dtype for z in zeros} == {
        np.dtype(np.uint8)
    }


@pytest.mark.parametrize(("flavor", "body"), VARIANTS)
def test_a_graph_is_valid_clean_and_near_fp32(
    network: onnx.ModelProto, table: CalibrationTable, flavor: str, body: str
) -> None:
    emitter = Emitter(network, flavor, body)
    model = emitter(table, "mse")
    onnx.checker.check_model(model, full_check=True)
    assert lint(model, flavor, emitter.placement) == ()
    weights = [t for t in model.graph.initializer if t.name.endswith(".weight.int8")]
    assert len(weights) == 6 + (flavor == "cpu")
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8}
    found = Comparison(network, CROPS, threads=1)(model)
    assert 0 < found.angles < 2
    types = Counter(t.data_type for t in model.graph.initializer if t.name.endswith(".scale"))
    expected = onnx.TensorProto.FLOAT16 if body == "fp16" else onnx.TensorProto.FLOAT
    assert set(types) == {expected}
    assert Emitter(network, flavor, body)(table, "mse") == model


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_openvino_computes_what_the_graph_says(
    network: onnx.ModelProto, table: CalibrationTable, tmp_path: Path, method: str
) -> None:
    """Candidates are compared by the graph: an engine that computed otherwise would want others."""
    pytest.importorskip("openvino")
    model = Emitter(network, "cpu")(table, method)
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph_bytes(model))
    with open_engine("openvino", path, batch=len(CROPS), threads=1) as engine:
        found = engine.infer(CROPS).angles
    written, exact = (Runner(m, ["angles"], threads=1)(CROPS)[0] for m in (model, network))
    apart = np.abs(found - written).mean()
    assert apart < 0.05 * np.abs(written - exact).mean()


def test_weights_on_the_picture_cannot_overflow_16_bits(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    """u8 x s8 products are summed in pairs on processors without VNNI."""
    model = Emitter(network, "cpu")(table, "minmax")
    pairs = (
        2 * 255 * np.abs(numpy_helper.to_array(constant_of(model, "conv1.weight.int8")).astype(int))
    )
    assert pairs.max() < 2**15
    assert np.abs(numpy_helper.to_array(constant_of(model, "a.conv1.weight.int8"))).max() == 127
    other = Emitter(network, "tensorrt")(table, "minmax")
    assert np.abs(numpy_helper.to_array(constant_of(other, "conv1.weight.int8"))).max() == 127


def test_scales_and_weights() -> None:
    assert scale_of((-1.27, 0.5), "int8") == (pytest.approx(0.01), 0)
    assert scale_of((0.0, 5.1), "uint8") == (pytest.approx(0.02), 0)
    assert scale_of((-1.0, 4.1), "uint8") == (pytest.approx(0.02), 50)
    # Crops of 0 to 255 as they are: a pair that changes nothing would be dropped by OpenVINO.
    scale, zero = scale_of((0.0, 255.0), "uint8")
    assert (np.float32(scale), zero) == (np.nextafter(np.float32(1), np.float32(2)), 0)
    tiny, _ = scale_of((0.0, 1e-12), "int8", half=True)
    assert tiny > 0
    assert np.float16(tiny) == tiny
    w = np.zeros((2, 3), np.float32)
    w[1] = 1e-20
    assert (weight_scales(w, half=True) > 0).all()
    w = np.array([[0.5, -1.27], [0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(quantize_weight(w, weight_scales(w)), [[50, -127], [0, 0]])
    with pytest.raises(DataError, match="not finite"):
        weight_scales(np.array([[1.0, np.nan]], np.float32))


@pytest.mark.parametrize(("flavor", "body"), VARIANTS)
def test_layers_taken_out_are_those_that_were_never_put_in(
    network: onnx.ModelProto, table: CalibrationTable, flavor: str, body: str
) -> None:
    model = Emitter(network, flavor, body)(table, "mse")
    layers = quantized_layers(model)
    assert set(layers) == set(quantizable_layers(GraphView(network), flavor))
    nothing = Emitter(network, flavor, body, layers)(table, "mse")
    assert not any("Quantize" in n.op_type for n in nothing.graph.node)
    for kept in (("a.conv1", "b.add"), ("maxpool",)):
        removed = remove_qdq(model, kept, network)
        onnx.checker.check_model(removed, full_check=True)
        other = Emitter(network, flavor, body, kept)(table, "mse")
        assert quantized_inputs(removed) == quantized_inputs(other)
        assert not set(kept) & set(quantized_inputs(other))
        answers = [Runner(m, threads=1)(CROPS)[0] for m in (removed, other)]
        np.testing.assert_allclose(*answers, atol=1e-3)
    nothing = remove_qdq(model, layers, network)
    assert not any("Quantize" in n.op_type for n in nothing.graph.node)
    limit = 0.5 if body == "fp16" else 1e-3
    assert Comparison(network, CROPS, threads=1)(nothing).worst < limit
    with pytest.raises(UsageError, match="not a quantized layer"):
        remove_qdq(model, ("a.relu1",), network)


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_ranges_are_those_of_the_qdq_that_is_taken_out(
    network: onnx.ModelProto, table: CalibrationTable, body: str
) -> None:
    """For engines that quantize by ranges: the same weights and scales, nothing but FP32."""
    model = Emitter(network, "tensorrt", body)(table, "mse")
    plain, ranges = without_qdq(model)
    onnx.checker.check_model(plain, full_check=True)
    assert not any("Quantize" in n.op_type for n in plain.graph.node)
    kinds = {t.data_type for t in plain.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds
    assert sum(map(len, quantized_inputs(model).values())) >= len(ranges) > 4
    made = {n.output[0]: n for n in model.graph.node}
    for q in (n for n in model.graph.node if n.op_type == "QuantizeLinear"):
        assert ranges[q.input[0]] == pytest.approx(127 * float(GraphView(model).array(q.input[1])))
        assert q.output[0] in {i for n in made.values() for i in n.input}
    layer = node_of(plain, "a.conv1")
    dq = made[node_of(model, "a.conv1").input[1]]
    values, scales = (GraphView(model).array(n).astype(np.float32) for n in dq.input[:2])
    np.testing.assert_allclose(
        GraphView(plain).array(layer.input[1]), values * scales[:, None, None, None], rtol=1e-6
    )
    assert Comparison(network, CROPS, threads=1)(plain).worst < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tflite",), "unknown Q/DQ flavor"),
        (("cpu", "fp16"), "FP32 body"),
        (("tensorrt", "int4"), "body 'int4'"),
        (("cpu", "fp32", ("a.relu1",)), r"a\.relu1: no quantizable layer"),
        (("tensorrt", "fp32", ("heads",)), "heads: no quantizable layer"),
    ],
)
def test_mistakes_are_refused(
    network: onnx.ModelProto, arguments: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Emitter(network, *arguments)


def test_graphs_of_another_kind_are_refused(network: onnx.ModelProto) -> None:
    unnamed = onnx.ModelProto()
    unnamed.CopyFrom(network)
    unnamed.graph.node[4].name = ""
    with pytest.raises(DataError, match="no name of its own"):
        Emitter(unnamed, "cpu")
    stranger = onnx.ModelProto()
    stranger.CopyFrom(network)
    del stranger.graph.input[0].type.tensor_type.shape.dim[3]
    with pytest.raises(DataError, match="expected one uint8"):
        Runner(stranger)


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_tensorrt_rtx_parses_and_builds(
    network: onnx.ModelProto, table: CalibrationTable, body: str
) -> None:
    assert rtx_plan(Emitter(network, "tensorrt", body)(table, "mse")) > 1000


def kinds_parsed(model: onnx.ModelProto) -> Counter[str]:
    _, parsed = parse_rtx(model)
    return Counter(parsed.get_layer(i).type.name for i in range(parsed.num_layers))


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_the_default_recipe_has_the_layers_of_the_plain_one(
    network: onnx.ModelProto, table: CalibrationTable, body: str
) -> None:
    """As parsed: searching ranges and rounding jointly changes numbers, and adds no layer."""
    plain = kinds_parsed(Emitter(network, "tensorrt", body)(table, "minmax"))
    config = QuantizationConfig("tensorrt", body=body, threads=1)
    default = quantize(network, list(CROPS), config)
    assert kinds_parsed(default.model) == plain
    # To the float graph Q/DQ is added and nothing else, but for the ends of a half-precision body.
    before = kinds_parsed(network)
    added = plain - before
    halves = {"CAST": 2} if body == "fp16" else {}
    assert added["DEQUANTIZE"] - added["QUANTIZE"] == before["CONVOLUTION"]  # their weights
    assert {k: n for k, n in added.items() if k not in ("CONSTANT", "QUANTIZE", "DEQUANTIZE")} == (
        halves
    )


@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_tensorrt_has_nothing_but_int8_between_int8_convolutions(body: str) -> None:
    """As parsed: what lies between two convolutions that read integers could not be fused."""
    network = resolve_network("kd-resnet18-112").graph()
    table = calibrate(network, random_crops(4, 112), methods=("minmax",), threads=1)
    trt, parsed = parse_rtx(Emitter(network, "tensorrt", body)(table, "minmax"))
    layers = [parsed.get_layer(i) for i in range(parsed.num_layers)]
    kinds = trt.LayerType
    conv = {i for i, layer in enumerate(layers) if layer.type == kinds.CONVOLUTION}
    assert len(conv) == 20
    makers = {layer.get_output(0).name: i for i, layer in enumerate(layers)}
    inputs = [
        [makers[t.name] for k in range(layer.num_inputs) if (t := layer.get_input(k)) is not None
         and t.name in makers]
        for layer in layers
    ]  # fmt: skip
    behind, before = set(conv), set(conv)
    for i, read in enumerate(inputs):
        if behind.intersection(read):
            behind.add(i)
    for i in reversed(range(len(layers))):
        if i in before:
            before.update(inputs[i])
    others = [
        layers[i]
        for i in sorted((behind & before) - conv)
        if layers[i].type not in (kinds.QUANTIZE, kinds.DEQUANTIZE, kinds.ACTIVATION)
    ]
    adds = [layer for layer in others if layer.type == kinds.ELEMENTWISE]
    assert len(adds) == 7  # the eighth residual Add has no convolution behind it
    pools = [layer for layer in others if layer.type == kinds.POOLING]
    assert len(pools) == 1
    # The pool reads integers: its input is a DEQUANTIZE.
    assert layers[makers[pools[0].get_input(0).name]].type == kinds.DEQUANTIZE
    assert set(map(id, others)) == set(map(id, adds + pools)), [layer.name for layer in others]
