"""Both flavours through the real engines: placement, integers that are really used, parity."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgehp.errors import CompatibilityError, DataError, UsageError
from edgehp.quantization.calibrate import calibrate
from edgehp.quantization.equalise import channel_groups, equalise
from edgehp.quantization.graphview import GraphView
from edgehp.quantization.placement import place, quantisable_layers
from edgehp.quantization.qdq import Recipe, quantise_weight, scale_of, weight_scales
from edgehp.quantization.quantise import emit, quantise
from edgehp.quantization.runner import Runner
from edgehp.quantization.select import Judge, split_crops
from edgehp.quantization.table import CalibrationTable
from tests.helpers import random_crops
from tests.quantization_graphs import SIZE, constant_of, node_of, rtx_plan, small_network

CROPS = random_crops(12, SIZE)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("cpu", {}),
    ("cpu", {"quantise_sum": False}),
    ("tensorrt", {}),
    ("tensorrt", {"head": True}),
    ("tensorrt", {"body": "fp16"}),
]


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return small_network()


@pytest.fixture(scope="module")
def table(network: onnx.ModelProto) -> CalibrationTable:
    return calibrate(network, CROPS, threads=1)


def quantised_inputs(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Node -> inputs that come from a DQ whose own input is an activation."""
    made = {n.output[0]: n for n in model.graph.node}
    found: dict[str, list[int]] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            dq = made.get(name)
            if dq is not None and dq.op_type == "DequantizeLinear" and dq.input[0] in made:
                found.setdefault(node.name, []).append(i)
    return found


def test_tensorrt_placement_is_the_published_one(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    model = emit(network, table, Recipe(), flavour="tensorrt")
    convolutions = ["conv1", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "b.downsample"]
    assert quantised_inputs(model) == {
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
    assert GraphView(model).opset == 17


def test_cpu_placement_takes_integers_everywhere(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    found = quantised_inputs(emit(network, table, Recipe(), flavour="cpu"))
    assert found["a.add"] == found["b.add"] == [0, 1]
    assert found["heads"] == [0]
    assert "probabilities" not in found
    without = quantised_inputs(emit(network, table, Recipe(), flavour="cpu", quantise_sum=False))
    assert without["a.add"] == without["b.add"] == [1]


@pytest.mark.parametrize(("flavour", "options"), VARIANTS)
def test_the_engines_agree_and_stay_near_fp32(
    network: onnx.ModelProto, table: CalibrationTable, flavour: str, options: dict[str, Any]
) -> None:
    model = emit(network, table, Recipe("mse"), flavour=flavour, **options)
    onnx.checker.check_model(model, full_check=True)
    angles, spread = Runner(network, engine="onnxruntime", threads=1)(CROPS)
    ort = Runner(model, engine="onnxruntime", threads=1)(CROPS)
    ov = Runner(model, engine="openvino", threads=1)(CROPS)
    # Untrained and narrow: degrees of difference out of tens; a wrong scale gives tens.
    assert np.abs(ort[0] - angles).mean() < 1.5
    assert np.abs(ov[0] - angles).mean() < 1.5
    assert np.abs(ort[1] - spread).mean() < 1.5
    assert np.abs(ort[0] - ov[0]).mean() < 0.5
    assert angles.std() > 5


def test_openvino_computes_the_cpu_flavour_in_integers(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    import openvino

    core = openvino.Core()
    for sums in (True, False):
        model = emit(network, table, Recipe(), flavour="cpu", quantise_sum=sums)
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        kinds: Counter[str] = Counter()
        for op in compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            if info["layerType"].astype(str) in ("Convolution", "FullyConnected"):
                kinds[info["runtimePrecision"].astype(str)] += 1
        assert set(kinds) <= {"u8", "i8"}, kinds
        assert sum(kinds.values()) == 7


def test_onnxruntime_fuses_the_cpu_flavour_into_integer_kernels(
    network: onnx.ModelProto, table: CalibrationTable, tmp_path: Any
) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    model = emit(network, table, Recipe(), flavour="cpu")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConv"] == 6
    assert kinds["QLinearAdd"] == 2
    assert kinds["Conv"] == 0


def test_fp16_body_keeps_fp32_at_both_ends(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    model = emit(network, table, Recipe(), flavour="tensorrt", body="fp16")
    assert GraphView(model).opset >= 19
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert kinds[node.input[1]] == onnx.TensorProto.FLOAT16
    assert kinds[node_of(model, "a.conv1").input[2]] == onnx.TensorProto.FLOAT16
    assert kinds["bins"] == kinds["mean"] == onnx.TensorProto.FLOAT
    # Weights are rounded on the scales as FP16 holds them.
    weight = numpy_helper.to_array(constant_of(network, "a.conv1.weight"))
    scales = weight_scales(weight, half=True)
    stored = numpy_helper.to_array(constant_of(model, "a.conv1.weight.int8"))
    np.testing.assert_array_equal(stored, quantise_weight(weight, scales))


def test_weights_are_symmetric_per_channel_and_small_in_the_file(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    for flavour in ("cpu", "tensorrt"):
        model = emit(network, table, Recipe(), flavour=flavour)
        q = numpy_helper.to_array(constant_of(model, "b.conv1.weight.int8"))
        s = numpy_helper.to_array(constant_of(model, "b.conv1.weight.scale"))
        w = numpy_helper.to_array(constant_of(network, "b.conv1.weight"))
        assert q.dtype == np.int8
        assert (np.abs(q.reshape(32, -1)).max(1) == 127).all()
        error = np.abs(q * s.reshape(-1, 1, 1, 1) - w)
        assert (error <= 0.5001 * s.reshape(-1, 1, 1, 1)).all()
        assert "b.conv1.weight" not in {t.name for t in model.graph.initializer}


def test_scales() -> None:
    assert scale_of((-2.0, 1.0), "int8") == (pytest.approx(2 / 127), 0)
    assert scale_of((0.0, 5.1), "uint8") == (pytest.approx(0.02), 0)
    assert scale_of((-1.0, 4.1), "uint8") == (pytest.approx(0.02), 50)
    tiny, _ = scale_of((0.0, 1e-12), "int8", half=True)
    assert tiny > 0
    assert np.float16(tiny) == tiny
    w = np.zeros((2, 3), np.float32)
    w[1] = 1e-20
    assert (weight_scales(w, half=True) > 0).all()


def test_keep_float(network: onnx.ModelProto, table: CalibrationTable) -> None:
    kept = frozenset({"a.conv1", "b.add"})
    model = emit(network, table, Recipe(keep_float=kept), flavour="tensorrt")
    assert not kept & set(quantised_inputs(model))
    assert node_of(model, "a.conv1").input[1] == "a.conv1.weight"
    with pytest.raises(UsageError, match=r"a\.relu1: no quantisable layer"):
        emit(network, table, Recipe(keep_float=frozenset({"a.relu1"})), flavour="cpu")
    with pytest.raises(UsageError, match="heads"):
        place(GraphView(network), "tensorrt", ["heads"])
    everything = frozenset(quantisable_layers(GraphView(network), "cpu"))
    model = emit(network, table, Recipe(keep_float=everything), flavour="cpu")
    assert not any("Quantize" in n.op_type for n in model.graph.node)


def test_bias_correction_removes_a_mean_error(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    # Weights rounded down on purpose: the outputs' mean shifts, and the correction sees it.
    w = numpy_helper.to_array(constant_of(network, "heads.weight"))
    scales = weight_scales(w)
    down = np.clip(np.floor(w / scales[:, None]), -127, 127).astype(np.int8)
    errors = []
    for correct in (False, True):
        keep = frozenset(quantisable_layers(GraphView(network), "cpu")) - {"heads"}
        recipe = Recipe("minmax", {}, keep, correct, {"heads": down})
        model = emit(network, table, recipe, flavour="cpu")
        model.graph.output.append(
            onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
        )
        reference = onnx.ModelProto()
        reference.CopyFrom(network)
        reference.graph.output.append(model.graph.output[-1])
        run = {"engine": "onnxruntime", "threads": 1}
        a, b = (Runner(m, ["logits"], **run)(CROPS)[0] for m in (model, reference))  # type: ignore[arg-type]
        errors.append(np.abs((a - b).mean(0)).mean())
    assert errors[1] < 0.25 * errors[0]


def test_equalisation_keeps_the_function_and_evens_out_the_channels(
    network: onnx.ModelProto, table: CalibrationTable
) -> None:
    groups = {g.makers: g for g in channel_groups(GraphView(network))}
    # The stem and block a share the residual stream; block b has its own.
    assert set(groups) == {
        ("conv1", "a.conv2"),
        ("a.conv1",),
        ("b.conv1",),
        ("b.conv2", "b.downsample"),
    }
    assert set(groups[("conv1", "a.conv2")].readers) == {"a.conv1", "b.conv1", "b.downsample"}
    before = Runner(network, engine="onnxruntime", threads=1)(CROPS)
    even = equalise(network, table, 1.0)
    for x, y in zip(before, Runner(even, engine="onnxruntime", threads=1)(CROPS), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)
    again = calibrate(even, CROPS, threads=1)

    def unevenness(t: CalibrationTable) -> float:
        peaks = np.array(t.tensors["a.relu1"].channel_peak)
        return float(peaks.max() / peaks[peaks > 1e-3].min())

    assert unevenness(again) < 1.2
    assert unevenness(table) > 2
    with pytest.raises(UsageError, match="outside"):
        equalise(network, table, 2.0)


def test_quantise_chooses_by_measurement(network: onnx.ModelProto) -> None:
    crops = random_crops(20, SIZE, seed=3)
    chosen, held = split_crops(crops)
    assert not set(chosen) & set(held)
    assert len(held) == 4
    result = quantise(network, crops, flavour="cpu", threads=1)
    assert result.findings == ()
    assert result.held_back == 4
    assert result.difference.angles == min(d.angles for d in result.scores.values())
    judge = Judge(network, crops[held], threads=1)
    assert judge(result.model).angles == pytest.approx(result.difference.angles, abs=1e-6)
    assert {"minmax", "mse+bias", "mse+equal0.9"} <= set(result.scores)
    redone = emit(result.source, result.source_table, result.recipe, flavour="cpu")
    assert redone.SerializeToString() == result.model.SerializeToString()
    # The table is reused for the same crops and refused for others.
    again = quantise(network, crops, flavour="tensorrt", table=result.table, threads=1)
    assert again.table is result.table
    with pytest.raises(CompatibilityError, match="stale: crops"):
        quantise(network, crops[:15], flavour="cpu", table=result.table, threads=1)


def test_the_split_does_not_depend_on_the_order(rng: np.random.Generator) -> None:
    crops = random_crops(30, SIZE)
    order = rng.permutation(30)
    _, held = split_crops(crops)
    _, other = split_crops(crops[order])
    assert {order[i] for i in other} == set(held)


def test_mistakes_are_refused(network: onnx.ModelProto, table: CalibrationTable) -> None:
    with pytest.raises(UsageError, match="unknown calibration method 'best'"):
        quantise(network, CROPS, flavour="cpu", method="best")
    with pytest.raises(DataError, match="no calibration crops"):
        quantise(network, CROPS[:0], flavour="cpu")
    with pytest.raises(UsageError, match="FP32 body"):
        emit(network, table, Recipe(), flavour="cpu", body="fp16")
    with pytest.raises(UsageError, match="body 'int4'"):
        emit(network, table, Recipe(), flavour="tensorrt", body="int4")
    with pytest.raises(UsageError, match="unknown Q/DQ flavour"):
        emit(network, table, Recipe(), flavour="tflite")
    unnamed = onnx.ModelProto()
    unnamed.CopyFrom(network)
    unnamed.graph.node[4].name = ""
    with pytest.raises(DataError, match="no name of its own"):
        quantise(unnamed, CROPS, flavour="cpu")
    stranger = onnx.ModelProto()
    stranger.CopyFrom(network)
    del stranger.graph.input[0].type.tensor_type.shape.dim[3]
    with pytest.raises(DataError, match="expected one uint8"):
        Runner(stranger)


@pytest.mark.parametrize(
    "options", [{}, {"head": True}, {"body": "fp16"}, {"body": "fp16", "head": True}]
)
def test_tensorrt_rtx_parses_and_builds(
    network: onnx.ModelProto, table: CalibrationTable, options: dict[str, Any]
) -> None:
    model = emit(network, table, Recipe("mse"), flavour="tensorrt", **options)
    assert rtx_plan(model) > 1000
